"""The catalog behind `kiln.ports.pods.PodLedger`: each method is one transaction."""

import contextlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy.orm import Session

from kiln.catalog import pod_work, pods, runners
from kiln.catalog.pod_tables import Pod, Repository
from kiln.catalog.pods import open_secrets, pod_ref
from kiln.catalog.session import Catalog
from kiln.catalog.tables import Image
from kiln.errors import OperationFailedError, RefusedError
from kiln.models import PodRef, PodResult, PodSpec, PodStatus
from kiln.ports.pods import (
    GitSource,
    HostReport,
    ImageSource,
    Instructions,
    News,
    PodBrief,
    PodOrder,
    RunnerProcess,
)
from kiln.sealing import Sealer

RETENTION = timedelta(days=7)


class CatalogPodLedger:
    """`kiln.ports.pods.PodLedger` on a catalog. `lease` is how long a pod may go on without word of its runner,
    `retention` how long the sandbox of an agent that ended by itself stays."""

    def __init__(self, catalog: Catalog, sealer: Sealer, lease: timedelta, *, retention: timedelta = RETENTION) -> None:
        self._catalog = catalog
        self._sealer = sealer
        self._lease = lease
        self._retention = retention

    def claim_pod(self, ref: PodRef, run_id: str) -> PodSpec | None:
        with self._catalog.transaction() as tx:
            row = pod_work.claim(tx, ref, run_id)
            return None if row is None else PodSpec.model_validate(row.spec)

    def release_pod(self, ref: PodRef, run_id: str) -> bool:
        with self._catalog.transaction() as tx:
            return pod_work.release(tx, ref, run_id)

    def finish_pod(self, ref: PodRef, result: PodResult) -> PodStatus:
        with self._catalog.transaction() as tx:
            return PodStatus(pod_work.finish(tx, ref, result).status)

    def terminate_pod(self, ref: PodRef) -> None:
        with contextlib.suppress(RefusedError), self._catalog.transaction() as tx:
            pods.terminate(tx, ref.organization_id, ref.key)

    def add_prompt(self, ref: PodRef, text: str) -> int:
        with self._catalog.transaction() as tx:
            return pods.prompt(tx, ref.organization_id, ref.key, text)

    def open_pods(self, older_than: timedelta, *, unclaimed: bool = False) -> list[PodBrief]:
        with self._catalog.read() as session:
            return pod_work.open_briefs(session, older_than, unclaimed=unclaimed)

    def unsettled_pods(self, older_than: timedelta) -> list[PodBrief]:
        with self._catalog.read() as session:
            return [PodBrief(pod_ref(row), row.run_id) for row in pod_work.unsettled_rows(session, older_than)]

    def lapse_pods(self) -> list[PodRef]:
        with self._catalog.transaction() as tx:
            return [pod_ref(row) for row in pod_work.lapse(tx)]

    def register(self, runner_id: str, report: HostReport) -> None:
        with self._catalog.transaction() as tx:
            runners.register(tx, runner_id, report)

    def beat(self, process: RunnerProcess, keys: Sequence[str]) -> Instructions:
        with self._catalog.transaction() as tx:
            return pod_work.beat(tx, process, keys, self._lease, self._retention)

    def locate(self, process: RunnerProcess, key: str) -> PodRef:
        with self._catalog.read() as session:
            return pod_ref(pod_work.find(session, process, key))

    def begin(self, process: RunnerProcess, key: str, shim: str) -> PodOrder:
        with self._catalog.transaction() as tx:
            return self._order(tx, pod_work.begin(tx, process, key, shim, self._lease))

    def started(self, process: RunnerProcess, key: str, shim: str) -> None:
        with self._catalog.transaction() as tx:
            pod_work.started(tx, process, key, shim, self._lease)

    def news(self, process: RunnerProcess, after: Mapping[str, int]) -> News:
        """A runner asks every few moments: it is a read as long as there is nothing to note."""
        with self._catalog.read() as session:
            news, untaken = pod_work.news(session, process, after)
        if untaken:
            with self._catalog.transaction() as tx:
                pod_work.take_prompts(tx, untaken)
        return news

    def ended(self, process: RunnerProcess, key: str, shim: str, result: PodResult) -> PodStatus:
        with self._catalog.transaction() as tx:
            return PodStatus(pod_work.ended(tx, process, key, shim, result).status)

    def _order(self, tx: Session, row: Pod) -> PodOrder:
        spec = PodSpec.model_validate(row.spec)
        secrets = open_secrets(self._sealer, row.secrets)
        return PodOrder(
            pod_id=row.id,
            key=row.key,
            attempt=row.attempt,
            spec=spec,
            prompts=[prompt.text for prompt in pod_work.prompts_of(tx, row)],
            environment=secrets.environment,
            custom_args=secrets.custom_args,
            mcp_config=secrets.mcp_config,
            git=self._git(tx, spec),
            image=_image(tx, row),
            deadline_at=_deadline(spec),
        )

    def _git(self, tx: Session, spec: PodSpec) -> GitSource | None:
        if spec.repository_id is None:
            return None
        row = tx.get(Repository, spec.repository_id)
        if row is None:
            raise OperationFailedError(f"repository {spec.repository_id} is no more")
        credential = "" if row.sealed_credential is None else self._sealer.open_text(row.sealed_credential)
        return GitSource(row.id, row.url, spec.branch or row.default_branch, credential)


def _image(tx: Session, row: Pod) -> ImageSource | None:
    image = tx.get(Image, row.image_id) if row.image_id is not None else None
    return None if image is None else ImageSource(image.reference, image.account)


def _deadline(spec: PodSpec) -> datetime | None:
    """What a pod waited for its runner does not count."""
    if spec.timeout_minutes is None:
        return None
    return datetime.now(UTC) + timedelta(minutes=spec.timeout_minutes)
