"""The connection to Temporal, read as every Temporal program reads it (`temporalio.envconfig`), and its set-up."""

import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from temporalio.api.enums.v1 import IndexedValueType
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest, ListSearchAttributesRequest
from temporalio.client import Client
from temporalio.common import SearchAttributeKey
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.envconfig import ClientConfig
from temporalio.service import RPCError

from kiln.errors import UnavailableError
from kiln.settings import Settings

CONNECT_TIMEOUT = timedelta(seconds=5)
log = logging.getLogger("kiln.temporal")


def connection(settings: Settings) -> dict[str, Any]:
    """Arguments of `Client.connect`: TEMPORAL_* and Temporal's own file, else the embedded server's port."""
    config: dict[str, Any] = dict(ClientConfig.load_client_connect_config())
    config.setdefault("target_host", f"127.0.0.1:{settings.temporal_port}")
    return {**config, "data_converter": pydantic_data_converter}


async def lazy_client(settings: Settings) -> Client:
    """A client that connects at its first call, so that the API runs while Temporal does not."""
    return await Client.connect(**connection(settings), lazy=True)


async def connected_client(settings: Settings, identity: str) -> Client:
    """A client that is connected, as workers need it.

    Raises UnavailableError with a line that names the address and its setting.
    """
    config = connection(settings)
    try:
        return await Client.connect(**config, identity=identity, connect_timeout=CONNECT_TIMEOUT)
    except (RPCError, RuntimeError):
        raise UnavailableError(
            f"Temporal does not answer at {config['target_host']} (TEMPORAL_ADDRESS, or KILN_TEMPORAL_PORT)"
        ) from None


async def register_search_attributes(client: Client, keys: Sequence[SearchAttributeKey[str]]) -> None:
    """Adds Kiln's search attributes to the namespace where they are missing.

    Temporal Cloud lets no client do that: there, they are made once by hand, and this only says so.
    """
    try:
        known = await client.operator_service.list_search_attributes(
            ListSearchAttributesRequest(namespace=client.namespace)
        )
        missing = {key.name: IndexedValueType.INDEXED_VALUE_TYPE_KEYWORD for key in keys}
        for name in known.custom_attributes:
            missing.pop(name, None)
        if missing:
            await client.operator_service.add_search_attributes(
                AddSearchAttributesRequest(namespace=client.namespace, search_attributes=missing)
            )
    except RPCError as error:
        names = ", ".join(key.name for key in keys)
        log.warning("search attributes (%s) could not be registered, make them by hand: %s", names, error)
