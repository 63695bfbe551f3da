"""The client that signs, against the contract's own examples."""

import pytest

from support.signing import ORGANIZATION_API, SignedClient

IMAGES = f"{ORGANIZATION_API}/images"
TIMESTAMP = "1700000000000"
EXAMPLES = [
    ("GET", "n-1", b"", "af5ce14b9bc5f5ee27fa6801ae6e90c2e956c71d225bdcc64f662bcfa020c232"),
    (
        "POST",
        "n-2",
        rb'{"machine_id": 7, "name": "n \u00e9"}',
        "d47f5ac7f8b0e66beedb7051cf97133ad13e792fbc420b2abe26fc44cfa80399",
    ),
]


@pytest.mark.parametrize(("method", "nonce", "body", "signature"), EXAMPLES)
def test_it_signs_as_the_contract_says(method: str, nonce: str, body: bytes, signature: str) -> None:
    """The key `key` with the secret `secret` makes the contract's signatures."""
    with SignedClient("http://127.0.0.1:1", "key", "secret") as client:
        assert client.authorize(method, IMAGES, body, nonce, TIMESTAMP) == f"HMAC key:{signature}:{nonce}:{TIMESTAMP}"
