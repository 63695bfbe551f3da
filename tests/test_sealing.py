"""Secrets at rest, and digests of bodies that may hold some."""

import pytest

from kiln.sealing import Sealer, SealError

SECRETS = {"token": "s3cr3t-value", "blank": "", "emoji": "🔑\n"}


@pytest.fixture
def sealer() -> Sealer:
    return Sealer(Sealer.new_key())


def test_what_was_sealed_opens_again(sealer: Sealer) -> None:
    """Names and values come back as they were."""
    assert sealer.open(sealer.seal(SECRETS)) == SECRETS


def test_what_is_sealed_shows_nothing(sealer: Sealer) -> None:
    """The ciphertext holds neither names nor values."""
    sealed = sealer.seal(SECRETS)
    assert sealed is not None
    assert b"s3cr3t-value" not in sealed
    assert b"token" not in sealed


def test_a_single_secret_opens_again(sealer: Sealer) -> None:
    """And shows nothing meanwhile."""
    sealed = sealer.seal_text("s3cr3t-value")
    assert b"s3cr3t-value" not in sealed
    assert sealer.open_text(sealed) == "s3cr3t-value"


def test_sealing_twice_gives_two_texts(sealer: Sealer) -> None:
    """Nobody can see that two builds have the same secrets."""
    assert sealer.seal(SECRETS) != sealer.seal(SECRETS)


def test_no_secrets_need_no_seal(sealer: Sealer) -> None:
    """A build without secrets keeps none, and opens as such."""
    assert sealer.seal({}) is None
    assert sealer.open(None) == {}


def test_another_key_does_not_open_a_single_secret(sealer: Sealer) -> None:
    """It is refused by the setting's name, as several are."""
    with pytest.raises(SealError, match="KILN_SECRET_KEY"):
        Sealer(Sealer.new_key()).open_text(sealer.seal_text("s3cr3t-value"))


def test_another_key_does_not_open_it(sealer: Sealer) -> None:
    """Secrets that were sealed with another key are refused by the setting's name."""
    sealed = sealer.seal(SECRETS)
    with pytest.raises(SealError, match="KILN_SECRET_KEY"):
        Sealer(Sealer.new_key()).open(sealed)


def test_a_changed_text_does_not_open(sealer: Sealer) -> None:
    """Ciphertext that somebody changed is refused."""
    sealed = sealer.seal(SECRETS)
    assert sealed is not None
    with pytest.raises(SealError):
        sealer.open(sealed[:20] + sealed[20:].swapcase())


@pytest.mark.parametrize("key", ["", "short", "x" * 43, "ключ", "=" * 44])
def test_a_malformed_key_is_refused(key: str) -> None:
    """A key that is not 32 bytes in base64 is refused by the setting's name."""
    with pytest.raises(SealError, match="KILN_SECRET_KEY"):
        Sealer(key)


def test_equal_bodies_have_equal_digests(sealer: Sealer) -> None:
    """A repeated body is recognised, and a changed one told apart."""
    assert sealer.digest(b"body") == sealer.digest(b"body")
    assert sealer.digest(b"body") != sealer.digest(b"body ")


def test_a_digest_is_the_keys_own(sealer: Sealer) -> None:
    """Nobody without the key can try what a body was."""
    assert sealer.digest(b"body") != Sealer(Sealer.new_key()).digest(b"body")
