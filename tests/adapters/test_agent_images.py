"""Runs of Packer's agents' template: what they are made of."""

import base64
import json
import stat
import uuid
from pathlib import Path

import pytest

from kiln.adapters.agent_images import AgentImagePlace, AgentImageRuns
from kiln.models import AgentInstall, ContainerBuildSpec, OwnerType, Provider, Target
from kiln.ports import Engine, Order, ToolJob
from kiln.registry_tokens import BUILD_USER
from kiln.settings import PROJECT_ROOT

REGISTRY = "registry.test:5000"
PASSWORD = "the build's own credential"
ENGINE = Engine("engine-1", "unix:///engine.sock")
TARGET = Target(owner_type=OwnerType.PERSONAL, owner="acme", name="agent", tag="v1")
AGENT = AgentInstall(provider=Provider.CODEX, base_image=f"{REGISTRY}/acme/base:v1", extra_packages="jq less")


@pytest.fixture
def order() -> Order:
    spec = ContainerBuildSpec(target=TARGET, agent=AGENT)
    return Order(str(uuid.uuid4()), 2, spec, {}, organization_id="org-1", platform="linux/arm64")


@pytest.fixture
def runs(tmp_path: Path) -> AgentImageRuns:
    bundle = tmp_path / "proxy.pem"
    bundle.write_text("the proxy's")
    place = AgentImagePlace("packer", PROJECT_ROOT / "packer", tmp_path / "runs", REGISTRY, str(bundle))
    return AgentImageRuns(place, lambda _: PASSWORD)


@pytest.fixture
def job(runs: AgentImageRuns, order: Order) -> ToolJob:
    return runs.prepare(order, runs.folder(order), ENGINE)


def test_the_command_names_one_source_and_files_of_the_run_only(job: ToolJob) -> None:
    """Not the template's other sources, nor where Kiln is installed."""
    assert job.argv == (
        "packer",
        "build",
        "-machine-readable",
        "-only=docker.published",
        f"-var-file={job.cwd}/kiln.pkrvars.json",
        f"{job.cwd}/packer/agent.pkr.hcl",
    )
    assert Path(job.argv[-1]).read_text() == (PROJECT_ROOT / "packer" / "agent.pkr.hcl").read_text()


def test_the_template_gets_the_order(job: ToolJob, order: Order) -> None:
    """Whatever bears the attempt's number, its name ends in it."""
    assert json.loads((job.cwd / "kiln.pkrvars.json").read_text()) == {
        "provider": "codex",
        "agent_version": "latest",
        "extra_packages": "jq less",
        "npm_registry": "",
        "kiln_base_image": f"{REGISTRY}/acme/base:v1",
        "kiln_container_name": f"kiln-agent-{order.build_id}-2",
        "kiln_container_reference": f"{REGISTRY}/kiln-staging/{order.build_id}:attempt-2",
        "kiln_ca_bundle": f"{job.cwd}/ca-bundle.pem",
    }
    assert (job.cwd / "ca-bundle.pem").read_text() == "the proxy's"


def test_the_engine_is_the_slots_and_the_login_the_builds(job: ToolJob) -> None:
    """Nobody else can read the credential, and no command line has it."""
    config = Path(job.env["DOCKER_CONFIG"], "config.json")
    login = base64.b64encode(f"{BUILD_USER}:{PASSWORD}".encode()).decode()
    assert json.loads(config.read_text()) == {"auths": {REGISTRY: {"auth": login}}}
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert (job.env["DOCKER_HOST"], job.env["DOCKER_DEFAULT_PLATFORM"]) == (ENGINE.host, "linux/arm64")


def test_nothing_of_the_workers_is_handed_on(
    runs: AgentImageRuns, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither credentials nor secrets of its environment."""
    monkeypatch.setenv("KILN_SECRET_KEY", "sesame")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame")
    env = runs.prepare(order, runs.folder(order), ENGINE).env
    assert "sesame" not in env.values()
    assert (env["CHECKPOINT_DISABLE"], env["HOME"]) == ("1", env["TMPDIR"])


def test_discarding_a_run_leaves_the_template(runs: AgentImageRuns, job: ToolJob) -> None:
    """The run has a link to it only."""
    runs.discard(job.cwd)
    assert not job.cwd.exists()
    assert (PROJECT_ROOT / "packer" / "agent.pkr.hcl").exists()
