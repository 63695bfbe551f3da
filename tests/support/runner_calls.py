"""A runner that talks to a served API, and the pods that it is to run."""

from typing import Any

import httpx

from kiln.adapters.runner_api import HttpRunnerApi
from kiln.models import PodRef
from support.api_server import RunningApi, plain_client
from support.pod_rows import add_pod, create_runner, report
from support.rows import add_organization

CALLS = "/api/v1/runner"
INCARNATION = "process-1"


class RunnerCaller:
    """A runner with its token; `calls` is its process, `http` sends what a test likes. Its organization is its own unless
    one is named."""

    def __init__(self, api: RunningApi, organization_id: str = "") -> None:
        self.api = api
        self.catalog = api.catalog
        self.organization_id = organization_id or add_organization(api.catalog)
        self.row, self.token = create_runner(api.catalog, self.organization_id)
        self.calls = self.process(INCARNATION)
        self.http = plain_client(api.url, Authorization=f"Bearer {self.token}")

    def process(self, incarnation: str) -> HttpRunnerApi:
        """A process of this runner, to be registered, and closed."""
        return HttpRunnerApi(self.api.url, self.token, incarnation)

    async def register(self, **changes: Any) -> None:
        await self.calls.register(report(INCARNATION, **changes))

    def add_pod(self, **changes: Any) -> PodRef:
        """A new pod for this runner."""
        return add_pod(self.catalog, self.organization_id, self.row.id, **changes)

    def post(self, call: str, **body: Any) -> httpx.Response:
        """A call of the registered process, with the fields that a test names."""
        return self.http.post(f"{CALLS}/{call}", json={"incarnation": INCARNATION, **body})

    async def aclose(self) -> None:
        await self.calls.aclose()
        self.http.close()
