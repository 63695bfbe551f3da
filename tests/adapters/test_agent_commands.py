"""How each agent is started."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from kiln.adapters.agent_commands import MAX_ARGUMENT_BYTES, AgentCommand, agent_command, available_agents
from kiln.errors import OperationFailedError
from kiln.models import AgentType, PodSpec
from kiln.ports.pods import PodOrder

HOME, WORK = "/box/home", "/box/work"
PROMPT = "--fix the bug"
MCP = {"mcpServers": {"one": {"type": "stdio", "command": "run-one", "args": ["-v"], "env": {"TOKEN": 'a"b\\c\x7f'}}}}
PROGRAMS = {
    AgentType.CLAUDE_CODE: "claude",
    AgentType.CODEX: "codex",
    AgentType.GEMINI: "gemini",
    AgentType.CURSOR: "cursor-agent",
    AgentType.AIDER: "aider",
}


def command(agent: AgentType = AgentType.CLAUDE_CODE, **changes: Any) -> AgentCommand:
    spec = {name: changes.pop(name) for name in list(changes) if name in PodSpec.model_fields}
    values: dict[str, Any] = {"prompts": [PROMPT], "environment": {}, **changes}
    order = PodOrder(pod_id="1", key="pod-a", attempt=1, spec=PodSpec(agent_type=agent, **spec), **values)
    return agent_command(order, HOME, WORK)


INTERACTIVE = {
    AgentType.CLAUDE_CODE: ["claude", "--dangerously-skip-permissions", "--", PROMPT],
    AgentType.CODEX: ["codex", "--dangerously-bypass-approvals-and-sandbox", "--", PROMPT],
    AgentType.GEMINI: ["gemini", "--yolo", f"--prompt-interactive={PROMPT}"],
    AgentType.CURSOR: ["cursor-agent", "--force", "--trust", "--approve-mcps", "--", PROMPT],
}
HEADLESS = {
    AgentType.CLAUDE_CODE: ["claude", "--dangerously-skip-permissions", "--print", "--max-turns=3", "--", PROMPT],
    AgentType.CODEX: [
        *("codex", "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "--", PROMPT)
    ],
    AgentType.GEMINI: ["gemini", "--yolo", f"--prompt={PROMPT}"],
    AgentType.CURSOR: ["cursor-agent", "--force", "--trust", "--approve-mcps", "--print", "--", PROMPT],
}


@pytest.mark.parametrize("agent", INTERACTIVE)
def test_interactive_with_the_first_prompt(agent: AgentType):
    """An agent gets its first prompt on its command line, whatever it begins with, and stays for others."""
    found = command(agent)
    assert (found.argv, found.prompted) == (INTERACTIVE[agent], 1)


@pytest.mark.parametrize("agent", HEADLESS)
def test_headless_with_turns(agent: AgentType):
    """A number of turns has an agent work off its prompt and exit; each is told of them by a variable."""
    found = command(agent, max_turns=3)
    assert (found.argv, found.prompted) == (HEADLESS[agent], 1)
    assert found.environment["KILN_MAX_TURNS"] == "3"


def test_aider():
    """Aider exits after a prompt on its command line: one that is to stay gets it at the terminal."""
    staying, closing = command(AgentType.AIDER), command(AgentType.AIDER, auto_close=True)
    assert (staying.argv[0], staying.prompted) == ("aider", 0)
    assert PROMPT not in " ".join(staying.argv)
    assert (closing.argv[-1], closing.prompted) == (f"--message={PROMPT}", 1)
    with pytest.raises(OperationFailedError, match="aider takes no MCP configuration"):
        command(AgentType.AIDER, mcp_config=MCP)


@pytest.mark.parametrize("prompts", [[], ["x" * (MAX_ARGUMENT_BYTES + 1)], ["nul\0"], ["\ud800"]])
@pytest.mark.parametrize("agent", AgentType)
def test_prompts_that_fit_no_command_line(agent: AgentType, prompts: list[str]):
    """Without a prompt that can be an argument, an agent is interactive, and gets it at its terminal."""
    found = command(agent, prompts=prompts, auto_close=True)
    assert found.prompted == 0
    assert found.argv == [argument for argument in found.argv if argument.isascii() and len(argument) < 100]
    assert not {"--print", "exec", "--"} & set(found.argv)


MCP_FILES = {
    AgentType.CLAUDE_CODE: "mcp.json",
    AgentType.CODEX: ".codex/config.toml",
    AgentType.GEMINI: ".gemini/settings.json",
    AgentType.CURSOR: ".cursor/mcp.json",
}


@pytest.mark.parametrize("agent", MCP_FILES)
def test_mcp_configuration(agent: AgentType):
    """The MCP configuration stands where the agent looks for it, and a variable names the file."""
    found = command(agent, mcp_config=MCP)
    path = MCP_FILES[agent]
    assert found.environment["KILN_MCP_CONFIG"] == f"{HOME}/{path}"
    if agent == AgentType.CODEX:
        servers = tomllib.loads(found.files[path])["mcp_servers"]
        assert servers == {"one": {"command": "run-one", "args": ["-v"], "env": {"TOKEN": 'a"b\\c\x7f'}}}
    else:
        assert json.loads(found.files[path])["mcpServers"] == MCP["mcpServers"]
    if agent == AgentType.CLAUDE_CODE:
        assert f"--mcp-config={HOME}/{path}" in found.argv


def test_mcp_configuration_that_codex_cannot_have():
    """What is no list of servers fails the pod with a sentence."""
    with pytest.raises(OperationFailedError, match="custom_mcp_config: codex needs"):
        command(AgentType.CODEX, mcp_config={"mcpServers": ["one"]})


def test_first_start_asks_nothing():
    """What agents ask at their first start is answered: trust, disclaimers, and the key that the pod was given."""
    claude = command(environment={"ANTHROPIC_API_KEY": "k" * 30 + "end"}).files
    state = json.loads(claude[".claude.json"])
    assert state["hasCompletedOnboarding"]
    assert state["projects"][WORK]["hasTrustDialogAccepted"]
    assert state["customApiKeyResponses"]["approved"] == ["k" * 17 + "end"]
    codex = command(AgentType.CODEX, environment={"OPENAI_API_KEY": "key"}).files
    assert tomllib.loads(codex[".codex/config.toml"])["projects"][WORK]["trust_level"] == "trusted"
    assert json.loads(codex[".codex/auth.json"]) == {"OPENAI_API_KEY": "key"}
    gemini = json.loads(command(AgentType.GEMINI, environment={"GEMINI_API_KEY": "key"}).files[".gemini/settings.json"])
    assert gemini["security"] == {"folderTrust": {"enabled": False}, "auth": {"selectedType": "gemini-api-key"}}


def test_custom_command():
    """A custom command is a program with arguments: no shell, no files of an agent's, prompts at its terminal."""
    found = command(custom_command="my tool", custom_args=["a b", "$c"], mcp_config=MCP, auto_close=True)
    assert (found.argv, found.prompted) == (["my tool", "a b", "$c"], 0)
    assert found.files == {"mcp.json": json.dumps(MCP)}
    assert found.environment == {"KILN_MCP_CONFIG": f"{HOME}/mcp.json"}


def test_available_agents(tmp_path: Path):
    """A runner offers the agents whose programs it finds, executable, on the path that agents have."""
    for agent, mode in {AgentType.CODEX: 0o755, AgentType.CURSOR: 0o755, AgentType.GEMINI: 0o644}.items():
        program = tmp_path / PROGRAMS[agent]
        program.touch()
        program.chmod(mode)
    assert available_agents(str(tmp_path)) == ["codex", "cursor"]
