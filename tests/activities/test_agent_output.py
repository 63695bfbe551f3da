"""What Packer 1.6.6 prints of the engine that it works in, as it was printed but for times, and what Kiln makes of it."""

from activities.agent_output import AgentOutput
from kiln.errors import KilnError, SourceUnavailableError, ToolFailedError, UnavailableError

PULL_FAILS = """
0,,ui,say,==> docker.published: Pulling Docker image: nowhere.example/no/such:v1
0,,ui,message,    docker.published: {said}
0,,ui,error,==> docker.published: Error pulling Docker image: Bad exit status: 1
0,,ui,error,Build 'docker.published' errored after 60 milliseconds: Error pulling Docker image: Bad exit status: 1
0,,ui,say,\\n==> Wait completed after 60 milliseconds
0,docker.published,error,Error pulling Docker image: Bad exit status: 1
0,,ui,error,--> docker.published: Error pulling Docker image: Bad exit status: 1
"""
PUSH_FAILS = """
0,,ui,say,==> docker.published: Running post-processor:  (type docker-push)
0,,ui,message,    docker.published (docker-push): Pushing: 127.0.0.1:5000/kiln-staging/1:attempt-1
0,,ui,message,    docker.published (docker-push): The push refers to repository [127.0.0.1:5000/kiln-staging/1]
0,,ui,message,    docker.published (docker-push): {said}
0,,ui,error,Build 'docker.published' errored after 4 s: 1 error(s) occurred:\\n\\n* Post-processor failed: Bad exit status: 1
0,,ui,error,--> docker.published: 1 error(s) occurred:\\n\\n* Post-processor failed: Bad exit status: 1
"""
SCRIPT_FAILS = """
0,,ui,say,==> docker.published: Pulling Docker image: docker.io/library/debian:v1
0,,ui,say,==> docker.published: Starting docker container...
0,,ui,say,==> docker.published: Provisioning with shell script: /srv/runs/container-1-x/packer-shell74
0,,ui,message,    docker.published: Throttling: Cannot connect to the Docker daemon
0,,ui,error,==> docker.published: error: apt-get update failed: the package sources cannot be read
0,,ui,error,==> docker.published: Script exited with non-zero exit status: 1. Allowed exit codes are: [0]
"""


def read(text: str) -> tuple[KilnError, list[str]]:
    """The failure that it ends in, and its lines."""
    output = AgentOutput(folder="/srv/runs/container-1-x")
    lines = [line for raw in text.strip().split("\n") for line in output.feed(raw)]
    return output.failure_of_image(), lines


def test_a_base_image_that_cannot_be_had_is_named_with_the_reason() -> None:
    """Packer itself says no more than an exit status; the resolver's address stays here, also in the log."""
    reason = "dial tcp: lookup nowhere.example on 10.255.255.53:53: no such host"
    said = f'Error response from daemon: Get "https://nowhere.example/v2/": {reason}'
    failure, lines = read(PULL_FAILS.format(said=said))
    assert isinstance(failure, SourceUnavailableError)
    assert str(failure) == (
        'nowhere.example/no/such:v1: Get "https://nowhere.example/v2/": dial tcp: lookup nowhere.example: no such host'
    )
    assert not any("10.255.255.53" in line for line in lines)


def test_an_engine_that_is_gone_is_worth_another_attempt() -> None:
    """It is not the build's fault."""
    said = "Cannot connect to the Docker daemon at unix:///engine.sock. Is the docker daemon running?"
    failure, _ = read(PULL_FAILS.format(said=said))
    assert isinstance(failure, UnavailableError)
    assert str(failure) == f"the Docker engine: {said}"


def test_a_registry_that_is_gone_is_worth_another_attempt() -> None:
    """Kiln's own, to which the image is pushed."""
    failure, _ = read(PUSH_FAILS.format(said='Get "http://127.0.0.1:5000/v2/": EOF'))
    assert isinstance(failure, UnavailableError)
    assert str(failure) == 'the registry: Get "http://127.0.0.1:5000/v2/": EOF'


def test_a_push_that_is_refused_is_not() -> None:
    """Nothing changes by asking again."""
    failure, _ = read(PUSH_FAILS.format(said="denied: requested access to the resource is denied"))
    assert isinstance(failure, ToolFailedError)
    assert str(failure) == "the registry: denied: requested access to the resource is denied"


def test_what_fails_in_the_container_is_the_builds_own() -> None:
    """Whatever words its scripts use; the log says nothing of where the run's files are."""
    failure, lines = read(SCRIPT_FAILS)
    assert isinstance(failure, ToolFailedError)
    assert "apt-get update failed: the package sources cannot be read" in str(failure)
    assert "==> docker.published: Provisioning with shell script: packer-shell74" in lines
