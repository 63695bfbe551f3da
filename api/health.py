"""Is the process alive, are its parts, and what do they count: `/healthz`, `/readyz`, `/metrics`."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from datetime import timedelta

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from temporalio.service import RPCError

from api.deps import P, Parts
from api.errors import HEADERS, RETRY_AFTER_SECONDS, errors
from kiln.catalog import builds, workers
from kiln.errors import KilnError

PATIENCE = timedelta(seconds=2)
OK = "ok"
NEEDED = ("catalog", "temporal", "object_store", "logs")

log = logging.getLogger("kiln.api")
router = APIRouter(tags=["operations"])


class Health(BaseModel):
    status: str = Field(examples=["ok"])


class Readiness(BaseModel):
    """Each part by name: `ok`, or what is wrong with it."""

    status: str = Field(examples=["ready"], description="ready, or unavailable")
    ec2: str = Field(examples=["simulated"], description="simulated, or aws")
    parts: dict[str, str] = Field(
        examples=[{"catalog": "ok", "temporal": "ok", "object_store": "ok", "logs": "ok", "containers": "ok"}]
    )


@router.get("/healthz", summary="Is the process alive?", response_model=Health)
def healthz() -> dict[str, str]:
    return {"status": OK}


@router.get(
    "/readyz",
    summary="Do the parts answer?",
    response_model=Readiness,
    responses={503: {"model": Readiness, "description": "A part does not answer", "headers": HEADERS[503]}},
)
async def readyz(parts: P) -> JSONResponse:
    """503, with which is down, unless every part answers. `containers` says `off`, and why, where none are built; a
    registry that is away is named, but takes the other APIs along as little."""
    states = await asyncio.gather(
        _state(parts.catalog.ping),
        _temporal_state(parts),
        _state(parts.contexts.ping),
        _state(parts.logs.ping),
        _container_state(parts),
    )
    found = dict(zip((*NEEDED, "containers"), states, strict=True))
    # A server without its registry, or told to build no containers, is ready for everything else.
    ready = all(found[name] == OK for name in NEEDED)
    body = {"status": "ready" if ready else "unavailable", "ec2": parts.settings.ec2.value, "parts": found}
    return JSONResponse(body, 200 if ready else 503, headers={} if ready else {"Retry-After": str(RETRY_AFTER_SECONDS)})


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **errors(500, 503)},
)
def metrics(parts: P) -> Response:
    """Builds by kind and status, and slots by living worker role, counted at the time of asking."""
    registry = CollectorRegistry()
    registry.register(_CatalogCollector(parts))
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


async def _state(ping: Callable[[], None]) -> str:
    try:
        await asyncio.wait_for(run_in_threadpool(ping), PATIENCE.total_seconds())
    except KilnError as error:
        return str(error)
    except TimeoutError:
        return "does not answer"
    except Exception:
        log.exception("a part failed when it was asked")
        return "failed; the failure is in the server's log"
    return OK


async def _container_state(parts: Parts) -> str:
    if parts.containers.off:
        return f"off: {parts.containers.off}"
    return await _state(parts.containers.registry.ping)


async def _temporal_state(parts: Parts) -> str:
    try:
        check = parts.temporal.service_client.check_health(timeout=PATIENCE)
        serving = await asyncio.wait_for(check, PATIENCE.total_seconds())
    except (RPCError, RuntimeError, TimeoutError):
        return "does not answer"
    return OK if serving else "not serving"


class _CatalogCollector(Collector):
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def collect(self) -> Iterator[Metric]:
        with self._parts.catalog.read() as session:
            counts = builds.count_by_status(session)
            alive = workers.living(session)
        family = GaugeMetricFamily("kiln_builds", "Builds in the catalog", labels=["kind", "status"])
        for (kind, status), count in sorted(counts.items()):
            family.add_metric([kind, status], count)
        yield family
        slots = GaugeMetricFamily("kiln_worker_slots", "Build slots of living workers", labels=["worker", "role"])
        for worker in alive:
            slots.add_metric([worker.id, worker.role], worker.slots)
        yield slots
