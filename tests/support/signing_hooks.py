"""Has schemathesis sign its requests, the bytes as they go out: `SCHEMATHESIS_HOOKS=support.signing_hooks`, with the key
in `KEY` and its secret in `SECRET`."""

import os
from urllib.parse import urlsplit

import schemathesis
from requests import PreparedRequest
from requests.auth import AuthBase

from support.signing import SignedClient


class Signature(AuthBase):
    """Signs a request that is ready to be sent."""

    def __init__(self) -> None:
        self._client = SignedClient("", os.environ["KEY"], os.environ["SECRET"])

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        body = request.body or b""
        sent = body.encode() if isinstance(body, str) else bytes(body)
        path = urlsplit(str(request.url)).path
        request.headers["Authorization"] = self._client.authorize(str(request.method), path, sent)
        return request


schemathesis.auth.set_from_requests(Signature())
