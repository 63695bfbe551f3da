"""boto3's clients: one of a kind for each service and region, made once, with bounded patience."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, TypeVar

import boto3.session
import botocore.session
from botocore.config import Config

if TYPE_CHECKING:
    from mypy_boto3_ec2 import EC2Client
    from mypy_boto3_sts import STSClient

Client = TypeVar("Client")

SIMULATED_CREDENTIAL: Final = "testing"
_CONNECT_TIMEOUT: Final = timedelta(seconds=5)
_POOLED_CONNECTIONS: Final = 32
_USER_AGENT: Final = "kiln"


class Ec2Clients:
    """Hands out clients of EC2 and STS, which any number of threads may share.

    With `endpoint_url`, both services are there, under made-up credentials; nothing of the environment or of AWS's
    files is read. Without, boto3's usual chain of credentials decides. `call_timeout` bounds one attempt.
    """

    def __init__(self, *, endpoint_url: str | None, call_timeout: timedelta, attempts: int) -> None:
        self._endpoint_url = endpoint_url
        self._config = _patience(call_timeout, attempts)
        if endpoint_url:
            # The simulated endpoint is next door: a proxy that the environment names is not on the way.
            self._config = self._config.merge(Config(proxies={}))
        # Making a session or a client is not thread-safe; using a client is.
        self._making = Lock()
        self._session: boto3.session.Session | None = None
        self._ec2: dict[str, EC2Client] = {}
        self._sts: dict[str, STSClient] = {}

    def ec2(self, region: str) -> EC2Client:
        """EC2's client; the process's first loads EC2's model, some 0.2 s of processor time."""
        return self._kept(self._ec2, region, lambda session: session.client("ec2", **self._options(region)))

    def sts(self, region: str) -> STSClient:
        """STS's client."""
        return self._kept(self._sts, region, lambda session: session.client("sts", **self._options(region)))

    def close(self) -> None:
        """Closes the connections that are kept open."""
        with self._making:
            for client in (*self._ec2.values(), *self._sts.values()):
                client.close()
            self._ec2.clear()
            self._sts.clear()

    def _kept(self, clients: dict[str, Client], region: str, make: Callable[[boto3.session.Session], Client]) -> Client:
        with self._making:
            if region not in clients:
                self._session = self._session or self._new_session()
                clients[region] = make(self._session)
            return clients[region]

    def _options(self, region: str) -> dict[str, Any]:
        return {"region_name": region, "endpoint_url": self._endpoint_url, "config": self._config}

    def _new_session(self) -> boto3.session.Session:
        if not self._endpoint_url:
            return boto3.session.Session()
        return boto3.session.Session(
            aws_access_key_id=SIMULATED_CREDENTIAL,
            aws_secret_access_key=SIMULATED_CREDENTIAL,
            botocore_session=_deaf_session(),
        )


def _patience(call_timeout: timedelta, attempts: int) -> Config:
    seconds = call_timeout.total_seconds()
    return Config(
        connect_timeout=min(seconds, _CONNECT_TIMEOUT.total_seconds()),
        read_timeout=seconds,
        # Standard: backs off and retries RequestLimitExceeded, time-outs and 5xx, at most so many times.
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=_POOLED_CONNECTIONS,
        user_agent_extra=_USER_AGENT,
    )


def _deaf_session() -> botocore.session.Session:
    """A session whose settings come from no variable and no file: not a profile, a key, a region or an endpoint."""
    deaf = {
        name: (None, None, default, conversion)
        for name, (_, _, default, conversion) in botocore.session.Session.SESSION_VARIABLES.items()
    }
    for files in ("config_file", "credentials_file"):
        deaf[files] = (None, None, os.devnull, None)
    return botocore.session.Session(session_vars=deaf)
