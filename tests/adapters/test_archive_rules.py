"""What may be in an uploaded archive: members, links, the Dockerfile and its frontend."""

import tarfile

import pytest

from support.archives import (
    DOCKERFILE,
    archive,
    checked,
    context_archive,
    file,
    folder,
    hard_link,
    refusal,
    special,
    symlink,
)

LONG = "/".join(["a-folder-of-a-long-path"] * 12)
DOCKER = file("Dockerfile", DOCKERFILE)
DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("members", "message"),
    [
        pytest.param([file("/etc/passwd")], "member '/etc/passwd' has an absolute path", id="absolute"),
        pytest.param([file("a/../../b")], "member 'a/../../b' climbs out of the build context", id="climbs"),
        pytest.param(
            [file("../" + LONG)], f"member '../{LONG[:96]}…' climbs out of the build context", id="long-climbs"
        ),
        pytest.param([file("..")], "member '..' climbs out of the build context", id="parent"),
        pytest.param(
            [symlink("a/b", "../../etc")],
            "member 'a/b' is a symbolic link that climbs out of the build context, to '../../etc'",
            id="symlink-climbs",
        ),
        pytest.param(
            [symlink("a", f"../{LONG}/")],
            f"member 'a' is a symbolic link that climbs out of the build context, to '../{LONG[:96]}…'",
            id="long-symlink-climbs",
        ),
        pytest.param(
            [symlink("a", "b"), file("./a/c")], "member './a/c' is written through the symbolic link 'a'", id="through"
        ),
        pytest.param(
            [file("d/a"), symlink("d/e", "/"), file("d/e/f/g")],
            "member 'd/e/f/g' is written through the symbolic link 'd/e'",
            id="deep-through",
        ),
        pytest.param(
            [hard_link("a", "../b")],
            "member 'a' is a hard link that climbs out of the build context, to '../b'",
            id="hard-link-climbs",
        ),
        pytest.param(
            [hard_link("a", "/etc/shadow")],
            "member 'a' is a hard link that climbs out of the build context, to '/etc/shadow'",
            id="absolute-hard-link",
        ),
        pytest.param(
            [symlink("l", "/etc"), hard_link("a", "l/shadow")],
            "member 'a' is a hard link to or through a symbolic link, 'l/shadow'",
            id="hard-link-through",
        ),
        pytest.param(
            [symlink("b/l", "../x"), hard_link("a", "b/l")],
            "member 'a' is a hard link to or through a symbolic link, 'b/l'",
            id="hard-link-to-symlink",
        ),
        pytest.param(
            [special("null", tarfile.CHRTYPE)],
            "member 'null' is a device or a pipe, which a build context cannot hold",
            id="device",
        ),
        pytest.param(
            [special("pipe", tarfile.FIFOTYPE)],
            "member 'pipe' is a device or a pipe, which a build context cannot hold",
            id="pipe",
        ),
        pytest.param([symlink(".", "/etc")], "member '.' takes the place of the context's root", id="root"),
        pytest.param(
            [file("/".join(["d"] * 256))],
            f"member '{'d/' * 49}d…' has a path of more than 4095 bytes or 255 folders",
            id="deep",
        ),
        pytest.param([file("/bad\nname\x1b")], "member '/bad\ufffdname\ufffd' has an absolute path", id="unprintable"),
    ],
)
def test_members(members: list, message: str):
    """A member that leaves the context, or that it cannot hold, is refused by its name."""
    assert refusal(archive({"Dockerfile": DOCKERFILE}, *members)) == message


@pytest.mark.parametrize(
    ("members", "message"),
    [
        pytest.param(
            [file("src/Dockerfile")], "the archive has no 'Dockerfile', the Dockerfile to build from", id="none"
        ),
        pytest.param(
            [symlink("Dockerfile", "docker/Dockerfile")],
            "member 'Dockerfile' is the Dockerfile to build from, and must be a regular file",
            id="symlink",
        ),
        pytest.param(
            [DOCKER, hard_link("./Dockerfile", "other")],
            "member './Dockerfile' is the Dockerfile to build from, and must be a regular file",
            id="replaced-by-hard-link",
        ),
        pytest.param(
            [folder("Dockerfile")],
            "member 'Dockerfile/' is the Dockerfile to build from, and must be a regular file",
            id="folder",
        ),
    ],
)
def test_dockerfile(members: list, message: str):
    """The Dockerfile is a regular file of the archive, and stays one."""
    assert refusal(archive({}, *members)) == message


def test_dockerfile_elsewhere():
    """Any path of the archive can be the Dockerfile's."""
    assert checked(archive({"docker/web/app.dockerfile": DOCKERFILE}), dockerfile="./docker/web/app.dockerfile")[0] == 1


def test_dockerfile_below_a_link():
    """No folder above the Dockerfile may become a link, which would put another file in its place."""
    data = archive({"docker/Dockerfile": DOCKERFILE}, symlink("docker", "evil"))
    message = refusal(data, dockerfile="docker/Dockerfile")
    assert message == "member 'docker' must be a folder: 'docker/Dockerfile' is to be in it"


@pytest.mark.parametrize("dockerfile", ["../Dockerfile", "/Dockerfile", "", "."])
def test_dockerfile_outside(dockerfile: str):
    """A Dockerfile that cannot be in an archive is refused before the first byte."""
    message = f"the Dockerfile's path '{dockerfile}' is not inside the build context"
    assert refusal(context_archive(), dockerfile=dockerfile) == message


@pytest.mark.parametrize(
    "directive",
    [
        "docker/dockerfile:1",
        "docker.io/docker/dockerfile:1.7-labs",
        "docker/dockerfile-upstream:master",
        f"docker/dockerfile:1@{DIGEST}",
        f"docker/dockerfile@{DIGEST}",
    ],
)
def test_frontends_of_docker(directive: str):
    """Docker's own frontends may be named, by tag and digest."""
    assert checked(context_archive(dockerfile=f"# escape=`\n# syntax={directive}\n".encode() + DOCKERFILE))[0] == 1


@pytest.mark.parametrize(
    ("dockerfile", "frontend"),
    [
        pytest.param("# syntax=evil/frontend:1\n", "evil/frontend:1", id="plain"),
        pytest.param("\ufeff#\tSyntax = evil/frontend \r\n", "evil/frontend", id="bom-case-and-spaces"),
        pytest.param("#!/bin/sh\n// syntax=evil/frontend\n", "evil/frontend", id="after-shebang-with-slashes"),
        pytest.param("# syntax=docker/dockerfile:1\n# syntax=evil/a\n", "evil/a", id="second-directive"),
        pytest.param("# a=b\n" * 9000 + "# syntax=evil/late\n", "evil/late", id="late"),
        pytest.param("#\u00a0syntax=evil/nbsp\n", "evil/nbsp", id="unicode-space"),
        pytest.param("# syntax=docker/dockerfile/evil\n", "docker/dockerfile/evil", id="longer-name"),
        pytest.param("# syntax=evil.io/docker/dockerfile\n", "evil.io/docker/dockerfile", id="other-registry"),
    ],
)
def test_frontends_of_others(dockerfile: str, frontend: str):
    """A Dockerfile that names another frontend is refused: that could reach other builds' cache mounts."""
    message = refusal(context_archive(dockerfile=dockerfile.encode() + DOCKERFILE))
    assert message == (
        f"the Dockerfile's syntax directive names the frontend '{frontend}'; only docker/dockerfile and"
        " docker/dockerfile-upstream are allowed"
    )


@pytest.mark.parametrize(
    ("dockerfile", "message"),
    [
        (b"# a=b\n" * 20_000, "the Dockerfile begins with more than 65536 bytes of comments"),
        (b'{"syntax": "evil/f"}', "the Dockerfile is JSON, which could name a frontend; write it as a Dockerfile"),
    ],
)
def test_hidden_frontends(dockerfile: bytes, message: str):
    """A directive cannot hide behind comments or in another form."""
    assert refusal(context_archive(dockerfile=dockerfile)) == message


def test_replaced_dockerfile():
    """A second Dockerfile in the archive, which would take the first one's place, is read as well."""
    data = archive({}, DOCKER, file("./Dockerfile", b"# syntax=evil/f\n"))
    assert "names the frontend 'evil/f'" in refusal(data)


def test_comment_elsewhere():
    """A directive after the first instruction is a comment, and a long Dockerfile passes."""
    dockerfile = DOCKERFILE + b"# syntax=evil/frontend\n" + b"RUN true\n" * 20_000
    assert checked(context_archive(dockerfile=dockerfile))[0] == 1
