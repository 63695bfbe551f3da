"""The command line, files and variables with which each agent is started, unattended, in its sandbox.

Approvals are off: the sandbox is the fence. What an agent would ask at its first start (theme, trust, disclaimers, which
key) is answered by files in its HOME. An agent works interactively, and takes further prompts at its terminal, unless
the pod closes by itself or has a number of turns: then it works off its first prompt and exits.

As of claude-code 2.1, codex 0.169, gemini 0.61, cursor-agent 2026.07 and aider 0.86, by their own `--help`; cursor-agent
by https://cursor.com/docs/cli/reference/parameters and its changelog.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from kiln.errors import OperationFailedError
from kiln.models import AGENT_PATH, AgentType
from kiln.ports.pods import PodOrder

# Linux takes 128 KiB in one argument; a longer prompt goes to the terminal.
MAX_ARGUMENT_BYTES = 100_000
MCP_FILE = "mcp.json"
MCP_VARIABLE = "KILN_MCP_CONFIG"
TURNS_VARIABLE = "KILN_MAX_TURNS"
# Claude Code knows an approved key by its end.
CLAUDE_KEY_CHARS = 20
CODEX_NAMES = {"headers": "http_headers"}
CODEX_IGNORED = frozenset({"type"})


@dataclass(frozen=True)
class AgentCommand:
    """How an agent is started: `files` (path below HOME -> text, mode 0600) and `environment` are additions to its
    sandbox; `prompted` is 1 if `argv` holds the initial prompt, else 0."""

    argv: Sequence[str]
    files: Mapping[str, str] = field(repr=False, default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    prompted: int = 0


@dataclass(frozen=True)
class _Task:
    """What an agent is started for. `prompt` None: nothing on the command line. `headless`: work it off, and exit."""

    prompt: str | None
    headless: bool
    max_turns: int | None
    mcp_config: Mapping[str, object] | None
    environment: Mapping[str, str]
    home: str
    work: str

    def last(self) -> list[str]:
        """The prompt as what follows the options, whatever it begins with."""
        return [] if self.prompt is None else ["--", self.prompt]

    def valued(self, option: str) -> list[str]:
        return [] if self.prompt is None else [f"{option}={self.prompt}"]


def agent_command(order: PodOrder, home: str, work: str) -> AgentCommand:
    """How the order's agent is started with this HOME and working directory. Raises OperationFailedError if the agent
    cannot be given what was asked for."""
    task = _task(order, home, work)
    if order.spec.custom_command is None:
        command = _STARTS[order.spec.agent_type](task)
    else:
        argv = [order.spec.custom_command, *order.custom_args]
        command = AgentCommand(argv, _mcp_files(task), _mcp_variable(task))
    turns = {} if task.max_turns is None else {TURNS_VARIABLE: str(task.max_turns)}
    return replace(command, environment={**command.environment, **turns}, prompted=int(task.prompt is not None))


def available_agents(path: str = AGENT_PATH) -> list[str]:
    """The agent types whose program is found on this path."""
    return [agent.value for agent, program in PROGRAMS.items() if shutil.which(program, path=path)]


def _task(order: PodOrder, home: str, work: str) -> _Task:
    spec = order.spec
    takes_prompt = spec.custom_command is None and bool(order.prompts) and _fits(order.prompts[0])
    prompt = order.prompts[0] if takes_prompt else None
    closes = spec.auto_close or spec.max_turns is not None
    headless = closes and prompt is not None
    if spec.agent_type == AgentType.AIDER and not headless:
        # Aider has no option for a first prompt after which it stays.
        prompt = None
    return _Task(prompt, headless, spec.max_turns, order.mcp_config, order.environment, home, work)


def _fits(prompt: str) -> bool:
    """Whether a prompt can be an argument of a command line."""
    try:
        data = prompt.encode()
    except UnicodeEncodeError:
        return False
    return len(data) <= MAX_ARGUMENT_BYTES and b"\0" not in data


def _claude(task: _Task) -> AgentCommand:
    """Knows `--max-turns` in print mode only. As root it bypasses permissions only in what it is told is a sandbox."""
    argv = [PROGRAMS[AgentType.CLAUDE_CODE], "--dangerously-skip-permissions"]
    if task.headless:
        argv.append("--print")
        if task.max_turns is not None:
            argv.append(f"--max-turns={task.max_turns}")
    if task.mcp_config is not None:
        argv.append(f"--mcp-config={task.home}/{MCP_FILE}")
    key = task.environment.get("ANTHROPIC_API_KEY", "")
    state = {
        "hasCompletedOnboarding": True,
        "theme": "dark",
        "projects": {task.work: {"hasTrustDialogAccepted": True, "hasCompletedProjectOnboarding": True}},
        "customApiKeyResponses": {"approved": [key[-CLAUDE_KEY_CHARS:]] if key else [], "rejected": []},
    }
    files = {
        ".claude.json": json.dumps(state),
        ".claude/settings.json": json.dumps({"skipDangerousModePermissionPrompt": True}),
        **_mcp_files(task),
    }
    return AgentCommand(
        [*argv, *task.last()], files, {"IS_SANDBOX": "1", "DISABLE_AUTOUPDATER": "1", **_mcp_variable(task)}
    )


def _codex(task: _Task) -> AgentCommand:
    """Its interactive mode asks for a login unless the key stands in a file of its own."""
    argv = [PROGRAMS[AgentType.CODEX]]
    if task.headless:
        argv += ["exec", "--skip-git-repo-check"]
    argv.append("--dangerously-bypass-approvals-and-sandbox")
    settings: dict[str, object] = {
        "check_for_update_on_startup": False,
        # A background server would outlive what started it.
        "features": {"daemon_auto_start": False},
        "tui": {"alternate_screen": "never"},
        "projects": {task.work: {"trust_level": "trusted"}},
    }
    if task.mcp_config is not None:
        settings["mcp_servers"] = _codex_servers(task.mcp_config)
    files = {".codex/config.toml": "".join(f"{name} = {_toml(value)}\n" for name, value in settings.items())}
    if key := task.environment.get("OPENAI_API_KEY"):
        files[".codex/auth.json"] = json.dumps({"OPENAI_API_KEY": key})
    return AgentCommand([*argv, *task.last()], files, _mcp_variable(task, ".codex/config.toml"))


def _gemini(task: _Task) -> AgentCommand:
    argv = [PROGRAMS[AgentType.GEMINI], "--yolo"]
    argv += task.valued("--prompt" if task.headless else "--prompt-interactive")
    security: dict[str, object] = {"folderTrust": {"enabled": False}}
    if task.environment.get("GEMINI_API_KEY"):
        security["auth"] = {"selectedType": "gemini-api-key"}
    settings = {"security": security, "general": {"enableAutoUpdate": False}, **(task.mcp_config or {})}
    files = {".gemini/settings.json": json.dumps(settings)}
    return AgentCommand(argv, files, _mcp_variable(task, ".gemini/settings.json"))


def _cursor(task: _Task) -> AgentCommand:
    argv = [PROGRAMS[AgentType.CURSOR], "--force", "--trust", "--approve-mcps"]
    if task.headless:
        argv.append("--print")
    path = ".cursor/mcp.json"
    return AgentCommand([*argv, *task.last()], _mcp_files(task, path), _mcp_variable(task, path))


def _aider(task: _Task) -> AgentCommand:
    if task.mcp_config is not None:
        raise OperationFailedError("aider takes no MCP configuration")
    argv = [PROGRAMS[AgentType.AIDER], "--yes-always", "--no-check-update", "--no-show-release-notes"]
    return AgentCommand([*argv, "--analytics-disable", *task.valued("--message")])


def _mcp_files(task: _Task, path: str = MCP_FILE) -> dict[str, str]:
    return {} if task.mcp_config is None else {path: json.dumps(task.mcp_config)}


def _mcp_variable(task: _Task, path: str = MCP_FILE) -> dict[str, str]:
    return {} if task.mcp_config is None else {MCP_VARIABLE: f"{task.home}/{path}"}


def _codex_servers(config: Mapping[str, object]) -> dict[str, object]:
    """`{"mcpServers": {name: {...}}}` in codex's words. Raises OperationFailedError for anything else."""
    servers = config.get("mcpServers")
    if not isinstance(servers, Mapping) or not all(isinstance(server, Mapping) for server in servers.values()):
        raise OperationFailedError(
            "custom_mcp_config: codex needs an object mcpServers, with an object for each server"
        )
    return {
        name: {CODEX_NAMES.get(key, key): value for key, value in server.items() if key not in CODEX_IGNORED}
        for name, server in servers.items()
    }


def _toml(value: object) -> str:
    """A JSON value as TOML 1.0 writes it in a line, less what is null."""
    match value:
        case bool():
            return str(value).lower()
        case Mapping():
            pairs = (f"{_toml(str(key))} = {_toml(item)}" for key, item in value.items() if item is not None)
            return f"{{{', '.join(pairs)}}}"
        case list() | tuple():
            return f"[{', '.join(_toml(item) for item in value if item is not None)}]"
        case int() | float():
            return repr(value)
        case _:
            # JSON's strings are TOML's, but for one control character that JSON leaves as it is.
            return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


PROGRAMS = {
    AgentType.CLAUDE_CODE: "claude",
    AgentType.CODEX: "codex",
    AgentType.GEMINI: "gemini",
    AgentType.CURSOR: "cursor-agent",
    AgentType.AIDER: "aider",
}
_STARTS: Mapping[AgentType, Callable[[_Task], AgentCommand]] = {
    AgentType.CLAUDE_CODE: _claude,
    AgentType.CODEX: _codex,
    AgentType.GEMINI: _gemini,
    AgentType.CURSOR: _cursor,
    AgentType.AIDER: _aider,
}
