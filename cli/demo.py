"""`kiln demo`: the main job, once, on a stack of its own that leaves no process behind."""

import shutil
import signal
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cli.checks import free_ports
from cli.client import KilnClient
from cli.home import check_home_is_free
from cli.local_stack import LocalStack
from cli.render import console, event_text, print_rows
from kiln.adapters.ec2 import Ec2Cloud
from kiln.errors import KilnError
from kiln.ports import Ami
from kiln.settings import Ec2Mode, Settings

PROVIDER = "claude-code"
TAGS = {"made-by": "kiln-demo"}
INTERRUPTED = 130


class DemoFailedError(KilnError):
    """The build did not succeed; the message is its error."""


def demo(settings: Settings) -> int:
    """Bakes an AMI in the simulated EC2 and shows what was made; returns the exit code. Raises KilnError.

    `settings` are the user's own; ports, home and stores are the demo's, so that it disturbs nothing.
    """
    mine = demo_settings(settings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    screen = console()
    try:
        check_home_is_free(mine)
        shutil.rmtree(mine.home_dir, ignore_errors=True)
        with LocalStack(mine, embedded=True, say=screen.print) as stack:
            screen.print(f"Ready: API {stack.api_url}, Temporal UI {mine.ui_url}, logs {mine.home_dir / 'logs'}")
            _bake(stack, screen)
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def demo_settings(settings: Settings) -> Settings:
    """The user's settings on free ports, in a home of their own, with nothing outside of this host."""
    api_port, temporal_port, ui_port, ec2_port = free_ports(4)
    mine = {
        "home": settings.home_dir / "demo",
        "api_host": "127.0.0.1",
        "api_port": api_port,
        "temporal_port": temporal_port,
        "temporal_ui_port": ui_port,
        "temporal_ui_url": "",
        "ec2": Ec2Mode.SIMULATED,
        "ec2_port": ec2_port,
        "ec2_endpoint": "",
        "catalog_url": "",
        "logs_url": "",
        "machine_build_rate": "",
        "containers": False,
    }
    return settings.model_copy(update=mine)


def _bake(stack: LocalStack, screen: Console) -> None:
    """One build from submission to what it made. Raises DemoFailedError."""
    with KilnClient(stack.api_url, stack.api_key) as client:
        body = {"provider": PROVIDER, "tags": TAGS}
        begun = time.monotonic()
        build_id = client.submit(body)["build_id"]
        screen.print(f"POST /api/v1/images/build {body} → build {build_id}")
        _watch(client, build_id, screen)
        seconds = time.monotonic() - begun
        build = client.build(build_id)
    if build["status"] != "succeeded":
        error = build["error"] or {"message": f"the build ended {build['status']}"}
        raise DemoFailedError(f"{error['message']}; the stack's logs are in {stack.settings.home_dir / 'logs'}")
    ami = _ami(stack.settings, build)
    screen.print(f"\n{ami.image_id} is {ami.state}: an AMI with {PROVIDER}, in a simulated EC2, not on AWS\n")
    print_rows(("WHAT WAS MADE", "IN SIMULATED EC2"), [*_made(build, ami), ("took", f"{seconds:.1f} s")], "")


def _watch(client: KilnClient, build_id: str, screen: Console) -> None:
    """The log as it comes, above a line that says what the build is doing and for how long."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task("waiting for the worker", total=None)
        for event in client.follow(build_id):
            line = event_text(event)
            if line:
                progress.console.print(f"  {line}", soft_wrap=True)
                progress.update(task, description=_shortened(line))


def _shortened(line: str) -> str:
    """What a Packer line says, without its source."""
    return line.removeprefix("==> ").rpartition("amazon-ebs.agent: ")[2].strip()[:70]


def _ami(settings: Settings, build: dict[str, Any]) -> Ami:
    """The AMI as EC2 has it, not as Kiln tells it. Raises DemoFailedError."""
    cloud = Ec2Cloud(simulated=True, endpoint_url=settings.ec2_url)
    try:
        ami = cloud.image(build["image"]["region"], build["image"]["reference"])
    finally:
        cloud.close()
    if ami is None:
        raise DemoFailedError(f"EC2 does not have {build['image']['reference']}")
    return ami


def _made(build: dict[str, Any], ami: Ami) -> list[tuple[str, str]]:
    return [
        ("AMI", ami.image_id),
        ("name", ami.name),
        *(("snapshot", snapshot_id) for snapshot_id in ami.snapshot_ids),
        ("region", build["image"]["region"]),
        ("size", f"{ami.size_gib} GiB, {ami.architecture}"),
        *(("tag", f"{key} = {value}") for key, value in sorted(ami.tags.items())),
        ("by build", build["id"]),
    ]


def container(settings: Settings) -> int:
    """The same scripts for real, as a container image; returns the exit code."""
    from cli.container_demo import container_demo  # noqa: PLC0415  it needs a Docker engine, the demo above does not

    home: Path = settings.home_dir / "demo"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    return container_demo(home, PROVIDER)
