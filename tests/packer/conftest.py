"""Packer, simulated EC2, and a Docker engine with what all agents' images have in common."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cli.docker_engine import EngineUnavailable, docker_engine, make_base_image
from packer.tools import SCRIPTS, UPLOAD_FOLDER, Engine, Packer, ca_bundle, packer_in
from support.moto import Account, MotoServer, running_moto


@pytest.fixture
def packer() -> Iterator[Packer]:
    with tempfile.TemporaryDirectory(prefix="kiln-", dir="/tmp") as folder:
        yield packer_in(Path(folder))


@pytest.fixture(scope="module")
def moto() -> Iterator[MotoServer]:
    with running_moto() as server:
        yield server


@pytest.fixture
def account(moto: MotoServer) -> Account:
    return moto.account()


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    with ExitStack() as cleanup:
        try:
            host = cleanup.enter_context(docker_engine())
        except EngineUnavailable as error:
            pytest.skip(str(error))
        engine = Engine(host)
        cleanup.callback(engine.remove_test_images)
        yield engine


@pytest.fixture(scope="session")
def docker_packer(engine: Engine) -> Iterator[Packer]:
    with tempfile.TemporaryDirectory(prefix="kiln-", dir="/tmp") as folder:
        yield packer_in(Path(folder), DOCKER_HOST=engine.host)


@pytest.fixture(scope="session")
def base_image(engine: Engine) -> str:
    return make_base_image(engine.host)


@pytest.fixture(scope="session")
def prepared_image(engine: Engine, base_image: str) -> str:
    """The part that is the same in every agent's image, made once, by the scripts that each build runs again."""
    image = "kiln-test/prepared:latest"
    container = engine.docker("run", "--detach", base_image, "sleep", "infinity")
    try:
        engine.docker("cp", str(SCRIPTS), f"{container}:{UPLOAD_FOLDER}")
        if ca_bundle():
            engine.docker("cp", "--follow-link", ca_bundle(), f"{container}:{UPLOAD_FOLDER}/ca-bundle.pem")
        engine.docker("exec", container, "bash", "-c", f"cd {UPLOAD_FOLDER} && bash base.sh && bash node.sh")
        engine.docker("exec", container, "rm", "-r", UPLOAD_FOLDER)
        engine.docker("commit", container, image)
    finally:
        engine.docker("rm", "--force", container)
    return image
