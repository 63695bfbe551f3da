"""A way out for an engine in a network namespace of its own, with a firewall before it. Standard library only.

A slot's namespace hangs on this host by a pair of links (veth(4)). What comes out of it may go to the world, but not to
this host, to other slots, or to a cloud's metadata service. The rules stand in chains with the link's name, so that
who finds the name finds all of them. IPv6 there is none.
"""

import fcntl
import ipaddress
import secrets
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cli.engine_slot import LINK_PREFIX, RUN_FOLDER

IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
RESOLV_CONF = Path("/etc/resolv.conf")
# Where systemd-resolved names the servers that it asks itself; resolv.conf names only its own, on loopback.
REAL_RESOLV_CONF = Path("/run/systemd/resolve/resolv.conf")
# Link-local, where AWS, Google Cloud and Azure keep credentials; Azure's and Alibaba's other places; Oracle's.
METADATA = ("169.254.0.0/16", "168.63.129.16/32", "100.100.100.200/32", "192.0.0.192/32")
TABLES = ("raw", "filter", "nat")
PEER = "uplink"
SUBNET_TRIES = 100


@dataclass(frozen=True)
class Place:
    """A TCP service: an IPv4 address and a port."""

    address: str
    port: int


@dataclass(frozen=True)
class Uplink:
    """A slot's addresses: one for each end of the pair of links, and a network for the engine's own bridge."""

    link: str
    subnet: ipaddress.IPv4Network
    mtu: int

    @property
    def gateway(self) -> str:
        return str(self.subnet[1])

    @property
    def address(self) -> str:
        return f"{self.subnet[2]}/30"

    @property
    def bridge(self) -> str:
        """The bridge's own address, with its network's length: the upper half."""
        upper = list(self.subnet.subnets(prefixlen_diff=1))[1]
        return f"{upper[1]}/{upper.prefixlen}"

    def connect(self, pid: int) -> None:
        """Puts the pair's other end into the namespace of a process; both go when that does."""
        run("ip", "link", "add", self.link, "mtu", str(self.mtu), "type", "veth", "peer", "name", PEER, "mtu",
            str(self.mtu), "netns", str(pid))  # fmt: skip
        # Else the host's services would be there for the slot at a link-local IPv6 address.
        run("ip", "link", "set", self.link, "addrgenmode", "none")
        run("ip", "address", "add", f"{self.gateway}/30", "dev", self.link)
        run("ip", "link", "set", self.link, "up")


@contextmanager
def slot_uplink(link: str, nameservers: Iterable[str], allowed: Iterable[Place]) -> Iterator[Uplink]:
    """Prepares a way out, and takes it away after the block.

    `nameservers` are asked for names wherever they are; `allowed` are services of this host that may be reached.
    Raises OSError, subprocess.CalledProcessError.
    """
    try:
        with _locked():
            uplink = Uplink(link, free_subnet(), _mtu())
            _shut_in(uplink, nameservers, allowed)
        forward_packets()
        yield uplink
    finally:
        remove_uplink(link)


def remove_uplink(link: str) -> None:
    """Removes a slot's link and chains, as far as they are there, and undoes forwarding after the last slot."""
    with _locked():
        with suppress(OSError, subprocess.CalledProcessError):
            if Path("/sys/class/net", link).exists():
                run("ip", "link", "delete", link)
        for table in TABLES:
            with suppress(OSError, subprocess.CalledProcessError):
                _remove_chain(table, link)
    stop_forwarding()


def forward_packets() -> None:
    """Has this host pass packets on, as every engine's network needs it. Raises OSError."""
    with _locked():
        before = IP_FORWARD.read_text().strip()
        if before != "1":
            _forwarding_note().write_text(before)
            IP_FORWARD.write_text("1")


def stop_forwarding() -> None:
    """Restores what the host had, unless another engine's link, or bridge, is there still. Raises OSError."""
    with _locked():
        note = _forwarding_note()
        if note.exists() and not any(Path("/sys/class/net").glob(f"{LINK_PREFIX}*")):
            IP_FORWARD.write_text(note.read_text())
            note.unlink()


def nameservers(*files: Path) -> list[str]:
    """The IPv4 name servers of this host that another network namespace can ask too; of the first file with one."""
    for file in files or (RESOLV_CONF, REAL_RESOLV_CONF):
        with suppress(OSError):
            words = [line.split() for line in file.read_text(errors="replace").splitlines()]
            found = [line[1] for line in words if line[:1] == ["nameserver"] and len(line) > 1 and _is_remote(line[1])]
            if found:
                return found
    return []


def free_subnet() -> ipaddress.IPv4Network:
    """A private network of 254 addresses that this host has no route to. Raises OSError."""
    words = run("ip", "-4", "route", "show", "table", "all").split()
    routes = [ipaddress.IPv4Network(word, strict=False) for word in words if "." in word and _is_network(word)]
    for _ in range(SUBNET_TRIES):
        subnet = ipaddress.IPv4Network((f"10.{200 + secrets.randbelow(55)}.{secrets.randbelow(256)}.0", 24))
        if not any(subnet.overlaps(route) for route in routes if route.prefixlen):
            return subnet
    raise OSError("every private network tried is in use")


def run(*command: str) -> str:
    """The output of a command. Raises OSError, subprocess.CalledProcessError."""
    return subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout


def _shut_in(uplink: Uplink, servers: Iterable[str], allowed: Iterable[Place]) -> None:
    """The firewall. The raw table comes before any redirection of ports, so that `LOCAL` is what was asked for."""
    link = uplink.link
    early = [*_accept_names(servers), *([*_to(place), "-j", "ACCEPT"] for place in allowed)]
    early.append(["-m", "addrtype", "--dst-type", "LOCAL", "-j", "DROP"])
    early += [["-d", network, "-j", "DROP"] for network in METADATA]
    _add_chain("raw", link, early, [("PREROUTING", ["-i", link])])
    passing = [
        ["-i", link, "-o", f"{LINK_PREFIX}+", "-j", "DROP"],
        ["-i", link, "-j", "ACCEPT"],
        ["-o", link, "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED", "-j", "ACCEPT"],
        ["-j", "DROP"],
    ]
    _add_chain("filter", link, passing, [("FORWARD", ["-i", link]), ("FORWARD", ["-o", link])])
    _add_chain("nat", link, [["-j", "MASQUERADE"]], [("POSTROUTING", ["-s", str(uplink.subnet), "!", "-o", link])])


def _accept_names(servers: Iterable[str]) -> Iterator[list[str]]:
    for server in servers:
        for protocol in ("udp", "tcp"):
            yield ["-d", server, "-p", protocol, "--dport", "53", "-j", "ACCEPT"]


def _to(place: Place) -> list[str]:
    return ["-d", place.address, "-p", "tcp", "--dport", str(place.port)]


def _add_chain(table: str, chain: str, rules: list[list[str]], jumps: list[tuple[str, list[str]]]) -> None:
    _iptables(table, "-N", chain)
    for rule in rules:
        _iptables(table, "-A", chain, *rule)
    for place, condition in jumps:
        _iptables(table, "-I", place, *condition, "-j", chain)


def _remove_chain(table: str, chain: str) -> None:
    rules = [line.split() for line in _iptables(table, "-S").splitlines()]
    for rule in rules:
        if rule[0] == "-A" and rule[-2:] == ["-j", chain]:
            _iptables(table, "-D", *rule[1:])
    if ["-N", chain] in rules:
        _iptables(table, "-F", chain)
        _iptables(table, "-X", chain)


def _iptables(table: str, *arguments: str) -> str:
    return run("iptables", "--wait", "-t", table, *arguments)


def _forwarding_note() -> Path:
    """Keeps what the host had, also over a death."""
    return RUN_FOLDER / "ip_forward"


@contextmanager
def _locked() -> Iterator[None]:
    """One engine at a time looks for what is free, takes it, and gives it back."""
    RUN_FOLDER.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (RUN_FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _mtu() -> int:
    """Of the host's way out: a larger one would lose what does not fit."""
    words = run("ip", "-4", "route", "show", "default").split()
    if "dev" not in words:
        return 1500
    return int(Path("/sys/class/net", words[words.index("dev") + 1], "mtu").read_text())


def _is_remote(server: str) -> bool:
    with suppress(ValueError):
        address = ipaddress.ip_address(server)
        return address.version == 4 and not address.is_loopback
    return False


def _is_network(word: str) -> bool:
    with suppress(ValueError):
        ipaddress.IPv4Network(word, strict=False)
        return True
    return False
