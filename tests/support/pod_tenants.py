"""An organization that has agents at work, and the runner that a test gives it."""

import uuid
from typing import Any

import httpx

from kiln.catalog import repositories
from kiln.catalog.tables import Organization
from kiln.models import PodRef, PodResult, PodSpec
from kiln.ports.pods import RunnerProcess
from support.api_server import RunningApi, plain_client
from support.containers import Owner
from support.pod_rows import add_pod, add_runner

EXT = "/api/v1/ext/orgs"


class PodTenant(Owner):
    """An organization with an admin's key; `base` is where its pods and runners are."""

    def __init__(self, api: RunningApi) -> None:
        super().__init__(api)
        self.base = f"{EXT}/{self.slug}"
        self.http.headers["X-API-Key"] = self.key
        del self.http.headers["Authorization"]

    def client(self, *scopes: str) -> httpx.Client:
        """A client with a key of these scopes."""
        return plain_client(self.api.url, **{"X-API-Key": self.new_key(*scopes)})

    def runner(self, **changes: Any) -> RunnerProcess:
        """A runner that is there."""
        return add_runner(self.catalog, self.organization_id, **changes)

    def repository(self, name: str = "app") -> int:
        with self.catalog.transaction() as tx:
            organization = tx.get_one(Organization, self.organization_id)
            return repositories.add(tx, organization, name, "https://git.test/app.git", "main").id

    def pod(self, runner: RunnerProcess, spec: PodSpec | None = None, **changes: Any) -> PodRef:
        """A pod that Temporal does not know of."""
        return add_pod(self.catalog, self.organization_id, runner.runner_id, spec=spec, **changes)

    def start(self, runner: RunnerProcess, ref: PodRef) -> None:
        """What its runner says of a pod until its agent runs."""
        shim = str(uuid.uuid4())
        self.api.parts.pods.begin(runner, ref.key, shim)
        self.api.parts.pods.started(runner, ref.key, shim)

    def finish(self, ref: PodRef, result: PodResult) -> None:
        """What the pod's workflow writes at its end."""
        self.api.parts.pods.finish_pod(ref, result)

    def post(self, path: str = "/pods", body: Any = None, **headers: str) -> httpx.Response:  # type: ignore[override]
        """POST below the organization; header names with underscores for hyphens."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.http.post(self.base + path, json={} if body is None else body, headers=sent)

    def created(self, runner: RunnerProcess, **fields: Any) -> dict[str, Any]:
        """The P of a new pod."""
        answer = self.post(body={"runner_id": runner.runner_id, **fields})
        assert answer.status_code == 201, answer.text
        assert list(answer.json()) == ["pod"]
        pod: dict[str, Any] = answer.json()["pod"]
        return pod

    def get(self, path: str, **query: Any) -> Any:
        answer = self.http.get(self.base + path, params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()


def pod_refusal(answer: httpx.Response) -> tuple[int, str, str]:
    """Status, code and message of an error in the shape of pods, and in no other."""
    body = answer.json()
    assert set(body) - {"required_scopes"} == {"error", "code"}, answer.text
    assert isinstance(body["error"], str), answer.text
    return answer.status_code, body["code"], body["error"]
