"""Image references: made whole as Docker does it, and the names that are derived from them."""

import pytest

from kiln.errors import InvalidRequestError
from kiln.references import derived_name, image_name_problem, image_tag_problem, parse_reference

DIGEST = f"sha256:{'0123456789abcdef' * 4}"


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("busybox", "docker.io/library/busybox:latest"),
        ("busybox:1.36", "docker.io/library/busybox:1.36"),
        ("grafana/grafana", "docker.io/grafana/grafana:latest"),
        ("docker.io/busybox", "docker.io/library/busybox:latest"),
        ("index.docker.io/library/busybox", "docker.io/library/busybox:latest"),
        ("library/busybox", "docker.io/library/busybox:latest"),
        ("ghcr.io/acme/tools/app:v1", "ghcr.io/acme/tools/app:v1"),
        ("GHCR.io/acme/app", "ghcr.io/acme/app:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("127.0.0.1:5000/app", "127.0.0.1:5000/app:latest"),
        ("[::1]:5000/app:v1", "[::1]:5000/app:v1"),
        ("registry:5000/a_b/c__d/e-f--g/h.i:V_1.-x", "registry:5000/a_b/c__d/e-f--g/h.i:V_1.-x"),
        (f"busybox@{DIGEST}", f"docker.io/library/busybox@{DIGEST}"),
        (f"quay.io/acme/app:v1@{DIGEST}", f"quay.io/acme/app@{DIGEST}"),
    ],
)
def test_a_reference_is_made_whole(text: str, whole: str) -> None:
    """Host, namespace and tag are added where they are left out; a digest wins over a tag."""
    assert str(parse_reference(text)) == whole


def test_a_tag_beside_a_digest_is_kept() -> None:
    """The digest says which image is meant, the tag how it is called."""
    reference = parse_reference(f"quay.io/acme/app:v1@{DIGEST}")
    assert (reference.tag, reference.digest) == ("v1", DIGEST)


def test_a_digest_alone_has_no_tag() -> None:
    """Docker adds `latest` only where nothing is said."""
    assert parse_reference(f"quay.io/acme/app@{DIGEST}").tag is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "busybox ",
        "busybox\n",
        "Busybox",
        "ghcr.io/Acme/app",
        "ghcr.io/",
        "/app",
        "a//b",
        "app:",
        "app:-v1",
        "app:v1:v2",
        f"app:{'t' * 129}",
        "app@",
        "app@sha256:abc",
        f"app@{DIGEST}@{DIGEST}",
        f"app@{DIGEST.upper()}",
        "app@md5:00000000000000000000000000000000",
        "https://ghcr.io/acme/app",
        "docker://busybox",
        "ghcr.io:port/app",
        "-ghcr.io/app",
        "ghcr..io/app",
        "user:password@ghcr.io/app",
        "ghcr.io/../app",
        "ghcr.io/app?x",
        "ghcr.io/app%2fx",
        f"ghcr.io/{'a' * 250}",
        "ghcr.io/приложение",
        "busybox\0",
    ],
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    """The refusal names the field that it came in."""
    with pytest.raises(InvalidRequestError, match=r"^image_url: "):
        parse_reference(text, "image_url")


@pytest.mark.parametrize(
    ("text", "name", "tag"),
    [
        ("busybox", "busybox", "latest"),
        ("docker.io/library/busybox:1.36", "busybox", "1.36"),
        ("grafana/grafana:11", "grafana/grafana", "11"),
        ("ghcr.io/acme/tools/app:V1", "app", "V1"),
        ("quay.io/library/app", "app", "latest"),
        (f"quay.io/acme/app@{DIGEST}", "app", "sha256-0123456789abcdef"),
        (f"quay.io/acme/app:v1@{DIGEST}", "app", "v1"),
    ],
)
def test_a_copy_is_named_after_its_source(text: str, name: str, tag: str) -> None:
    """Docker Hub's images keep their namespace, others only their last segment."""
    assert derived_name(parse_reference(text)) == (name, tag)


def test_a_platform_image_keeps_its_namespace() -> None:
    """Wherever it comes from."""
    assert derived_name(parse_reference("ghcr.io/acme/tools/app:v1"), platform=True) == ("acme/tools/app", "v1")


@pytest.mark.parametrize("name", ["a", "app", "a/b/c", "a.b", "a_b", "a__b", "a---b", "0", "a" * 250])
def test_names_that_registries_take(name: str) -> None:
    """Lower case, with single separators (OCI distribution specification)."""
    assert image_name_problem(name, "acme") is None


@pytest.mark.parametrize(
    "name", ["", "App", "a..b", "a___b", "-a", "a-", "a/", "/a", "a//b", "a:b", "a b", "a\n", "ä", "a" * 251]
)
def test_names_that_registries_refuse(name: str) -> None:
    """The owner before the name counts into its length."""
    assert image_name_problem(name, "acme") is not None


@pytest.mark.parametrize("tag", ["v1", "_", "V1.0-rc_1", "0", "t" * 128])
def test_tags_that_registries_take(tag: str) -> None:
    """At most 128 characters."""
    assert image_tag_problem(tag) is None


@pytest.mark.parametrize("tag", ["", ".v1", "-v1", "v 1", "v1\n", "v/1", "v:1", "ä", "t" * 129])
def test_tags_that_registries_refuse(tag: str) -> None:
    """No tag begins with a dot or a hyphen."""
    assert image_tag_problem(tag) is not None
