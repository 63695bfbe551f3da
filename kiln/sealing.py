"""Secrets at rest: encrypted under the installation's one key, and a keyed digest for bodies that may hold them."""

import hashlib
import hmac
import json

from cryptography.fernet import Fernet, InvalidToken

from kiln.errors import KilnError


class SealError(KilnError):
    """The key is malformed, or it is not the one that these secrets were sealed with."""


class Sealer:
    """Seals secrets, single ones and mappings of them, with KILN_SECRET_KEY: 32 bytes in URL-safe base64 (Fernet's form)."""

    def __init__(self, key: str) -> None:
        try:
            self._fernet = Fernet(key.encode())
        except ValueError:
            raise SealError("KILN_SECRET_KEY: must be 32 bytes in URL-safe base64") from None
        self._digest_key = hashlib.sha256(b"kiln digest\0" + key.encode()).digest()

    @staticmethod
    def new_key() -> str:
        return Fernet.generate_key().decode()

    def seal(self, secrets: dict[str, str]) -> bytes | None:
        """Ciphertext of the secrets; None when there are none."""
        return self._fernet.encrypt(json.dumps(secrets).encode()) if secrets else None

    def seal_text(self, text: str) -> bytes:
        """Ciphertext of a single secret."""
        return self._fernet.encrypt(text.encode())

    def open_text(self, sealed: bytes) -> str:
        """The single secret again. Raises SealError if it was sealed with another key."""
        return self._opened(sealed).decode()

    def open(self, sealed: bytes | None) -> dict[str, str]:
        """The secrets again. Raises SealError if they were sealed with another key."""
        if sealed is None:
            return {}
        opened: dict[str, str] = json.loads(self._opened(sealed))
        return opened

    def _opened(self, sealed: bytes) -> bytes:
        try:
            return self._fernet.decrypt(sealed)
        except InvalidToken:
            raise SealError("KILN_SECRET_KEY: these secrets were sealed with another key") from None

    def digest(self, body: bytes) -> str:
        """A keyed digest in hex: equal bodies are recognised, and nothing can be guessed from it."""
        return hmac.new(self._digest_key, body, hashlib.sha256).hexdigest()
