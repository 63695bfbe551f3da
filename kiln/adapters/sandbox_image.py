"""What a container of an image is for an agent: whose it is, where its HOME is, what must be put into it."""

import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from kiln.adapters.pod_engine import EngineApi, MissingError

# An image that names nobody would run its agent as root.
AGENT_ID = 1000
AGENT_NAME = "agent"
AGENT_HOME = "/home/agent"
ROOT_NAMES = frozenset({"", "root"})
SHELLS = ("/bin/bash", "/bin/sh")
ACCOUNTS = "/etc/passwd"
TEMPORARY = "/tmp"  # noqa: S108  the container's own
DIRECTORY_MODE = 0o755
FILE_MODE = 0o600
EVERYBODYS_MODE = 0o1777


@dataclass(frozen=True)
class Account:
    """A line of passwd(5)."""

    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True)
class Inside:
    """An image as an agent finds it. `made` are directories to be made the agent's; `passwd` is the file of that name
    where it lacks the agent, `shell` is "" where there is none."""

    account: Account
    user: str
    work: str
    shell: str
    made: Sequence[str]
    lacks_tmp: bool
    passwd: str | None
    variables: frozenset[str]

    @property
    def base(self) -> dict[str, str]:
        """What an agent's environment has beside its own: the image's PATH stays, and so does what else it sets."""
        account = self.account
        own = {"HOME": account.home, "USER": account.name, "LOGNAME": account.name, "TMPDIR": TEMPORARY}
        return own | ({"SHELL": self.shell} if self.shell else {})

    def started(self, argv: Sequence[str]) -> list[str]:
        """The command, on a terminal that prints what it is given as it is and does not repeat what is typed."""
        if not self.shell:
            return list(argv)
        return ["/bin/sh", "-c", 'stty -echo -opost rows 50 cols 200 2>/dev/null; exec "$@"', "sh", *argv]

    def archive(self, files: Mapping[str, str]) -> bytes:
        """What is to be put in at `/`: the agent's directories, and these files below its HOME."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            if self.lacks_tmp:
                _add_directory(tar, TEMPORARY, EVERYBODYS_MODE)
            if self.passwd is not None:
                _add_file(tar, ACCOUNTS, self.passwd, 0o644)
            for path in self.made:
                _add_directory(tar, path, DIRECTORY_MODE, self.account)
            for name in _parents(files):
                _add_directory(tar, f"{self.account.home}/{name}", 0o700, self.account)
            for name, text in files.items():
                _add_file(tar, f"{self.account.home}/{name}", text, FILE_MODE, self.account)
        return packed.getvalue()


def look_inside(api: EngineApi, container: str, config: Mapping[str, Any]) -> Inside:
    """What there is in a container of an image with this configuration. Raises EngineError."""
    passwd = _text(api, container, ACCOUNTS)
    variables = dict(pair.partition("=")[::2] for pair in config.get("Env") or [])
    user = str(config.get("User") or "")
    chosen = _is_root(passwd, user)
    known = _account(passwd, str(AGENT_ID) if chosen else user)
    account = _at_home(known or _unknown(user, chosen=chosen), variables.get("HOME", ""))
    work = _work(str(config.get("WorkingDir") or ""), account.home, chosen=chosen)
    places = dict.fromkeys((account.home, work))
    return Inside(
        account=account,
        user=f"{account.uid}:{account.gid}" if chosen else user,
        work=work,
        shell=next((shell for shell in SHELLS if api.exists(container, shell)), ""),
        # What the image's own user is to have, the image says.
        made=[path for path in places if chosen or not api.exists(container, path)],
        lacks_tmp=not api.exists(container, TEMPORARY),
        passwd=None if known or not chosen else _with(passwd, account),
        variables=frozenset(variables),
    )


def _is_root(passwd: str, user: str) -> bool:
    """Whether an image's `User` is nobody or root, under whatever name or number."""
    wanted = user.partition(":")[0]
    with suppress(ValueError):
        return int(wanted) == 0
    account = _account(passwd, user)
    return wanted in ROOT_NAMES or (account is not None and account.uid == 0)


def _account(passwd: str, user: str) -> Account | None:
    """The account of a user, by name or number, as an image's `User` has it."""
    wanted = user.partition(":")[0]
    for line in passwd.splitlines():
        fields = line.split(":")
        if len(fields) == 7 and wanted in (fields[0], fields[2]) and fields[2].isdigit() and fields[3].isdigit():
            return Account(fields[0], int(fields[2]), int(fields[3]), fields[5])
    return None


def _unknown(user: str, *, chosen: bool) -> Account:
    if chosen:
        return Account(AGENT_NAME, AGENT_ID, AGENT_ID, "")
    name, _, group = user.partition(":")
    return Account(AGENT_NAME, int(name) if name.isdigit() else 0, int(group) if group.isdigit() else 0, "")


def _at_home(account: Account, home: str) -> Account:
    """The image's HOME counts before that of the account."""
    found = home or account.home
    usable = found.startswith("/") and found != "/"
    return Account(account.name, account.uid, account.gid, found if usable else AGENT_HOME)


def _work(directory: str, home: str, *, chosen: bool) -> str:
    if directory.startswith("/") and directory != "/":
        return directory
    return f"{home}/work" if chosen else home


def _with(passwd: str, account: Account) -> str:
    lines = passwd if passwd.endswith("\n") or not passwd else f"{passwd}\n"
    return f"{lines}{account.name}:x:{account.uid}:{account.gid}::{account.home}:/bin/sh\n"


def _text(api: EngineApi, container: str, path: str) -> str:
    """What a file of a container holds; nothing if there is no such file."""
    try:
        packed = api.call("GET", f"/containers/{container}/archive", {"path": path})
    except MissingError:
        return ""
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        member = next(iter(tar), None)
        content = tar.extractfile(member) if member is not None and member.isreg() else None
        return content.read().decode(errors="replace") if content else ""


def _parents(files: Mapping[str, str]) -> Iterator[str]:
    """The directories between HOME and the files, outermost first."""
    found = {str(parent) for name in files for parent in PurePosixPath(name).parents} - {"."}
    yield from sorted(found)


def _add_directory(tar: tarfile.TarFile, path: str, mode: int, owner: Account | None = None) -> None:
    member = _member(path, mode, owner)
    member.type = tarfile.DIRTYPE
    tar.addfile(member)


def _add_file(tar: tarfile.TarFile, path: str, text: str, mode: int, owner: Account | None = None) -> None:
    content = text.encode()
    member = _member(path, mode, owner)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _member(path: str, mode: int, owner: Account | None) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path.lstrip("/"))
    member.mode = mode
    if owner:
        member.uid, member.gid = owner.uid, owner.gid
    return member
