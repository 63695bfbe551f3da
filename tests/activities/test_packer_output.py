"""What Packer 1.6.6 prints with `-machine-readable`, as it was printed, and what Kiln makes of it."""

from activities.packer_output import PackerOutput
from kiln.errors import CapacityError, ToolFailedError

FAILED = r"""
1795325534,,ui,message,    amazon-ebs.agent: Instance ID: i-0fb472360191feb8e
1795325534,,ui,error,==> amazon-ebs.agent: Error creating AMI: InvalidParameterValue: the moon%!(PACKER_COMMA) is not full\n==> amazon-ebs.agent: 	status code: 400%!(PACKER_COMMA) request id: 00000000-0000-4000-8000-000000000000
1795325534,,ui,error,Build 'amazon-ebs.agent' errored after 3 seconds 606 milliseconds: Error creating AMI: InvalidParameterValue: the moon%!(PACKER_COMMA) is not full\n	status code: 400%!(PACKER_COMMA) request id: 00000000-0000-4000-8000-000000000000
1795325534,,ui,say,\n==> Wait completed after 3 seconds 607 milliseconds
1795325534,,error-count,1
1795325534,amazon-ebs.agent,error,Error creating AMI: InvalidParameterValue: the moon%!(PACKER_COMMA) is not full\n	status code: 400%!(PACKER_COMMA) request id: 00000000-0000-4000-8000-000000000000
1795325534,,ui,error,--> amazon-ebs.agent: Error creating AMI: InvalidParameterValue: the moon%!(PACKER_COMMA) is not full\n	status code: 400%!(PACKER_COMMA) request id: 00000000-0000-4000-8000-000000000000
"""
REFUSED = r"""
1795325534,,ui,error,Error: Invalid value for cmd variable\n\n  on  line 0:\n  (source code not available)\n\nThe provider must be claude-code%!(PACKER_COMMA) codex%!(PACKER_COMMA) gemini or cursor.\n
"""
FINISHED = r"""
1795325534,amazon-ebs.agent,artifact,0,builder-id,mitchellh.amazonebs
1795325534,amazon-ebs.agent,artifact,0,id,us-east-1:ami-b59b83b23aebe2436
1795325534,amazon-ebs.agent,artifact,0,string,AMIs were created:\nus-east-1: ami-b59b83b23aebe2436\n
"""


def _read(text: str) -> tuple[PackerOutput, list[str]]:
    output = PackerOutput()
    return output, [line for raw in text.strip().split("\n") for line in output.feed(raw)]


def test_the_error_is_packers_last_one_without_the_sdks_trailer() -> None:
    """One line, commas restored, no prefix, no request id."""
    output, _ = _read(FAILED)
    failure = output.failure()
    assert isinstance(failure, ToolFailedError)
    assert str(failure) == "Error creating AMI: InvalidParameterValue: the moon, is not full"


def test_a_refused_template_is_an_error_too() -> None:
    """Packer says it as one message of several lines; it becomes one."""
    output, _ = _read(REFUSED)
    assert str(output.failure()) == (
        "Invalid value for cmd variable on  line 0: (source code not available) "
        "The provider must be claude-code, codex, gemini or cursor."
    )


def test_lines_are_what_people_would_read() -> None:
    """Escapes undone, one line each, blank ones dropped, machine-readable records not shown."""
    _, lines = _read(FAILED)
    assert lines[0] == "    amazon-ebs.agent: Instance ID: i-0fb472360191feb8e"
    assert lines[1] == "==> amazon-ebs.agent: Error creating AMI: InvalidParameterValue: the moon, is not full"
    assert "==> Wait completed after 3 seconds 607 milliseconds" in lines
    assert not any("error-count" in line for line in lines)


def test_the_artifact_and_the_ids_are_remembered() -> None:
    """Region and AMI of the artifact, and every id that a line named."""
    output, _ = _read(FAILED + FINISHED.lstrip())
    assert output.image() == ("us-east-1", "ami-b59b83b23aebe2436")
    assert output.new_ids(frozenset()) == {"i-0fb472360191feb8e"}


def test_capacity_is_known_by_ec2s_code() -> None:
    """No room is nobody's fault, and worth another attempt."""
    output, _ = _read("1,a,error,Error launching source instance: InsufficientInstanceCapacity: no room")
    assert isinstance(output.failure(), CapacityError)


def test_a_line_that_is_not_machine_readable_passes_as_it_is() -> None:
    """A provisioner's or a crash's own words are not lost, commas and all."""
    _, lines = _read("panic: runtime error, index out of range")
    assert lines == ["panic: runtime error, index out of range"]


def test_silence_is_said_to_be_silence() -> None:
    """No output at all still makes a sentence."""
    assert str(PackerOutput().failure()) == "Packer failed without saying why"


def test_a_failed_scripts_own_reason_stands_beside_packers() -> None:
    """Packer says only the exit status of a script; why it failed is what the script printed last."""
    output, _ = _read(
        "1,,ui,message,    amazon-ebs.agent: error: cursor.com does not answer\n"
        "1,amazon-ebs.agent,error,Script exited with non-zero exit status: 1."
    )
    assert str(output.failure()) == "Script exited with non-zero exit status: 1: cursor.com does not answer"
