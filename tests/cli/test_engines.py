"""The embedded stack's own engines: what a build can reach, what it can eat, and what is left of an engine."""

import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from cli.engine_network import Place, free_subnet, run
from cli.engine_relay import listen_inside
from cli.engines import plan_containers
from cli.local_stack import API, ENGINE, REGISTRY, LocalStack
from kiln.adapters.engines import Engines
from kiln.ports import Engine
from kiln.settings import Settings
from support.engines import PROCESSES, EngineProcess, running_engine
from support.ports import free_ports
from support.processes import eventually

# ECS keeps its tasks' credentials there; the machine's own metadata service stays where it is.
METADATA = "169.254.170.2"
PORT = 80


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    with running_engine(tmp_path_factory.mktemp("engine") / "home") as engine:
        yield engine


@pytest.fixture
def everywhere() -> Iterator[socket.socket]:
    """A service of this host, on all of its addresses."""
    with socket.create_server(("0.0.0.0", 0)) as listener:
        listener.setblocking(False)
        yield listener


@dataclass(frozen=True)
class Cloud:
    """Another machine, next to this one, with an ordinary service and a metadata service."""

    service: str
    met: dict[str, socket.socket]

    def was_reached(self, address: str) -> bool:
        with suppress(BlockingIOError):
            self.met[address].accept()[0].close()
            return True
        return False


@pytest.fixture
def cloud(engine: EngineProcess) -> Iterator[Cloud]:
    with ExitStack() as cleanup:
        machine = cleanup.enter_context(subprocess.Popen(["unshare", "--net", "sleep", "60"]))
        cleanup.callback(machine.kill)
        assert eventually(lambda: Path(f"/proc/{machine.pid}/comm").read_text().strip() == "sleep")
        link, subnet = f"cloud{machine.pid}", free_subnet()
        inside = ("nsenter", f"--net=/proc/{machine.pid}/ns/net", "ip")
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "cloud", "netns", str(machine.pid))
        run("ip", "address", "add", f"{subnet[1]}/24", "dev", link)
        run("ip", "link", "set", link, "up")
        run("ip", "route", "add", f"{METADATA}/32", "dev", link)
        for address in (f"{subnet[2]}/24", f"{METADATA}/32"):
            run(*inside, "address", "add", address, "dev", "cloud")
        run(*inside, "link", "set", "cloud", "up")
        listeners = listen_inside(machine.pid, [Place(str(subnet[2]), PORT), Place(METADATA, PORT)])
        for listener, _ in listeners:
            cleanup.enter_context(listener).setblocking(False)
        yield Cloud(str(subnet[2]), {place.address: listener for listener, place in listeners})


def own_addresses() -> list[str]:
    words = [line.split() for line in subprocess.getoutput("ip -4 -oneline address").splitlines()]
    return [line[3].partition("/")[0] for line in words]


def was_reached(listener: socket.socket) -> bool:
    with suppress(BlockingIOError):
        listener.accept()[0].close()
        return True
    return False


def calls(*places: str) -> str:
    """A RUN line that connects to every place at once."""
    tries = " ".join(f"(busybox timeout 3 busybox nc -w 2 {place} </dev/null || true) &" for place in places)
    return f"RUN {tries} wait"


@pytest.mark.docker
class TestReach:
    def test_a_run_step_reaches_the_world_but_no_metadata(
        self, engine: EngineProcess, cloud: Cloud, tmp_path: Path
    ) -> None:
        """An ordinary service of another machine answers; its metadata address does not."""
        printed = engine.build(tmp_path / "c", calls(f"{cloud.service} {PORT}", f"{METADATA} {PORT}"))
        assert cloud.was_reached(cloud.service), printed
        assert not cloud.was_reached(METADATA)

    def test_a_run_step_reaches_nothing_of_this_host(
        self, engine: EngineProcess, everywhere: socket.socket, tmp_path: Path
    ) -> None:
        """Neither its loopback nor any other of its addresses, the end of the slot's own link among them."""
        port = everywhere.getsockname()[1]
        addresses = own_addresses()
        assert len(addresses) >= 2
        printed = engine.build(tmp_path / "c", calls(*(f"{address} {port}" for address in addresses)), "RUN echo tried")
        assert "tried" in str(printed)
        assert not was_reached(everywhere)
        socket.create_connection(("127.0.0.1", port)).close()
        assert eventually(lambda: was_reached(everywhere))

    def test_buildkit_itself_fetches_nothing_from_this_host(
        self, engine: EngineProcess, everywhere: socket.socket, tmp_path: Path
    ) -> None:
        """`ADD http://…` runs in the engine, which has a network of its own as well."""
        port = everywhere.getsockname()[1]
        for address in ("127.0.0.1", next(each for each in own_addresses() if not each.startswith("127."))):
            printed = engine.build(tmp_path / "c", f"ADD http://{address}:{port}/ /x", seconds=3)
            assert printed is None or "ERROR" in printed
        assert not was_reached(everywhere)

    def test_a_build_cannot_ask_for_the_network_of_its_engine(self, engine: EngineProcess, tmp_path: Path) -> None:
        """The engine grants no entitlement, whatever the client allows."""
        options = ("--network=host", "--allow=network.host")
        assert "entitlement network.host is not allowed" in str(engine.build(tmp_path / "c", options=options))

    def test_the_engine_has_no_variable_of_its_starter(self, engine: EngineProcess, tmp_path: Path) -> None:
        """Neither dockerd nor a RUN step."""
        daemons = [line.split()[0] for line in engine.traces()["processes"] if "dockerd" in line]
        assert len(daemons) == 1
        assert b"not-for-builds" not in Path(f"/proc/{daemons[0]}/environ").read_bytes()
        printed = str(engine.build(tmp_path / "c", "RUN busybox env"))
        assert "PATH=" in printed
        assert "not-for-builds" not in printed


@pytest.mark.docker
class TestLimits:
    def test_a_build_beyond_its_memory_is_killed_and_the_engine_goes_on(
        self, engine: EngineProcess, tmp_path: Path
    ) -> None:
        """Exit code 137; the next build is served."""
        before = engine.process.poll()
        hog = engine.build(tmp_path / "c", "RUN busybox dd if=/dev/zero of=/dev/null bs=400M count=1")
        assert "exit code: 137" in str(hog)
        assert before is None
        assert "done-well" in str(engine.build(tmp_path / "c", "RUN echo done-$(echo well)"))

    def test_a_fork_bomb_stays_within_its_limit(self, engine: EngineProcess, tmp_path: Path) -> None:
        """The engine answers beside it, and it ends with the build's client."""
        with engine.started(tmp_path / "c", "RUN bomb() { bomb | bomb & busybox sleep 9; }; bomb; busybox sleep 60"):
            # At the limit forks fail and shells give up, so the number goes up and down below it.
            assert eventually(lambda: engine.builds_cgroup("pids.current") >= PROCESSES // 2, 30)
            assert engine.answers
            assert engine.builds_cgroup("pids.current") <= PROCESSES
        assert eventually(lambda: engine.builds_cgroup("pids.current") == 0, 20)


@pytest.mark.docker
class TestEnd:
    def test_nothing_is_left_after_a_stop(self, tmp_path: Path) -> None:
        """SIGTERM ends its processes in time, and takes its link, rules, cgroups and files away."""
        with running_engine(tmp_path / "home") as engine:
            assert set(engine.traces()) == {"processes", "links", "rules", "cgroups", "files"}
            assert engine.end(signal.SIGTERM) == 0
            assert engine.traces() == {}

    def test_the_next_start_removes_what_a_kill_left(self, tmp_path: Path) -> None:
        """Its processes die with it, in the middle of a build; its images and layers stay for its successor."""
        with running_engine(tmp_path / "home") as killed:
            killed.build(tmp_path / "first", "RUN busybox true", options=("--tag=kiln-test/kept",))
            with killed.started(tmp_path / "second", "RUN busybox sleep 60"):
                assert eventually(lambda: killed.builds_cgroup("pids.current"), 20)
                killed.end(signal.SIGKILL)
                assert eventually(lambda: "processes" not in killed.traces(), 10)
        with running_engine(tmp_path / "home") as successor:
            assert successor.docker("image", "inspect", "kiln-test/kept").returncode == 0
            assert successor.end(signal.SIGTERM) == 0
            assert successor.traces() == {}


class TestPlan:
    def test_an_engine_that_does_not_answer_is_named_with_its_setting(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """DOCKER_HOST comes before an engine of one's own, KILN_ENGINE_HOSTS before that."""
        settings = Settings(home=tmp_path, registry="127.0.0.1:1", buildx="true")
        monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/a.sock")
        assert plan_containers(settings).off == "no Docker engine answers at unix:///nonexistent/a.sock (DOCKER_HOST)"
        chosen = settings.model_copy(update={"engine_hosts": ("unix:///nonexistent/b.sock",)})
        assert plan_containers(chosen).off.endswith("b.sock (KILN_ENGINE_HOSTS)")

    @pytest.mark.parametrize(
        ("chosen", "reason"),
        [
            ({"containers": False}, "KILN_CONTAINERS says so"),
            ({"buildx": "no-buildx"}, "`no-buildx version` fails: make setup installs it, or set KILN_BUILDX"),
            ({"containers_off": "as I like"}, "as I like"),
        ],
    )
    def test_the_reason_names_what_to_do(self, tmp_path: Path, chosen: dict[str, object], reason: str) -> None:
        """Whatever is missing or switched off, no role that needs it is served."""
        plan = plan_containers(Settings(home=tmp_path, registry="127.0.0.1:1", **chosen))  # type: ignore[arg-type]
        assert plan.off == reason
        served = [role for role in ("control", "packer", "container", "transfer") if plan.serves(role)]
        assert served == ["control", "packer"]

    @pytest.mark.docker
    def test_a_stack_whose_engine_fails_serves_without(self, tmp_path: Path) -> None:
        """The reason is said, and neither engine nor registry is left running."""
        api, registry = free_ports(2)
        settings = Settings(home=tmp_path / "home", api_port=api, registry_port=registry, slot_cpus=1e15)
        said: list[str] = []
        stack = LocalStack(settings, parts=(API, ENGINE, REGISTRY), auto_restart=False, embedded=True, say=said.append)
        if stack.containers.off:
            pytest.skip(stack.containers.off)
        with stack:
            assert set(stack.parts) == {"api"}
            assert "the limits of" in stack.containers.off
        assert [line for line in said if line.startswith("Container builds are off: Docker engine ")]


@pytest.mark.docker
async def test_forgetting_a_name_keeps_the_layers(engine: EngineProcess, tmp_path: Path) -> None:
    """The name is gone from the engine, and the next build of the same lines comes from the cache."""
    tag, line = "kiln-test/forgotten:1", f"RUN echo {tmp_path.name}"
    assert not is_cached(engine.build(tmp_path / "c", line, options=(f"--tag={tag}",)), line)
    await Engines([engine.slot.host], 1).forget(Engine("engine-1", engine.slot.host), [tag])
    assert engine.docker("image", "inspect", tag).returncode == 1
    assert is_cached(engine.build(tmp_path / "c", line), line)


def is_cached(printed: str | None, line: str) -> bool:
    """What BuildKit says of a step; its lines begin with the step's number."""
    (number,) = {said.split()[0] for said in str(printed).splitlines() if said.endswith(f"] {line}")}
    return f"{number} CACHED" in str(printed)
