"""Objects in a bucket of S3, or of a store that speaks its protocol. boto3's errors are translated here."""

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from threading import Lock
from typing import Any, Final

import boto3.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from kiln.errors import ContextMissingError, UnavailableError

PART_BYTES: Final = 8 * 1024**2
_READ_BYTES: Final = 1024**2
_ATTEMPTS: Final = 3
_CONNECT_TIMEOUT: Final = timedelta(seconds=5)
_READ_TIMEOUT: Final = timedelta(seconds=60)
_POOLED_CONNECTIONS: Final = 32
# SigV4 signs nothing for longer.
_LONGEST_URL: Final = timedelta(days=7)
_GONE_CODES: Final = frozenset({"404", "NoSuchKey"})
_UPLOAD_GONE_CODE: Final = "NoSuchUpload"
_TEXT_LIMIT: Final = 300
_log = logging.getLogger(__name__)


class S3Store:
    """Objects below one prefix of a bucket. Any number of threads may share it.

    Credentials and region come from boto3's usual chain, at the first call. Any call raises UnavailableError if S3
    does not answer or refuses it.
    """

    def __init__(self, bucket: str, prefix: str, *, endpoint_url: str | None, default_region: str) -> None:
        """`endpoint_url` is for stores other than AWS's; `default_region` for when boto3's chain names none."""
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._endpoint_url = endpoint_url
        self._default_region = default_region
        # Making a session or a client is not thread-safe; using a client is.
        self._making = Lock()
        self._client: Any = None

    def ping(self) -> None:
        """Raises UnavailableError unless the bucket is there and open to Kiln."""
        with _translated():
            self._s3().head_bucket(Bucket=self._bucket)

    def begin(self, key: str) -> "S3Writer":
        """Begins an object. S3 hears of it when a part is full."""
        with _translated():
            return S3Writer(self._s3(), self._target(key))

    def read(self, key: str) -> Iterator[bytes]:
        """The object, in chunks. Raises ContextMissingError."""
        with _translated():
            try:
                answer = self._s3().get_object(**self._target(key))
            except ClientError as error:
                if _code_of(error) in _GONE_CODES:
                    raise ContextMissingError("the build context is not in the object store") from None
                raise
            with closing(answer["Body"]) as body:
                yield from body.iter_chunks(_READ_BYTES)

    def size_bytes(self, key: str) -> int | None:
        """How long the object is; None if there is none."""
        with _translated():
            try:
                return int(self._s3().head_object(**self._target(key))["ContentLength"])
            except ClientError as error:
                if _code_of(error) in _GONE_CODES:
                    return None
                raise

    def delete(self, key: str) -> None:
        """Removes the object if it is there."""
        with _translated():
            self._s3().delete_object(**self._target(key))

    def stale(self, older_than: timedelta) -> Iterator[str]:
        """The keys of the objects that were written so long ago."""
        latest = datetime.now(UTC) - older_than
        for entry in self._listed("list_objects_v2", "Contents"):
            if entry["LastModified"] <= latest:
                yield entry["Key"].removeprefix(self._prefix)

    def sweep_unfinished(self, older_than: timedelta) -> None:
        """Removes multipart uploads that were begun so long ago, and their parts, which S3 keeps and charges for."""
        latest = datetime.now(UTC) - older_than
        for entry in self._listed("list_multipart_uploads", "Uploads"):
            if entry["Initiated"] <= latest:
                with _translated():
                    _discard(self._s3(), {"Bucket": self._bucket, "Key": entry["Key"]}, entry["UploadId"])

    def upload_url(self, key: str, expires: timedelta) -> str:
        """A URL that takes the object by PUT, of whatever content type. With temporary credentials it ends with them."""
        seconds = int(min(expires, _LONGEST_URL).total_seconds())
        with _translated():
            url: str = self._s3().generate_presigned_url("put_object", Params=self._target(key), ExpiresIn=seconds)
        return url

    def _listed(self, operation: str, entries: str) -> Iterator[dict[str, Any]]:
        with _translated():
            pages = self._s3().get_paginator(operation).paginate(Bucket=self._bucket, Prefix=self._prefix)
            for page in pages:
                yield from page.get(entries, ())

    def _target(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    # Any: boto3 makes the client's methods at run time.
    def _s3(self) -> Any:
        with self._making:
            if self._client is None:
                session = boto3.session.Session()
                region = session.region_name or self._default_region
                options = _options(own_endpoint=self._endpoint_url is not None)
                self._client = session.client("s3", region, endpoint_url=self._endpoint_url, config=options)
            return self._client


class S3Writer:
    """An object that is being written: of one part by a single call, of more by a multipart upload."""

    def __init__(self, client: Any, target: dict[str, str]) -> None:
        """`target` names the bucket and the key."""
        self._s3 = client
        self._target = target
        self._held = bytearray()
        self._upload_id: str | None = None
        self._parts: list[dict[str, object]] = []

    def write(self, data: bytes) -> None:
        """Takes more of the object; sends what fills a part. Raises UnavailableError."""
        self._held += data
        while len(self._held) >= PART_BYTES:
            with _translated():
                self._send_part(bytes(self._held[:PART_BYTES]))
            del self._held[:PART_BYTES]

    def commit(self) -> None:
        """Makes it the object. Raises UnavailableError."""
        with _translated():
            if self._upload_id is None:
                self._s3.put_object(**self._target, Body=bytes(self._held))
            else:
                self._complete(self._upload_id)

    def abort(self) -> None:
        """Leaves nothing, or what `sweep_unfinished` finds if S3 does not answer. Harmless after `commit`."""
        upload_id, self._upload_id = self._upload_id, None
        self._held.clear()
        if upload_id is None:
            return
        try:
            with _translated():
                _discard(self._s3, self._target, upload_id)
        except UnavailableError as error:
            _log.warning("an unfinished upload of %s waits for the sweep: %s", self._target["Key"], error)

    def _complete(self, upload_id: str) -> None:
        if self._held:
            self._send_part(bytes(self._held))
        self._s3.complete_multipart_upload(**self._target, UploadId=upload_id, MultipartUpload={"Parts": self._parts})
        self._upload_id = None

    def _send_part(self, data: bytes) -> None:
        if self._upload_id is None:
            self._upload_id = self._s3.create_multipart_upload(**self._target)["UploadId"]
        number = len(self._parts) + 1
        answer = self._s3.upload_part(**self._target, UploadId=self._upload_id, PartNumber=number, Body=data)
        self._parts.append({"PartNumber": number, "ETag": answer["ETag"]})


def _options(*, own_endpoint: bool) -> Config:
    return Config(
        signature_version="s3v4",
        # A bucket's name in the host's name asks for a wildcard in DNS, which stores of one's own seldom have.
        s3={"addressing_style": "path" if own_endpoint else "auto"},
        # Not every store knows boto3's own checksums, and in a signed URL they would bind the content.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        connect_timeout=_CONNECT_TIMEOUT.total_seconds(),
        read_timeout=_READ_TIMEOUT.total_seconds(),
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        max_pool_connections=_POOLED_CONNECTIONS,
        user_agent_extra="kiln",
    )


def _discard(client: Any, target: dict[str, str], upload_id: str) -> None:
    try:
        client.abort_multipart_upload(**target, UploadId=upload_id)
    except ClientError as error:
        if _code_of(error) != _UPLOAD_GONE_CODE:
            raise


def _code_of(error: ClientError) -> str:
    return error.response.get("Error", {}).get("Code", "")


@contextmanager
def _translated() -> Iterator[None]:
    # Without the cause, and of S3's refusals only the code: their text may repeat what was signed.
    try:
        yield
    except ClientError as error:
        code = _code_of(error) or "no error code"
        raise UnavailableError(f"the object store refuses {error.operation_name}: {code}") from None
    except BotoCoreError as error:
        text = " ".join(str(error).split())[:_TEXT_LIMIT]
        raise UnavailableError(f"the object store does not answer: {text}") from None
