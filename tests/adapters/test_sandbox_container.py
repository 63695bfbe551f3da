"""Agents in containers: what they find, how they are spoken to, and that nothing of them stays."""

import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cli.docker_engine import EngineUnavailable, docker, docker_engine
from kiln.errors import OperationFailedError
from kiln.models import PodLimits
from kiln.ports.pods import ImageSource
from kiln.registry_tokens import POD_USER, RegistryTokens, make_key_file
from support.agents import printed, shim_pid, texts
from support.container_rig import running
from support.oci_images import Made, Pusher
from support.pod_images import BUSYBOX, ContainerPods, busybox_image, cuttable, pod_order
from support.processes import soon
from support.registry import running_registry
from support.token_realm import token_realm

pytestmark = [pytest.mark.docker, pytest.mark.long]

PASSWORD = "what-opens-the-image"
SECRET = "correct horse\nbattery staple"
MINE = "acme/agent"


@dataclass
class Place:
    """An engine, and a registry whose images below `acme/` a pod may pull."""

    engine: str
    registry: str
    pusher: Pusher

    def push(self, made: Made, repository: str = MINE) -> ImageSource:
        self.pusher.push(repository, made)
        return ImageSource(f"{self.registry}/{repository}@{made.digest}", self.registry, PASSWORD)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    if not BUSYBOX.exists():
        pytest.skip("busybox-static is not installed")
    folder = tmp_path_factory.mktemp("registry")
    make_key_file(folder / "key.pem")
    tokens = RegistryTokens(folder / "key.pem")
    with ExitStack() as cleanup:
        try:
            engine = cleanup.enter_context(docker_engine())
        except EngineUnavailable as reason:
            pytest.skip(str(reason))
        realm = cleanup.enter_context(token_realm(tokens, POD_USER, PASSWORD, "nobody/", "acme/"))
        registry = cleanup.enter_context(running_registry(folder, folder / "key.pem", realm))
        pusher = Pusher(registry, tokens)
        cleanup.callback(pusher.close)
        yield Place(engine, registry, pusher)


@pytest.fixture(scope="module")
def image(place: Place) -> ImageSource:
    return place.push(busybox_image())


@pytest.fixture
async def pods(tmp_path: Path, place: Place, image: ImageSource) -> AsyncIterator[ContainerPods]:
    pods = ContainerPods(tmp_path, place.engine, image)
    yield pods
    await pods.close()
    assert containers(place) == []


def containers(place: Place, *, all_: bool = True) -> list[str]:
    options = ["--all"] if all_ else []
    return docker(place.engine, "ps", *options, "--format", "{{.Names}}").stdout.split()


async def result(pods: ContainerPods, script: str, **more: object) -> tuple[int | None, list[str]]:
    """Exit code and output of an agent that ends by itself."""
    shim = await pods.sh(script, **more)
    return (await shim.wait()).exit_code, texts(shim)


# What an agent finds


async def test_agent_at_home(pods: ContainerPods):
    """An image that names no user gives its agent 1000, without rights, in a HOME and a directory that it can write to."""
    script = """
        id -u; id -g; id -un; pwd; echo $HOME; echo $PATH; ls -ld /tmp | head -c 10; echo
        grep -E 'CapEff|CapBnd|NoNewPrivs|Seccomp:' /proc/self/status
        echo > here && echo > $HOME/there && cat $HOME/there $HOME/work/here | wc -l; stty size
        exit 7
    """
    code, lines = await result(pods, script)
    assert lines == [
        *("1000", "1000", "agent", "/home/agent/work", "/home/agent"),
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "drwxrwxrwt",
        *("CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"),
        *("2", "50 200"),
    ]
    assert code == 7


async def test_images_own_user(pods: ContainerPods, place: Place):
    """An image's own user, HOME, directory, variables and PATH stay as they are."""
    passwd = "root:x:0:0::/:/bin/sh\nscout:x:1500:1600::/srv/scout:/bin/sh\n"
    env = ["PATH=/bin:/srv/bin", "LANG=de_DE.UTF-8", "GREETING=hello"]
    own = place.push(busybox_image(files={"etc/passwd": passwd}, User="scout", WorkingDir="/srv", Env=env))
    script = "id -u; id -g; id -un; pwd; echo $HOME $PATH $GREETING; echo > ~/x && echo can; echo > x || exit 3"
    code, lines = await result(pods, script, image=own)
    assert lines[:6] == ["1500", "1600", "scout", "/srv", "/srv/scout /bin:/srv/bin hello", "can"]
    assert code == 3


@pytest.mark.parametrize("user", ["00", "+0:0", "toor"])
async def test_root_by_another_name(pods: ContainerPods, place: Place, user: str):
    """An image whose user is root under whatever name or number gives its agent 1000."""
    passwd = "root:x:0:0::/root:/bin/sh\ntoor:x:0:0::/toor:/bin/sh\n"
    image = place.push(busybox_image(files={"etc/passwd": passwd}, User=user))
    assert await result(pods, "id -u", image=image) == (0, ["1000"])


async def test_directory_of_an_image_without_a_user(pods: ContainerPods, place: Place):
    """The image's WORKDIR becomes the agent's own, with what lies in it readable."""
    own = place.push(busybox_image(files={"app/main": "ready"}, WorkingDir="/app", Env=["HOME=/root"]))
    assert await result(pods, "cat main; echo > new && echo > ~/new && pwd", image=own) == (0, ["ready/app"])


async def test_environment_and_files(pods: ContainerPods):
    """Variables reach the agent whole, whatever they are called; the MCP configuration is a file of its own."""
    order = pod_order(
        pods.image,
        *(
            "sh",
            "-c",
            '[ "$DOCKER_HOST" = mine ] && echo same; echo "$TOKEN" | wc -l; cat "$KILN_MCP_CONFIG"; echo; read x',
        ),
        environment={"DOCKER_HOST": "mine", "TOKEN": SECRET},
        mcp_config={"mcpServers": {"search": {"command": "x", "env": {"KEY": "in the file"}}}},
    )
    shim = await pods.begin(order)
    assert await soon(lambda: len(texts(shim)) >= 3)
    assert (texts(shim)[0], texts(shim)[1].strip()) == ("same", "2")
    assert '"env": {"KEY": "***"}' in "".join(texts(shim)[2:])
    assert [needle for needle in ("battery staple", "in the file", PASSWORD) if running(needle)] == []
    await shim.prompt("go on")
    assert (await shim.wait()).exit_code == 0


async def test_secret_that_is_printed(pods: ContainerPods):
    """The value of a variable is masked in the log."""
    shim = await pods.sh("echo $TOKEN", environment={"TOKEN": "correct-horse-battery"})
    await shim.wait()
    assert texts(shim) == ["***"]


# Its terminal


async def test_prompts_to_a_reader_of_lines(pods: ContainerPods):
    """Each prompt is one line, however long it is and whatever line ends it has, and is not repeated."""
    shim = await pods.sh('echo ready; read a; echo "<$a>"; read b; echo ${#b}; read c; echo "<$c>"')
    await printed(shim, "ready")
    await shim.prompt("one\ntwo\n")
    await shim.prompt("x" * 9000)
    await shim.prompt("last")
    assert (await shim.wait()).exit_code == 0
    assert texts(shim) == ["ready", "<one two>", "9000", "<last>"]


async def test_prompt_to_an_agent_that_takes_pastes(pods: ContainerPods):
    """A prompt reaches an agent that has switched pastes on as a paste, and Return as a key after it."""
    script = r"stty -icanon -icrnl; printf '\033[?2004h'; echo ready; dd bs=1 count=16 2>/dev/null | od -An -c"
    shim = await pods.sh(script)
    assert await soon(lambda: any("ready" in line for line in texts(shim)))
    await shim.prompt("a\nb")
    assert (await shim.wait()).exit_code == 0
    keys = "".join("".join(texts(shim)[1:]).split())
    assert keys == r"033[200~a\rb033[201~\r"


async def test_image_without_a_shell(pods: ContainerPods, place: Place):
    """Nothing of the image's is needed; a program that it lacks is named."""
    bare = place.push(busybox_image("cat"))
    shim = await pods.start("cat", "/proc/1/comm", image=bare)
    assert (await shim.wait()).exit_code == 0
    assert texts(shim) == ["docker-init"]
    shim = await pods.start("no-such-agent", image=bare)
    assert (await shim.wait()).exit_code == 127
    assert "no-such-agent" in texts(shim)[0]


# Its end


async def test_terminate(pods: ContainerPods, place: Place):
    """The agent hears SIGTERM, what it prints then is kept, and it is killed after the grace."""
    shim = await pods.sh("trap 'echo asked' TERM; echo ready; while :; do sleep 0.1; done")
    await printed(shim, "ready")
    await shim.terminate()
    assert (await shim.wait()).error == "terminated"
    assert texts(shim) == ["ready", "asked"]
    assert containers(place) == []


async def test_stop_ends_what_outlived_its_shim(pods: ContainerPods, place: Place):
    """A container whose wrapper was killed runs on, until it is stopped and concluded."""
    shim = await pods.sh("trap 'exit 0' TERM; echo ready; while :; do sleep 0.1; done")
    await printed(shim, "ready")
    os.kill((await shim.status())["agent"], signal.SIGKILL)
    assert (await shim.wait()).error == "the agent was ended by SIGKILL"
    [name] = containers(place, all_=False)
    key = name.removeprefix("kiln-")
    await pods.sandboxes.stop(key)
    assert containers(place, all_=False) == []
    await pods.sandboxes.conclude(key, pods.say)
    assert containers(place) == []


async def test_shim_is_killed(pods: ContainerPods, place: Place):
    """With its shim and that one's keeper gone, the pod's container is found and removed."""
    shim = await pods.sh("echo ready; sleep 600")
    await printed(shim, "ready")
    os.kill(await shim_pid(shim), signal.SIGKILL)
    await shim.wait()
    [key] = pods.shims.keys()
    await pods.sandboxes.conclude(key, pods.say)
    assert containers(place) == []


async def test_container_is_removed_by_somebody(pods: ContainerPods, place: Place):
    """An agent whose container was taken away has failed."""
    shim = await pods.sh("echo ready; sleep 600")
    await printed(shim, "ready")
    docker(place.engine, "rm", "--force", *containers(place))
    ended = (await shim.wait()).error
    # It is seen either dying or gone.
    assert ended in ("the agent exited with code 137", "the agent exited with code 125")


async def test_engine_goes_away(tmp_path: Path, place: Place, image: ImageSource):
    """An agent whose engine is lost has failed, and its log says why; its container goes when the engine is back."""
    async with cuttable(Path(place.engine.removeprefix("unix://")), tmp_path / "relay.sock") as cut:
        pods = ContainerPods(tmp_path, f"unix://{tmp_path}/relay.sock", image)
        shim = await pods.sh("echo ready; sleep 600")
        await printed(shim, "ready")
        cut()
        assert (await shim.wait()).error == "the agent exited with code 125"
        assert texts(shim)[-1].startswith("[the agent is lost: the container engine does not answer: ")
        [key] = pods.shims.keys()
        await pods.sandboxes.conclude(key, pods.say)
        assert pods.said[-1].startswith("the agent's container may run on: ")
        with pytest.raises(OSError, match="the container engine does not answer"):
            await pods.sandboxes.remove(key)
    assert containers(place, all_=False) == [f"kiln-{key}"]
    await ContainerPods(tmp_path, place.engine, image).sandboxes.remove(key)
    assert containers(place) == []


# Its limits


async def test_memory(pods: ContainerPods):
    """An agent is killed at its limit of memory, and its log says so."""
    code, lines = await result(pods, "exec tail /dev/zero", limits=PodLimits(memory_mb=32))
    assert (code, lines) == (137, ["[the agent was killed at the limit of 32 MB of memory]"])


async def test_processes(pods: ContainerPods):
    """A pod has no more processes than its limit, which is no higher than the runner's."""
    order = PodLimits(processes=20)
    code, lines = await result(pods, "for n in $(seq 60); do sleep 60 & done; echo all", limits=order)
    assert code != 0
    assert "all" not in lines
    assert any("fork" in line for line in lines)


async def test_disk(pods: ContainerPods):
    """A limit of the disk that the engine does not enforce is refused, and not offered."""
    if pods.sandboxes.limits() == ["disk_mb"]:
        code, _ = await result(pods, "dd if=/dev/zero of=x bs=1M count=200", limits=PodLimits(disk_mb=64))
        assert code != 0
        return
    with pytest.raises(OperationFailedError, match=r"cannot make the container: .*storage-opt"):
        await pods.sh("true", limits=PodLimits(disk_mb=64))


# Preparing, sweeping, removing


async def test_image_that_may_not_be_pulled(pods: ContainerPods, place: Place):
    """A wrong password, or an image of somebody else's that the engine has by another name, fails the pod with a sentence."""
    await result(pods, "true")
    others = place.push(busybox_image(), "others/agent")
    wrong = replace(place.push(busybox_image(User="2000")), token="wrong-password")
    for source in (others, wrong):
        with pytest.raises(OperationFailedError, match=f"cannot pull {source.reference}: ") as caught:
            await pods.sh("true", image=source)
        assert source.token not in str(caught.value)


async def test_prepared_twice(pods: ContainerPods, place: Place):
    """What an interrupted preparation has left is made anew."""
    order = pod_order(pods.image, "sh", "-c", "echo once")
    await pods.sandboxes.prepare(order, pods.say)
    shim = await pods.begin(order)
    assert (await shim.wait()).exit_code == 0
    assert texts(shim) == ["once"]


async def test_sweep(pods: ContainerPods, place: Place, tmp_path: Path):
    """Containers of this host's pods that nobody knows go; those of living pods, and of other hosts, stay."""
    others = ContainerPods(tmp_path / "others", place.engine, pods.image)
    orders = [pod_order(pods.image, "true") for _ in range(3)]
    for owner, order in zip((pods, pods, others), orders, strict=True):
        await owner.sandboxes.prepare(order, owner.say)
    living, _, foreign = orders
    await pods.sandboxes.sweep(frozenset({living.key}))
    assert sorted(containers(place)) == sorted([f"kiln-{living.key}", f"kiln-{foreign.key}"])
    for owner, order in zip((pods, pods, others), orders, strict=True):
        await owner.sandboxes.remove(order.key)


async def test_remove(pods: ContainerPods, place: Place, tmp_path: Path):
    """Nothing of a removed pod is left: no container, no directory, and no image unless another pod is of it."""
    first, second = (pod_order(pods.image, "true") for _ in range(2))
    for order in (first, second):
        await pods.sandboxes.prepare(order, pods.say)
    await pods.sandboxes.remove(first.key)
    assert docker(place.engine, "image", "inspect", pods.image.reference).returncode == 0
    for _ in range(2):
        await pods.sandboxes.remove(second.key)
    assert docker(place.engine, "image", "inspect", pods.image.reference).returncode != 0
    assert list((tmp_path / "pods").iterdir()) == []


async def test_no_engine(tmp_path: Path):
    """Without an engine a pod in a container fails with a sentence, and pods that have none are left in peace."""
    image = ImageSource(f"registry.test/acme/agent@sha256:{'0' * 64}", "registry.test", PASSWORD)
    pods = ContainerPods(tmp_path, f"unix://{tmp_path}/no.sock", image)
    with pytest.raises(OperationFailedError, match="this runner has no container engine"):
        await pods.sh("true")
    assert pods.sandboxes.limits() == []
    await pods.sandboxes.stop("pod-other")
    await pods.sandboxes.conclude("pod-other", pods.say)
    await pods.sandboxes.remove("pod-other")
    assert pods.said == []
