"""Asks a git repository whether it has a branch, before a runner is sent to work on it."""

from contextlib import suppress
from pathlib import Path

from kiln.adapters.sandbox_mirror import network_environment
from kiln.adapters.sandbox_steps import Step, run
from kiln.ports.pods import GitSource

# A request waits for it.
PATIENCE_SECONDS = 3.0
NO_SUCH_REF = 2


class GitRemotes:
    """`kiln.ports.pods.Remotes`, by `git ls-remote` (https://git-scm.com/docs/git-ls-remote)."""

    async def lacks_branch(self, source: GitSource) -> bool:
        """Whether the repository says that it has no such branch. One that does not say anything in time has it, for all
        that is known here: its runner may get there where this host does not."""
        argv = ["git", "ls-remote", "--exit-code", "--quiet", "--", source.url, f"refs/heads/{source.branch}"]
        step = Step(argv, network_environment(source), Path("/"), PATIENCE_SECONDS)
        with suppress(OSError):
            return (await run(step)).code == NO_SUCH_REF
        return False
