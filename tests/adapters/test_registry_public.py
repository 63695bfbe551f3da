"""Other people's registries: read as anybody, and never a way into the private network."""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from kiln.adapters.registry_public import AnonymousRegistries, source_address_problem
from kiln.errors import SourceUnavailableError, UnavailableError
from kiln.registry_tokens import Access, RegistryTokens, make_key_file
from support.oci_images import Pusher, image, index
from support.ports import free_ports
from support.registry import running_registry, serving

PUBLIC_ADDRESS = "8.8.8.8"
MISSING = f"sha256:{'0' * 64}"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry that is open to all."""
    with running_registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


@contextmanager
def anonymous(*allowed: str, resolved: Collection[str] | None = None) -> Iterator[AnonymousRegistries]:
    """With the hosts that an operator added; `resolved` is what every name is made to resolve to."""
    lies = {} if resolved is None else {"resolve": lambda _: resolved}
    registries = AnonymousRegistries(allowed, **lies)
    yield registries
    registries.close()


def refusal(reference: str, *allowed: str, resolved: Collection[str] | None = None) -> str:
    """The words with which an image is refused for good."""
    with anonymous(*allowed, resolved=resolved) as registries, pytest.raises(SourceUnavailableError) as caught:
        registries.facts(reference)
    return str(caught.value)


@contextmanager
def answering(status: int, headers: dict[str, str], body: bytes = b"") -> Iterator[str]:
    """The host of a server that has one answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
            pass

    with serving(Handler) as host:
        yield host


@contextmanager
def token_service(key_file: Path) -> Iterator[str]:
    """The host of a service that gives anybody a token to pull what starts with `open/`."""
    tokens = RegistryTokens(key_file)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            repository = parse_qs(urlsplit(self.path).query)["scope"][0].split(":")[1]
            access = [Access(repository, ("pull",))] if repository.startswith("open/") else []
            body = json.dumps({"token": tokens.issue("anybody", access)}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
            pass

    with serving(Handler) as host:
        yield host


def test_an_open_registry_is_read(host: str) -> None:
    """Digest, platforms and size of an index, by tag and by digest."""
    pusher = Pusher(host)
    made = pusher.push("open/app", index(image("a"), image("b", "linux/arm64")), "v1")
    pusher.close()
    with anonymous(host) as registries:
        facts = registries.facts(f"{host}/open/app:v1")
        assert registries.facts(f"{host}/open/app@{made.digest}") == facts
    assert (facts.digest, facts.platforms) == (made.digest, ("linux/amd64", "linux/arm64"))
    assert facts.size_bytes == sum(child.size_bytes for child in made.children)


def test_a_registry_that_wants_a_token_gets_one(tmp_path: Path) -> None:
    """The registry names its token service, which gives tokens to anybody; what they do not open is not there."""
    make_key_file(tmp_path / "token.pem")
    with (
        token_service(tmp_path / "token.pem") as realm,
        running_registry(tmp_path, tmp_path / "token.pem", f"http://{realm}/token") as host,
        anonymous(host, realm) as registries,
    ):
        pusher = Pusher(host, RegistryTokens(tmp_path / "token.pem"))
        made = pusher.push("open/app", image("open"), "v1")
        pusher.push("closed/app", image("closed"), "v1")
        pusher.close()
        assert registries.facts(f"{host}/open/app:v1").digest == made.digest
        with pytest.raises(SourceUnavailableError, match="does not exist, or is not public"):
            registries.facts(f"{host}/closed/app:v1")


@pytest.mark.parametrize("rest", ["open/nothing:v1", f"open/nothing@{MISSING}"])
def test_what_is_not_there_is_unavailable(host: str, rest: str) -> None:
    """Asking again would not help."""
    with anonymous(host) as registries, pytest.raises(SourceUnavailableError, match="does not exist"):
        registries.facts(f"{host}/{rest}")


def test_a_registry_that_is_down_is_an_outage() -> None:
    """Asking again may help."""
    host = f"127.0.0.1:{free_ports(1)[0]}"
    with anonymous(host) as registries, pytest.raises(UnavailableError, match="does not answer"):
        registries.facts(f"{host}/app:v1")


@pytest.mark.parametrize(
    ("status", "headers", "error"),
    [
        (500, {}, UnavailableError),
        (429, {}, UnavailableError),
        (403, {}, SourceUnavailableError),
        (401, {"WWW-Authenticate": 'Basic realm="x"'}, SourceUnavailableError),
        (302, {"Location": "/again"}, SourceUnavailableError),
        (200, {"Content-Type": "text/html"}, SourceUnavailableError),
    ],
)
def test_odd_answers_have_their_error(status: int, headers: dict[str, str], error: type[Exception]) -> None:
    """A registry that fails or limits may be asked again; one that refuses, or is none, not."""
    with answering(status, headers) as host, anonymous(host) as registries, pytest.raises(error):
        registries.facts(f"{host}/app:v1")


def test_an_endless_manifest_is_not_read_to_its_end() -> None:
    """What Kiln reads of another's registry is bounded."""
    with answering(200, {}, b" " * 5_000_000) as host:
        assert "more than 4194304 bytes" in refusal(f"{host}/app:v1", host)


def test_another_manifest_than_the_digest_says_is_refused() -> None:
    """The registry is not believed."""
    made = image("other")
    with answering(200, {"Content-Type": made.media_type}, made.content) as host:
        assert "not what its digest says" in refusal(f"{host}/app@{MISSING}", host)


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "[::1]", "127.1", "0x7f000001", "2130706433"])
def test_a_redirect_into_the_private_network_is_not_followed(host: str, name: str) -> None:
    """However the address is written, only what the operator added may be private."""
    place = f"{name}:{host.rpartition(':')[2]}"
    with answering(307, {"Location": f"http://{place}/v2/open/app/manifests/v1"}) as foreign:
        assert refusal(f"{foreign}/open/app:v1", foreign).endswith(f"leads to {place}, which is a private address")


def test_a_token_service_in_the_private_network_is_not_asked(host: str) -> None:
    """A registry that names one is refused."""
    challenge = {"WWW-Authenticate": f'Bearer realm="http://{host}/token",service="x"'}
    with answering(401, challenge) as foreign:
        assert f"leads to {host}, which is a private address" in refusal(f"{foreign}/open/app:v1", foreign)


def test_a_name_that_moves_into_the_private_network_is_not_connected_to(host: str) -> None:
    """The name resolved to a public address when it was looked up; the connection goes to a private one."""
    reference = f"127.1:{host.rpartition(':')[2]}/open/app:v1"
    assert "leads to 127.1, which is a private address" in refusal(reference, resolved=[PUBLIC_ADDRESS])


def test_nothing_is_asked_without_tls_beyond_what_is_allowed() -> None:
    """A public address is asked by TLS only."""
    with answering(307, {"Location": "http://registry.example/v2/"}) as foreign:
        assert "without TLS" in refusal(f"{foreign}/open/app:v1", foreign, resolved=[PUBLIC_ADDRESS])


@pytest.mark.parametrize(
    "host", ["docker.io", "ghcr.io", "quay.io", "public.ecr.aws", "registry.k8s.io", "mcr.microsoft.com"]
)
@pytest.mark.parametrize("addresses", [[PUBLIC_ADDRESS], ["2606:4700::1111"], []])
def test_the_usual_registries_are_allowed(host: str, addresses: list[str]) -> None:
    """Also while their name does not resolve: the build will say so."""
    assert source_address_problem(host, [], lambda _: addresses) is None


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "fe80::1",
        "fd00:ec2::254",
        "fec0::1",
        "::ffff:10.0.0.1",
        "64:ff9b::a00:1",
        "2002:a00:1::",
    ],
)
def test_a_usual_name_at_a_private_address_is_refused(address: str) -> None:
    """One private address among public ones is enough."""
    assert source_address_problem("ghcr.io", [], lambda _: [PUBLIC_ADDRESS, address]) is not None


@pytest.mark.parametrize(
    "host", ["example.com", "ghcr.io:443", "evil.ghcr.io", "10.0.0.1", "8.8.8.8:5000", "[::1]:5000", "localhost"]
)
def test_any_other_host_is_refused(host: str) -> None:
    """By whatever name or address, unless the operator added just that."""
    assert source_address_problem(host, ["registry.acme.test"], lambda _: [PUBLIC_ADDRESS]) is not None


@pytest.mark.parametrize("host", ["registry.acme.test:5000", "127.0.0.1:5000", "localhost:5000"])
def test_a_host_that_the_operator_added_may_be_anywhere(host: str) -> None:
    """Its name is not even looked up."""
    assert source_address_problem(host, [host.upper()], lambda _: ["10.0.0.1"]) is None
