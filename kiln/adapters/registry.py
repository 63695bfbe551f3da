"""Kiln's own registry. Kiln signs its tokens itself, so a call is one request.

Protocol: https://github.com/opencontainers/distribution-spec; tried with Docker's registry 2.8, which deletes digests only.
"""

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from http import HTTPStatus
from typing import Any, Final

import httpx

from kiln.adapters import registry_manifests as manifests
from kiln.adapters.registry_http import (
    ANSWER_SECONDS,
    CHUNK_BYTES,
    CONNECT_SECONDS,
    base_url,
    blob_path,
    is_loopback,
    manifest_path,
    read_bounded,
    tags_path,
    uploads_path,
)
from kiln.errors import SourceUnavailableError, UnavailableError
from kiln.ports import ImageFacts, Manifest
from kiln.registry_tokens import TOKEN_LIFETIME, Access, RegistryTokens

SUBJECT: Final = "kiln"
# A registry reads an uploaded blob once more before it answers.
UPLOAD_SECONDS: Final = 300.0
TOKEN_MARGIN: Final = timedelta(minutes=1)
TAGS_PAGE: Final = 1000
TOMBSTONE_TYPE: Final = "application/vnd.kiln.untagged.v1+json"

_TAG_NOT_DELETABLE: Final = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.METHOD_NOT_ALLOWED})


class KilnRegistry:
    """Implements the port `Registry`. For any number of threads.

    Speaks plain HTTP on loopback, and elsewhere only if `insecure`. Also raises UnavailableError where the registry
    takes no tokens of Kiln's or deletes nothing.
    """

    def __init__(self, host: str, tokens: RegistryTokens, *, insecure: bool = False) -> None:
        self.host = host
        self._tokens = _TokenCache(tokens)
        url = base_url(host, insecure=insecure)
        self._http = httpx.Client(
            base_url=url,
            verify=url.startswith("https:"),  # reading certificates takes a while, and plain HTTP has none
            trust_env=not is_loopback(host),
            timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS),
            headers={"Accept-Encoding": "identity"},
        )

    def close(self) -> None:
        """Closes every pooled connection."""
        self._http.close()

    def ping(self) -> None:
        with self._call("GET", "/v2/") as answer:
            _expect(answer, HTTPStatus.OK)

    def manifest(self, repository: str, reference: str) -> Manifest | None:
        headers = {"Accept": manifests.ACCEPT}
        with self._call("GET", manifest_path(repository, reference), _pull(repository), headers=headers) as answer:
            if answer.status_code == HTTPStatus.NOT_FOUND:
                return None
            _expect(answer, HTTPStatus.OK)
            content = read_bounded(answer, manifests.MANIFEST_LIMIT_BYTES)
        digest = manifests.digest_of(content, reference if ":" in reference else "sha256:")
        return Manifest(digest, _media_type(answer), content)

    def facts(self, repository: str, reference: str) -> ImageFacts | None:
        root = self.manifest(repository, reference)
        if root is None:
            return None
        return manifests.image_facts(
            root, lambda digest: self._needed(repository, digest), lambda digest: self._config(repository, digest)
        )

    def copy(self, source: str, digest: str, target: str) -> None:
        if self._digest(target, digest) is not None:
            return
        root = self._needed(source, digest)
        for node in manifests.walk(root, lambda child: self._needed(source, child), attestations=True):
            for blob in {blob.digest: blob for blob in node.parts.blobs if not blob.is_foreign}:
                self._copy_blob(source, blob, target)
            self._put_manifest(target, node.manifest, node.manifest.digest)

    def tag(self, repository: str, digest: str, tag: str) -> None:
        if self._digest(repository, tag) != digest:
            self._put_manifest(repository, self._needed(repository, digest), tag)

    def untag(self, repository: str, tag: str) -> None:
        """A tag that somebody sets at the same moment may go, too. One that is only listed goes as any other."""
        if self._digest(repository, tag) is None and tag not in self.tags(repository):
            return
        with self._call("DELETE", manifest_path(repository, tag), _change(repository)) as answer:
            unsupported = answer.status_code in _TAG_NOT_DELETABLE
            if not unsupported:
                _expect(answer, HTTPStatus.ACCEPTED, HTTPStatus.NOT_FOUND)
        if unsupported:
            self._bury(repository, tag)

    def delete(self, repository: str, digest: str) -> None:
        with self._call("DELETE", manifest_path(repository, digest), _change(repository)) as answer:
            if answer.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
                raise UnavailableError("the registry does not allow deletion (REGISTRY_STORAGE_DELETE_ENABLED)")
            _expect(answer, HTTPStatus.ACCEPTED, HTTPStatus.NOT_FOUND)

    def tags(self, repository: str) -> list[str]:
        found: list[str] = []
        path: str | None = f"{tags_path(repository)}?n={TAGS_PAGE}"
        while path is not None:
            with self._call("GET", path, _pull(repository)) as answer:
                if answer.status_code == HTTPStatus.NOT_FOUND:
                    return found
                _expect(answer, HTTPStatus.OK)
                found += _tags(answer.read())
            path = _next_page(answer)
        return found

    def _digest(self, repository: str, reference: str) -> str | None:
        """What a tag or digest points at; None if there is no such manifest."""
        headers = {"Accept": manifests.ACCEPT}
        with self._call("HEAD", manifest_path(repository, reference), _pull(repository), headers=headers) as answer:
            if answer.status_code == HTTPStatus.NOT_FOUND:
                return None
            _expect(answer, HTTPStatus.OK)
            return str(answer.headers.get("Docker-Content-Digest", ""))

    def _needed(self, repository: str, digest: str) -> Manifest:
        found = self.manifest(repository, digest)
        if found is None:
            raise SourceUnavailableError(f"the registry has no {repository}@{digest}")
        if found.digest != digest:
            raise SourceUnavailableError(f"the registry's {repository}@{digest} is damaged")
        return found

    def _config(self, repository: str, digest: str) -> bytes:
        with self._call("GET", blob_path(repository, digest), _pull(repository), follow_redirects=True) as answer:
            _expect_source(answer, repository, digest)
            return read_bounded(answer, manifests.CONFIG_LIMIT_BYTES)

    def _put_manifest(self, repository: str, manifest: Manifest, reference: str) -> None:
        path, headers = manifest_path(repository, reference), {"Content-Type": manifest.media_type}
        with self._call("PUT", path, _push(repository), content=manifest.content, headers=headers) as answer:
            _expect(answer, HTTPStatus.CREATED)

    def _copy_blob(self, source: str, digest: str, target: str) -> None:
        """Mounts a blob; where the registry would rather have it uploaded, moves it."""
        access = (*_pull(source), *_push(target))
        asked = {"mount": digest, "from": source}
        with self._call("POST", uploads_path(target), access, params=asked) as answer:
            _expect(answer, HTTPStatus.CREATED, HTTPStatus.ACCEPTED)
        if answer.status_code == HTTPStatus.ACCEPTED:
            with self._call("GET", blob_path(source, digest), _pull(source), follow_redirects=True) as blob:
                if blob.status_code != HTTPStatus.OK:
                    self._abandon(target, _location(answer))
                _expect_source(blob, source, digest)
                length = {"Content-Length": blob.headers["Content-Length"]} if "Content-Length" in blob.headers else {}
                self._upload(target, _location(answer), digest, blob.iter_raw(CHUNK_BYTES), length)

    def _upload(
        self, repository: str, place: httpx.URL, digest: str, content: Any, headers: Mapping[str, str] | None = None
    ) -> None:
        """Ends an upload with all of its bytes at once."""
        url = place.copy_merge_params({"digest": digest})
        sent = {"Content-Type": "application/octet-stream", **(headers or {})}
        timeout = httpx.Timeout(UPLOAD_SECONDS, connect=CONNECT_SECONDS)
        with self._call("PUT", url, _push(repository), content=content, headers=sent, timeout=timeout) as answer:
            _expect(answer, HTTPStatus.CREATED)

    def _abandon(self, repository: str, place: httpx.URL) -> None:
        with contextlib.suppress(UnavailableError), self._call("DELETE", place, _push(repository)):
            pass

    def _bury(self, repository: str, tag: str) -> None:
        """Moves a tag to a manifest that is nothing but its grave, and deletes that digest: other tags stay.

        The grave is the same each time, so a call that was cut short leaves nothing that the next one does not delete.
        """
        config = json.dumps({"repository": repository, "untagged": tag}).encode()
        config_digest = manifests.digest_of(config)
        with self._call("POST", uploads_path(repository), _push(repository)) as answer:
            _expect(answer, HTTPStatus.ACCEPTED)
        self._upload(repository, _location(answer), config_digest, config)
        grave = _tombstone(config_digest, len(config))
        self._put_manifest(repository, grave, tag)
        self.delete(repository, grave.digest)

    @contextlib.contextmanager
    def _call(
        self, method: str, url: str | httpx.URL, access: tuple[Access, ...] = (), **options: Any
    ) -> Iterator[httpx.Response]:
        """One request; its body is read by the caller. Raises UnavailableError for all that no caller could mend."""
        follow = options.pop("follow_redirects", False)
        headers = {**options.pop("headers", {}), **self._authorization(url, access)}
        try:
            request = self._http.build_request(method, url, headers=headers, **options)
            answer = self._http.send(request, stream=True, follow_redirects=follow)
            with contextlib.closing(answer):
                _check(answer)
                yield answer
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise UnavailableError("the registry does not answer") from error

    def _authorization(self, url: str | httpx.URL, access: tuple[Access, ...]) -> dict[str, str]:
        """Kiln's token, unless the registry sends an upload to another host, whose URL then says enough."""
        if isinstance(url, httpx.URL) and url.netloc != self._http.base_url.netloc:
            return {}
        return {"Authorization": f"Bearer {self._tokens.get(access)}"}


class _TokenCache:
    """Tokens by what they allow, each used until shortly before its end."""

    def __init__(self, tokens: RegistryTokens) -> None:
        self._tokens = tokens
        self._lock = threading.Lock()
        self._known: dict[tuple[Access, ...], tuple[str, float]] = {}

    def get(self, access: tuple[Access, ...]) -> str:
        now = time.monotonic()
        with self._lock:
            token, until = self._known.get(access, ("", 0.0))
            if until > now:
                return token
            # Every build has a repository of its own: what is over goes.
            self._known = {key: known for key, known in self._known.items() if known[1] > now}
            token = self._tokens.issue(SUBJECT, access, TOKEN_LIFETIME)
            self._known[access] = (token, now + (TOKEN_LIFETIME - TOKEN_MARGIN).total_seconds())
            return token


def _pull(repository: str) -> tuple[Access, ...]:
    return (Access(repository, ("pull",)),)


def _push(repository: str) -> tuple[Access, ...]:
    return (Access(repository, ("pull", "push")),)


def _change(repository: str) -> tuple[Access, ...]:
    return (Access(repository, ("pull", "delete")),)


def _check(answer: httpx.Response) -> None:
    """Raises UnavailableError for what has nothing to do with what was asked for."""
    status = answer.status_code
    if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
        raise UnavailableError(f"the registry does not take Kiln's tokens (HTTP {status})")
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.TOO_MANY_REQUESTS:
        raise UnavailableError(f"the registry does not answer (HTTP {status})")


def _expect(answer: httpx.Response, *statuses: HTTPStatus) -> None:
    if answer.status_code not in statuses:
        method = answer.request.method
        raise UnavailableError(f"the registry refused a {method} request (HTTP {answer.status_code})")


def _expect_source(answer: httpx.Response, repository: str, digest: str) -> None:
    if answer.status_code == HTTPStatus.NOT_FOUND:
        raise SourceUnavailableError(f"the registry has no blob {digest} in {repository}")
    _expect(answer, HTTPStatus.OK)


def _media_type(answer: httpx.Response) -> str:
    return str(answer.headers.get("Content-Type", "")).partition(";")[0].strip()


def _location(answer: httpx.Response) -> httpx.URL:
    """Where an upload goes on; registries write it whole or as a path."""
    return answer.request.url.join(answer.headers.get("Location", ""))


def _tags(body: bytes) -> list[str]:
    try:
        return json.loads(body)["tags"] or []
    except (ValueError, KeyError, TypeError):
        raise UnavailableError("the registry's list of tags is not readable") from None


def _next_page(answer: httpx.Response) -> str | None:
    """The path of the next page, on the same host whatever the link says."""
    link = answer.links.get("next", {}).get("url")
    return None if link is None else answer.request.url.join(link).raw_path.decode()


def _tombstone(config_digest: str, config_bytes: int) -> Manifest:
    config = {"mediaType": TOMBSTONE_TYPE, "digest": config_digest, "size": config_bytes}
    said = {"schemaVersion": 2, "mediaType": manifests.OCI_MANIFEST, "config": config, "layers": []}
    content = json.dumps(said).encode()
    return Manifest(f"sha256:{hashlib.sha256(content).hexdigest()}", manifests.OCI_MANIFEST, content)
