"""What each role of a worker serves: its queues, its activities, and the adapters that they need."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

from temporalio.client import Client
from temporalio.worker import Worker

from activities.agent_attempt import AgentParts
from activities.attempt import AttemptTerms
from activities.cleanup import CleanupActivities
from activities.container_attempt import ContainerParts, TransferParts
from activities.containers import ContainerActivities, TransferActivities
from activities.context import ContextActivities
from activities.deletion import DeletionActivities
from activities.house import HouseActivities
from activities.interceptor import ErrorInterceptor
from activities.machine_house import MachineHouse
from activities.machines import MachineActivities, MachineParts
from activities.packer import PackerActivities
from activities.packer_attempt import PackerParts, PackerTerms
from activities.pod_house import PodHouse
from activities.pod_record import PodRecord
from activities.publication import PublicationActivities
from activities.record import RecordActivities
from activities.snapshot import SnapshotActivities, SnapshotParts
from activities.verify import VerifyActivities
from kiln.adapters.agent_images import AgentImagePlace, AgentImageRuns
from kiln.adapters.buildx import BuildxPlace, BuildxRuns, buildx_program
from kiln.adapters.engines import Engines
from kiln.adapters.packer import PackerPlace, PackerRuns
from kiln.adapters.skopeo import SkopeoPlace, SkopeoRuns
from kiln.adapters.templates import Templates
from kiln.adapters.toolbox import GuardedToolbox
from kiln.errors import ToolMissingError
from kiln.naming import CONTROL_QUEUE, MACHINES_QUEUE, PACKER_QUEUE, TRANSFER_QUEUE, container_queue
from kiln.ports import Order, Placement
from kiln.settings import PROJECT_ROOT, Settings, SettingsError
from worker_adapters import Adapters
from workflows.runner import WORKFLOWS, workflow_runner

ROLES = ("control", "packer", "container", "transfer")
CONTROL_SLOTS = 20
# Images and launches of machines are waited for, not computed.
MACHINE_SLOTS = 200
# A cancel reaches an activity with the answer to a heartbeat: the SDK may hold those back for so long, no longer.
HEARTBEAT_THROTTLE = timedelta(seconds=1)
# Builds outlast any shutdown: they are interrupted soon, and taken up by another worker.
GRACEFUL_SHUTDOWN = timedelta(seconds=1)
# A build's credential outlives its longest attempt; what it opens closes with the build anyway.
CREDENTIAL_MARGIN = timedelta(hours=1)


def usual_roles(settings: Settings) -> list[str]:
    """What a worker serves that was told no roles: container images only where an engine is named."""
    containers = ["container", "transfer"] if settings.containers and engine_hosts(settings) else []
    return ["control", "packer", *containers]


def engine_hosts(settings: Settings) -> tuple[str, ...]:
    """The Docker engines of this host's builders: KILN_ENGINE_HOSTS, or else DOCKER_HOST."""
    return settings.engine_hosts or tuple(filter(None, [os.environ.get("DOCKER_HOST")]))


def workers_of(role: str, adapters: Adapters, client: Client, pool: ThreadPoolExecutor) -> list[Worker]:
    """The Temporal workers of a role. Raises ToolMissingError."""
    match role:
        case "control":
            return [control_worker(adapters, client, pool), machine_worker(adapters, client)]
        case "packer":
            return [packer_worker(adapters, client)]
        case "container":
            return container_workers(adapters, client)
        case _:
            return [transfer_worker(adapters, client)]


def queues_of(role: str, settings: Settings) -> tuple[str, ...]:
    """The task queues that a role serves."""
    match role:
        case "control":
            return (CONTROL_QUEUE, MACHINES_QUEUE)
        case "packer":
            return (PACKER_QUEUE,)
        case "container":
            return tuple(container_queue(platform) for platform in settings.builder_platforms)
        case _:
            return (TRANSFER_QUEUE,)


def slots_of(role: str, settings: Settings) -> int:
    """How many builds a role takes at once."""
    slots = {
        "packer": settings.packer_slots,
        "container": settings.container_slots,
        "transfer": settings.transfer_slots,
    }
    return slots.get(role, 0)


def control_worker(adapters: Adapters, client: Client, pool: ThreadPoolExecutor) -> Worker:
    """Workflows, and the light activities: catalog, EC2, registry and object store."""
    return Worker(
        client,
        task_queue=CONTROL_QUEUE,
        workflows=WORKFLOWS,
        activities=_light_activities(adapters, client),
        activity_executor=pool,
        max_concurrent_activities=CONTROL_SLOTS,
        workflow_runner=workflow_runner(),
        interceptors=[ErrorInterceptor()],
        graceful_shutdown_timeout=GRACEFUL_SHUTDOWN,
        max_heartbeat_throttle_interval=HEARTBEAT_THROTTLE,
    )


def _light_activities(adapters: Adapters, client: Client) -> list[Callable[..., Any]]:
    ledger, cloud, logs = adapters.ledger, adapters.cloud, adapters.logs
    record, verify = RecordActivities(ledger, logs), VerifyActivities(ledger, cloud)
    cleanup = CleanupActivities(ledger, cloud, logs, adapters.settings.settle)
    publication = PublicationActivities(ledger, adapters.registry, adapters.contexts, logs)
    house = HouseActivities(
        ledger=ledger,
        cloud=cloud,
        client=client,
        regions=adapters.settings.regions,
        contexts=adapters.contexts,
        sweep_grace=timedelta(seconds=adapters.settings.sweep_grace_seconds),
    )
    machine_house = MachineHouse(
        ledger=adapters.machines,
        cloud=cloud,
        client=client,
        regions=adapters.settings.regions,
        settle=adapters.settings.settle,
        grace=timedelta(seconds=adapters.settings.sweep_grace_seconds),
    )
    pods = PodRecord(adapters.pods, logs)
    return [
        pods.claim,
        pods.prompt,
        pods.terminate,
        pods.record_end,
        PodHouse(adapters.pods, logs, client).look_after,
        machine_house.observe,
        machine_house.find_lost_operations,
        machine_house.end_retired,
        machine_house.sweep,
        record.claim,
        record.note_cancel,
        record.record_end,
        verify.publish,
        cleanup.clean_up,
        DeletionActivities(ledger, cloud).delete,
        ContextActivities(ledger, adapters.contexts).accept,
        publication.publish,
        publication.clean_up,
        house.find_lost_builds,
        house.observe_images,
        house.sweep,
    ]


def machine_worker(adapters: Adapters, client: Client) -> Worker:
    """What EC2 does to machines, and images of them."""
    settings = adapters.settings
    steps = MachineActivities(
        MachineParts(
            ledger=adapters.machines,
            cloud=adapters.cloud,
            shelf=adapters.shelf,
            capacity_delay=timedelta(seconds=settings.capacity_delay_seconds),
            placement=_machine_placement(settings),
            settle=settings.settle,
        )
    )
    grace = timedelta(seconds=settings.cancel_grace_seconds)
    snapshots = SnapshotActivities(
        SnapshotParts(
            ledger=adapters.ledger,
            logs=adapters.logs,
            terms=AttemptTerms(limit=settings.snapshot_timeout, lease=settings.lease, grace=grace),
            holder=adapters.name,
            client=client,
            cloud=adapters.cloud,
            machines=adapters.cloud,
            name_prefix=settings.ami_name_prefix,
            settle=settings.settle,
        )
    )
    return Worker(
        client,
        task_queue=MACHINES_QUEUE,
        activities=[
            steps.claim,
            steps.find_source,
            steps.launch,
            steps.adopt,
            steps.power,
            steps.abandon,
            steps.end_retired,
            snapshots.build,
        ],
        max_concurrent_activities=MACHINE_SLOTS,
        interceptors=[ErrorInterceptor()],
        graceful_shutdown_timeout=GRACEFUL_SHUTDOWN,
        max_heartbeat_throttle_interval=HEARTBEAT_THROTTLE,
    )


def _machine_placement(settings: Settings) -> Placement:
    return Placement(
        subnet_id=settings.machine_subnet_id,
        security_group_ids=settings.machine_security_groups,
        key_name=settings.machine_key_name,
        instance_profile_arn=settings.machine_instance_profile,
    )


def packer_worker(adapters: Adapters, client: Client) -> Worker:
    """Packer builds, as many at once as there are slots."""
    settings = adapters.settings
    _require_program(settings.packer, "KILN_PACKER", "packer")
    parts = PackerParts(
        ledger=adapters.ledger,
        cloud=adapters.cloud,
        logs=adapters.logs,
        tools=GuardedToolbox(),
        kit=PackerRuns(_packer_place(adapters), Templates(PROJECT_ROOT / "packer", settings.template_dir)),
        terms=PackerTerms(
            limit=settings.packer_timeout,
            lease=settings.lease,
            grace=timedelta(seconds=settings.cancel_grace_seconds),
            capacity_delay=timedelta(seconds=settings.capacity_delay_seconds),
        ),
        holder=adapters.name,
        client=client,
    )
    return _builder(client, PACKER_QUEUE, PackerActivities(parts).build, settings.packer_slots)


def container_workers(adapters: Adapters, client: Client) -> list[Worker]:
    """Builds from Dockerfiles and the agents' template: one worker for the queue of each platform, which share the
    engines."""
    settings = adapters.settings
    hosts = engine_hosts(settings)
    if not hosts:
        raise SettingsError("KILN_ENGINE_HOSTS: names no Docker engine for the role container")
    program = buildx_program(settings.buildx)
    _require_program(program[0], "KILN_BUILDX", "docker.io")
    place = BuildxPlace(
        program=program,
        work_dir=settings.runs_dir,
        registry_host=settings.registry_host,
        builder=settings.builder,
        registry_cache=settings.registry_cache,
    )
    engines = Engines(hosts, settings.container_slots, locks=settings.home_dir / "engines")
    kit = BuildxRuns(place, _credential(adapters))
    parts = ContainerParts(**_registry_parts(adapters, client), engines=engines, contexts=adapters.contexts, kit=kit)
    build = ContainerActivities(parts, _agent_parts(adapters, client, engines)).build
    return [_builder(client, queue, build, settings.container_slots) for queue in queues_of("container", settings)]


def _agent_parts(adapters: Adapters, client: Client, engines: Engines) -> AgentParts:
    """Without Packer on this host, a build that needs it says so."""
    settings = adapters.settings
    place = AgentImagePlace(
        program=settings.packer,
        template_dir=PROJECT_ROOT / "packer",
        work_dir=settings.runs_dir,
        registry_host=settings.registry_host,
        ca_bundle=settings.ca_bundle,
    )
    kit = AgentImageRuns(place, _credential(adapters))
    return AgentParts(**_registry_parts(adapters, client), engines=engines, public=adapters.public, kit=kit)


def transfer_worker(adapters: Adapters, client: Client) -> Worker:
    """Transfers, as many at once as there are slots."""
    settings = adapters.settings
    _require_program(settings.skopeo, "KILN_SKOPEO", "skopeo")
    place = SkopeoPlace(program=settings.skopeo, work_dir=settings.runs_dir, registry_host=settings.registry_host)
    kit = SkopeoRuns(place, _credential(adapters))
    parts = TransferParts(**_registry_parts(adapters, client), public=adapters.public, kit=kit)
    return _builder(client, TRANSFER_QUEUE, TransferActivities(parts).transfer, settings.transfer_slots)


def _builder(client: Client, queue: str, build: Callable[..., Any], slots: int) -> Worker:
    return Worker(
        client,
        task_queue=queue,
        activities=[build],
        max_concurrent_activities=slots,
        # A worker that freezes keeps its open polls, and each of them swallows an attempt until its heartbeat is missed.
        max_concurrent_activity_task_polls=1,
        interceptors=[ErrorInterceptor()],
        graceful_shutdown_timeout=GRACEFUL_SHUTDOWN,
        max_heartbeat_throttle_interval=HEARTBEAT_THROTTLE,
    )


def _registry_parts(adapters: Adapters, client: Client) -> dict[str, Any]:
    """What every attempt has that pushes to the registry."""
    settings = adapters.settings
    grace = timedelta(seconds=settings.cancel_grace_seconds)
    return {
        "ledger": adapters.ledger,
        "logs": adapters.logs,
        "tools": GuardedToolbox(),
        "terms": AttemptTerms(limit=settings.container_timeout, lease=settings.lease, grace=grace),
        "holder": adapters.name,
        "client": client,
        "registry": adapters.registry,
    }


def _credential(adapters: Adapters) -> Callable[[Order], str]:
    lifetime = adapters.settings.container_timeout + CREDENTIAL_MARGIN

    def issue(order: Order) -> str:
        return adapters.credentials.issue(order.build_id, order.organization_id, datetime.now(UTC) + lifetime)

    return issue


def _require_program(program: str, setting: str, package: str) -> None:
    if shutil.which(program) is None:
        raise ToolMissingError(f"{program} is not installed: apt-get install {package}, or set {setting}")


def _packer_place(adapters: Adapters) -> PackerPlace:
    settings = adapters.settings
    return PackerPlace(
        program=settings.packer,
        work_dir=settings.runs_dir,
        installation=adapters.ledger.installation,
        ec2_url=settings.ec2_url,
        name_prefix=settings.ami_name_prefix,
        subnet_id=settings.subnet_id,
        iam_instance_profile=settings.iam_instance_profile,
        communicator=settings.communicator,
        ssh_cidr=settings.ssh_cidr,
        ca_bundle=settings.ca_bundle,
    )
