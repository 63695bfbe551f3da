"""A small token server for a registry that takes Kiln's tokens: what each repository allows, a test decides."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit

from kiln.registry_tokens import Access, RegistryTokens
from support.registry import serving


@contextmanager
def token_realm(tokens: RegistryTokens, user: str, password: str, pushes: str, pulls: str) -> Iterator[str]:
    """The realm's URL. The one user may pull and push below the first prefix, and pull below the second."""
    basic = base64.b64encode(f"{user}:{password}".encode()).decode()

    class Realm(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers.get("Authorization") == f"Basic {basic}"
            scopes = parse_qs(urlsplit(self.path).query).get("scope", []) if known else []
            body = json.dumps({"token": tokens.issue(user, [_access(scope) for scope in scopes])}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.send_error(404)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
            pass

    def _access(scope: str) -> Access:
        repository = scope.split(":")[1]
        pull_and_push = ("pull", "push") if repository.startswith(pushes) else ()
        return Access(repository, pull_and_push or (("pull",) if repository.startswith(pulls) else ()))

    with serving(Realm) as host:
        yield f"http://{host}/token"
