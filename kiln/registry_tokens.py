"""What opens the registry: the tokens that Kiln signs, and the passwords with which a build's or a pod's engine asks for one.

Token protocol: https://distribution.github.io/distribution/spec/auth/token/ and .../auth/jwt/
"""

import base64
import os
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from kiln.errors import UnavailableError
from kiln.sealing import Sealer, SealError

SERVICE: Final = "kiln-registry"
ISSUER: Final = "kiln"
BUILD_USER: Final = "kiln-build"
POD_USER: Final = "kiln-pod"
TOKEN_LIFETIME: Final = timedelta(minutes=5)

_CERTIFICATE_LIFETIME: Final = timedelta(days=30 * 365)
# A registry's clock may be behind: neither certificate nor token begins only now.
_CLOCK_LEEWAY: Final = timedelta(minutes=1)
_BUILD_PURPOSE: Final = "registry"
_POD_PURPOSE: Final = "registry of a pod"


@dataclass(frozen=True)
class Access:
    """What a token allows in one repository; `actions` are `pull`, `push` and `delete`."""

    repository: str
    actions: tuple[str, ...]


@dataclass(frozen=True)
class _Signer:
    key: ec.EllipticCurvePrivateKey
    certificate: str


class RegistryTokens:
    """Signs tokens with the key of one file (see `make_key_file`), read when the first is wanted. Thread-safe."""

    def __init__(self, key_file: Path) -> None:
        self._key_file = key_file
        self._lock = threading.Lock()
        self._signer: _Signer | None = None

    def check(self) -> None:
        """Raises UnavailableError unless the key can be read."""
        self._load()

    def issue(self, subject: str, access: Sequence[Access], lifetime: timedelta = TOKEN_LIFETIME) -> str:
        """A token (JWT, ES256) for the registry. Without access it says no more than who asks.

        Raises UnavailableError if the key cannot be read.
        """
        signer = self._load()
        now = datetime.now(UTC)
        claims = {
            "iss": ISSUER,
            "aud": SERVICE,
            "sub": subject,
            "iat": now,
            "nbf": now - _CLOCK_LEEWAY,
            "exp": now + lifetime,
            "jti": secrets.token_urlsafe(16),
            "access": [{"type": "repository", "name": one.repository, "actions": list(one.actions)} for one in access],
        }
        return jwt.encode(claims, signer.key, algorithm="ES256", headers={"x5c": [signer.certificate]})

    def _load(self) -> _Signer:
        with self._lock:
            if self._signer is None:
                self._signer = _read_signer(self._key_file)
            return self._signer


@dataclass(frozen=True)
class BuildCredential:
    """For which build, of which organization, a password stands."""

    build_id: str
    organization_id: str
    expires_at: datetime


class BuildCredentials:
    """Passwords for the user `kiln-build`, sealed with the installation's key: nothing of them is kept anywhere."""

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer

    def issue(self, build_id: str, organization_id: str, expires_at: datetime) -> str:
        """The password of one build, in URL-safe characters."""
        said = {"purpose": _BUILD_PURPOSE, "build_id": build_id, "organization_id": organization_id}
        return _sealed(self._sealer, said, expires_at)

    def open(self, password: str) -> BuildCredential | None:
        """Whose password this is; None if it is nobody's, or no longer valid."""
        said = _opened(self._sealer, password, _BUILD_PURPOSE)
        if said is None:
            return None
        return BuildCredential(said["build_id"], said["organization_id"], datetime.fromisoformat(said["expires_at"]))


@dataclass(frozen=True)
class PodCredential:
    """For which pod, of which organization, a password stands."""

    pod_id: str
    organization_id: str
    expires_at: datetime


class PodCredentials:
    """Passwords for the user `kiln-pod`, with which a runner's engine pulls a pod's image; sealed in the same way."""

    def __init__(self, sealer: Sealer) -> None:
        self._sealer = sealer

    def issue(self, pod_id: str, organization_id: str, expires_at: datetime) -> str:
        """The password of one pod, in URL-safe characters."""
        said = {"purpose": _POD_PURPOSE, "pod_id": pod_id, "organization_id": organization_id}
        return _sealed(self._sealer, said, expires_at)

    def open(self, password: str) -> PodCredential | None:
        """Whose password this is; None if it is nobody's, or no longer valid."""
        said = _opened(self._sealer, password, _POD_PURPOSE)
        if said is None:
            return None
        return PodCredential(said["pod_id"], said["organization_id"], datetime.fromisoformat(said["expires_at"]))


def _sealed(sealer: Sealer, said: dict[str, str], expires_at: datetime) -> str:
    sealed = sealer.seal({**said, "expires_at": expires_at.astimezone(UTC).isoformat()})
    return (sealed or b"").decode()


def _opened(sealer: Sealer, password: str, purpose: str) -> dict[str, str] | None:
    """What was sealed for this purpose, and is still valid."""
    try:
        said = sealer.open(password.encode())
    except SealError:
        return None
    # Other secrets are sealed with the same key; they open nothing here.
    if said.get("purpose") != purpose:
        return None
    return said if datetime.fromisoformat(said["expires_at"]) > datetime.now(UTC) else None


def make_key_file(path: Path) -> None:
    """Makes a private key (EC P-256) and its own certificate after it (PEM, mode 0600), unless the file is there.

    Processes that do so at once end with one and the same key. Raises OSError.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_new(path, _new_key(), 0o600)


def write_certificate(key_file: Path, path: Path) -> None:
    """Writes the key's certificate alone, for the registry's `rootcertbundle`. Raises UnavailableError, OSError."""
    signer = _read_signer(key_file)
    certificate = x509.load_der_x509_certificate(base64.b64decode(signer.certificate))
    draft = _draft(path, certificate.public_bytes(Encoding.PEM), 0o644)
    draft.replace(path)


def _new_key() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Kiln registry tokens")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_LEEWAY)
        .not_valid_after(now + _CERTIFICATE_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return private + certificate.public_bytes(Encoding.PEM)


def _read_signer(path: Path) -> _Signer:
    try:
        text = path.read_bytes()
        key = load_pem_private_key(text, password=None)
        certificate = x509.load_pem_x509_certificate(text)
    except OSError as error:
        raise UnavailableError(f"KILN_REGISTRY_TOKEN_KEY: the key cannot be read: {error.strerror}") from None
    except (ValueError, TypeError):
        raise UnavailableError(f"KILN_REGISTRY_TOKEN_KEY: {path.name} holds no private key and certificate") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise UnavailableError(f"KILN_REGISTRY_TOKEN_KEY: the key in {path.name} is not of the curve P-256")
    if certificate.public_key() != key.public_key():
        raise UnavailableError(f"KILN_REGISTRY_TOKEN_KEY: the certificate in {path.name} is another key's")
    return _Signer(key, base64.b64encode(certificate.public_bytes(Encoding.DER)).decode())


def _draft(path: Path, content: bytes, mode: int) -> Path:
    """A new file beside `path`, complete and on disk before it takes the name."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return draft


def _write_new(path: Path, content: bytes, mode: int) -> None:
    draft = _draft(path, content, mode)
    try:
        os.link(draft, path)  # who comes second keeps the first one's
    except FileExistsError:
        pass
    finally:
        draft.unlink()
