"""Orders of container images with an agent, by container-images' API."""

from typing import Any

import pytest

from kiln.catalog import builds
from kiln.models import Api, OwnerType
from support.containers import BUILD, Owner, refusal
from support.tenants import on_both_databases

ORDER = {"image_name": "agents/codex", "image_tag": "v1", "provider": "codex"}


def agent_of(owner: Owner, build_id: str) -> dict[str, Any]:
    """What the build's row says is to be installed."""
    with owner.catalog.read() as session:
        found = builds.get(session, build_id)
        assert found is not None
        agent: dict[str, Any] = found.spec["agent"]
        return agent


def taken(owner: Owner, **body: Any) -> dict[str, Any]:
    """The agent of a build that was accepted."""
    answer = owner.post(**{**ORDER, **body})
    assert answer.status_code == 201, answer.text
    return agent_of(owner, answer.json()["build_id"])


@on_both_databases
def test_an_order_waits_for_no_upload(owner: Owner) -> None:
    """201 as for a copy; the build is in the queue, and there is nothing to start."""
    answer = owner.post(**ORDER)
    body = answer.json()
    build_id = body["build_id"]
    path = f"{owner.api.settings.registry_host}/{owner.slug}/agents/codex:v1"
    assert (answer.status_code, body) == (
        201,
        {
            "build_id": build_id,
            "buildIds": [build_id],
            "fullImagePath": path,
            "visibility": "PRIVATE",
            "upload_url": None,
            "expires_in": None,
        },
    )
    assert (owner.status(build_id)["status"], owner.status(build_id)["fullImagePath"]) == ("PENDING", path)
    assert refusal(owner.start(build_id)) == (409, "the build takes no upload")
    assert owner.http.get(f"/api/v1/builds/{build_id}").json()["kind"] == "container"


def test_what_is_not_said_has_a_default(owner: Owner) -> None:
    """Both spellings of the provider, alone or alike, are the same order."""
    expected = {
        "provider": "codex",
        "version": "latest",
        "base_image": "docker.io/library/debian:bookworm-slim",
        "extra_packages": "",
        "npm_registry": "",
    }
    assert taken(owner) == expected
    nothing = dict.fromkeys(("agent_version", "base_image", "extra_packages", "npm_registry"))
    assert taken(owner, provider=None, agent_provider="codex", **nothing) == expected
    assert taken(owner, agent_provider="codex") == expected


def test_what_is_said_is_kept(owner: Owner) -> None:
    """References are made whole, and packages joined with spaces."""
    assert taken(
        owner,
        agent_version="0.166.0",
        base_image="quay.io/acme/ubuntu",
        extra_packages="less, g++  jq",
        npm_registry="https://npm.test:8443/all/",
    ) == {
        "provider": "codex",
        "version": "0.166.0",
        "base_image": "quay.io/acme/ubuntu:latest",
        "extra_packages": "less g++ jq",
        "npm_registry": "https://npm.test:8443/all/",
    }


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"provider": "copilot"}, "provider"),
        ({"provider": 7}, "provider"),
        ({"agent_provider": "cursor"}, "agent_provider"),
        ({"agent_version": "1.0; reboot"}, "agent_version"),
        ({"agent_version": 1}, "agent_version"),
        ({"extra_packages": "jq; reboot"}, "extra_packages"),
        ({"extra_packages": "sudo-"}, "extra_packages"),
        ({"extra_packages": "jq\nreboot"}, "extra_packages"),
        ({"npm_registry": "file:///etc/passwd"}, "npm_registry"),
        ({"base_image": "https://example.com/a"}, "base_image"),
        ({"base_image": "10.0.0.7/a"}, "base_image"),
        ({"base_image": "example.com/a"}, "base_image"),
        ({"image_tag": None}, "image_tag"),
        ({"source_image": "busybox"}, "provider"),
    ],
)
def test_a_bad_value_is_refused_by_the_name_of_its_field(owner: Owner, body: dict[str, Any], field: str) -> None:
    """422, in this contract's shape."""
    status, message = refusal(owner.post(**{**ORDER, **body}))
    assert (status, message.partition(": ")[0]) == (422, field)


def test_a_base_image_is_one_that_the_organization_may_read(owner: Owner, stranger: Owner) -> None:
    """Its own, and what others have made public."""
    host = owner.api.settings.registry_host
    own, private, public = (f"{host}/{whose.slug}/{name}:v1" for whose, name in bases(owner, stranger))
    assert taken(owner, base_image=own)["base_image"] == own
    assert taken(owner, base_image=public)["base_image"] == public
    answer = owner.post(**ORDER, base_image=private)
    assert refusal(answer) == (422, f"base_image: {private}: no such image, or not yours to use")


def bases(owner: Owner, stranger: Owner) -> list[tuple[Owner, str]]:
    """Whose images with which names: an own one, a stranger's private one, and one that it shows to everybody."""
    owner.published(owner.target("base"))
    stranger.published(stranger.target("secret"))
    stranger.published(stranger.target("open", visibility="PUBLIC"))
    return [(owner, "base"), (stranger, "secret"), (stranger, "open")]


def test_the_platforms_are_an_admins(owner: Owner) -> None:
    """As other builds of platform images are."""
    scope = {"owner_scope": "platform", "visibility": "PUBLIC"}
    assert owner.post(**ORDER, **scope).json()["fullImagePath"].endswith(f"/{OwnerType.PLATFORM}/agents/codex:v1")
    assert owner.post(owner.writer, **ORDER, **scope).status_code == 403


def test_without_a_provider_nothing_is_new(owner: Owner) -> None:
    """Fields of agents mean nothing to a build that uploads its context."""
    answer = owner.ordered(base_image=7, agent_version="; reboot", provider=None)
    assert answer["upload_url"]
    assert agent_of(owner, answer["build_id"]) is None


def test_an_order_under_one_key_is_one_build(owner: Owner) -> None:
    """A repeated POST answers as the first."""
    headers = {"Idempotency-Key": "nightly"}
    first, second = (owner.http.post(BUILD, json=ORDER, headers=headers).json() for _ in range(2))
    assert first == second
    with owner.catalog.read() as session:
        found = builds.find(session, owner.organization_id, first["build_id"], Api.CONTAINER_IMAGES)
    assert found is not None
