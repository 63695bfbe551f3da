"""A pod's order on its way to its runner: nothing of it is lost, and nothing of it is told in an error."""

from datetime import UTC, datetime

import pytest

from kiln.models import AgentType, PodLimits, PodSpec, SandboxType
from kiln.pod_orders import read_order, write_order
from kiln.ports.pods import GitSource, ImageSource, PodOrder

SPEC = PodSpec(
    agent_type=AgentType.AIDER,
    sandbox_type=SandboxType.CONTAINER,
    environment_names=("TOKEN",),
    timeout_minutes=5,
    limits=PodLimits(memory_mb=64),
)
ORDERS = [
    PodOrder(pod_id="an-id", key="pod-k3v9m2x7q1zt", attempt=1, spec=PodSpec(), prompts=[], environment={}),
    PodOrder(
        pod_id="an-id",
        key="pod-k3v9m2x7q1zt",
        attempt=2,
        spec=SPEC,
        prompts=["hello\nworld", "ü\0"],
        environment={"TOKEN": "hush"},
        custom_args=("--loud", ""),
        mcp_config={"servers": {"one": {"args": [1, None, True, 0.5]}}},
        git=GitSource(7, "https://host/x", "main", "hush"),
        image=ImageSource("host:5000/acme/app@sha256:1", "host:5000", "hush"),
        deadline_at=datetime(2026, 3, 25, 12, 0, 0, 123456, tzinfo=UTC),
    ),
]


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_arrives_as_it_was_sent(order: PodOrder) -> None:
    """What is read is what was written, secrets and all."""
    assert read_order(write_order(order)) == order


@pytest.mark.parametrize(
    "change",
    [(b'"attempt":2', b'"attempt":"hush"'), (b"hush", b"hush\xff"), (b'"environment"', b'"else"'), (b"}", b"")],
)
def test_what_is_no_order_is_not_quoted(change: tuple[bytes, bytes]) -> None:
    """The error of an order that cannot be read names nothing that stands in it."""
    with pytest.raises(ValueError, match=r"^not a pod's order$") as refusal:
        read_order(write_order(ORDERS[1]).replace(*change))
    assert (refusal.value.__cause__, refusal.value.__context__) == (None, None)
