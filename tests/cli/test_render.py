"""What is printed of data that others wrote."""

from cli.client import LogEvent
from cli.render import event_text, image_text, plain_text, what_text


def test_a_tools_line_cannot_steer_the_terminal() -> None:
    """Escape sequences lose their escape; tabs and line ends stay."""
    line = LogEvent("line", 1, {"line": "\x1b[2Jgone\tnot\r", "time": "", "stream": "stdout"})
    assert event_text(line) == "�[2Jgone\tnot�"
    assert plain_text("a\x1b\nb\n") == "a�\nb\n"


def test_what_is_simulated_says_so() -> None:
    """An AMI of the simulated EC2 is marked wherever its id is shown."""
    assert image_text({"image": {"reference": "ami-1", "simulated": True}}) == "ami-1 (simulated)"
    assert image_text({"image": {"reference": "ami-1", "simulated": False}}) == "ami-1"
    assert image_text({"image": None}) == ""


def test_a_list_says_what_each_build_makes() -> None:
    """A machine image's agent, a container image's tag, the machine that an image is made of."""
    target = {"owner": "default", "name": "hello", "tag": "v1"}
    specs = ({"provider": "codex"}, {"target": target}, {"machine_id": 7, "instance_id": "i-1"})
    assert [what_text({"spec": spec}) for spec in specs] == ["codex", "default/hello:v1", "machine 7"]
