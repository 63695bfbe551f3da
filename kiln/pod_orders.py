"""A pod's order as JSON: what Kiln's API answers to a runner, and how the runner reads it. It holds secrets in clear."""

from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from kiln.ports.pods import PodOrder

_ORDERS = TypeAdapter(PodOrder)


def write_order(order: PodOrder) -> bytes:
    """The order as JSON. Never log it."""
    return _ORDERS.dump_json(order)


def read_order(data: bytes) -> PodOrder:
    """The order again. Raises ValueError, whose text holds nothing of the data."""
    try:
        order = _ORDERS.validate_json(data)
    except ValidationError:
        order = None
    # Raised here rather than above: the validation's error quotes what it has read.
    if order is None:
        raise ValueError("not a pod's order")
    return replace(order, prompts=list(order.prompts), custom_args=tuple(order.custom_args))


def order_schema(ref_template: str) -> dict[str, Any]:
    """The JSON schema of an order; what it refers to stands below `$defs`."""
    return _ORDERS.json_schema(ref_template=ref_template, mode="serialization")
