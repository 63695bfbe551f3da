"""Names of what Kiln makes."""

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kiln.naming import (
    ATTEMPT_TAG,
    BUILD_TAG,
    INSTALLATION_TAG,
    RESERVED_TAG_PREFIXES,
    build_of_name,
    build_workflow_id,
    delete_workflow_id,
    image_name,
    key_pair_name,
    resource_tags,
    security_group_name,
)

BUILD = "550e8400-e29b-41d4-a716-446655440000"
BUILDS = st.uuids().map(str)
ATTEMPTS = st.integers(1, 10**6)
AMI_CHARACTERS = st.text("abcXYZ019 ()[]./-'@_", max_size=200)


@given(prefix=AMI_CHARACTERS, provider=AMI_CHARACTERS, build=BUILDS, attempt=ATTEMPTS)
def test_an_amis_name_tells_its_build(prefix: str, provider: str, build: str, attempt: int) -> None:
    """However long prefix and provider are, the name fits EC2's 128 characters and names build and attempt."""
    name = image_name(prefix, provider, build, attempt)
    assert len(name) <= 128
    assert build_of_name(name) == (build, attempt)


@given(build=BUILDS, attempt=ATTEMPTS)
def test_temporary_names_tell_their_build(build: str, attempt: int) -> None:
    """Key pairs and security groups name build and attempt, too."""
    assert build_of_name(key_pair_name(build, attempt)) == (build, attempt)
    assert build_of_name(security_group_name(build, attempt)) == (build, attempt)


def test_a_name_says_what_it_is() -> None:
    """A short name is prefix, provider, build and attempt."""
    assert image_name("kiln", "codex", BUILD, 2) == f"kiln-codex-{BUILD}-2"


def test_a_security_group_is_not_named_like_its_id() -> None:
    """EC2 refuses names that begin with `sg-`."""
    assert not security_group_name(BUILD, 1).startswith("sg-")


@pytest.mark.parametrize(
    "name",
    ["", "ubuntu-jammy", BUILD, f"kiln-{BUILD}", f"kiln-{BUILD}-", f"kiln-{BUILD}-1-copy", f"kiln-{BUILD[:-1]}-1"],
)
def test_a_foreign_name_is_nobodys(name: str) -> None:
    """What does not end in a build and an attempt is not Kiln's."""
    assert build_of_name(name) is None


def test_attempts_of_a_build_have_names_of_their_own() -> None:
    """No two attempts make resources of the same name."""
    assert len({image_name("kiln", "codex", BUILD, attempt) for attempt in range(1, 30)}) == 29


def test_tags_say_whose_a_resource_is() -> None:
    """Installation, build and attempt stand in tags that users cannot set."""
    tags = resource_tags("installation", BUILD, 3)
    assert tags == {INSTALLATION_TAG: "installation", BUILD_TAG: BUILD, ATTEMPT_TAG: "3"}
    assert all(tag.startswith(RESERVED_TAG_PREFIXES) for tag in tags)


def test_workflow_ids_are_as_published() -> None:
    """Other services reach a build's workflow by this id."""
    assert build_workflow_id(BUILD) == f"build-{BUILD}"


def test_a_deletion_is_not_taken_for_a_build() -> None:
    """The same id names two workflows for a build and a deletion."""
    image = str(uuid.UUID(BUILD))
    assert delete_workflow_id(image) != build_workflow_id(image)
