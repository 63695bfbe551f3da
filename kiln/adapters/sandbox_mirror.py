"""The runner's copy of a repository, which its pods' repositories borrow objects from.

The origin's branches are its refs/remotes/origin/*, as fetched last; work that pods left is on refs/heads/kiln/*. Only
the runner's user writes here and every agent may read. Nothing is ever pruned: pods may need it.
"""

import base64
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from kiln.adapters.sandbox_files import make_passable
from kiln.adapters.sandbox_steps import TIMED_OUT, Done, Step, file_lock, run, whole
from kiln.errors import OperationFailedError
from kiln.ports.pods import GitSource
from kiln.redact import Redactor

LOCAL_SECONDS = 120.0
NETWORK_SECONDS = 600.0
STALE_SECONDS = 10.0
REFS_BYTES = 64 * 1024 * 1024
TOKEN_USER = "x-access-token"  # noqa: S105  a user name
TRACKED = "+refs/heads/*:refs/remotes/origin/*"
TAGS = "+refs/tags/*:refs/tags/*"
MIRROR_SETTINGS = {"gc.auto": "0", "maintenance.auto": "false", "receive.autogc": "false"}
# The most telling first.
PROBLEM_MARKS = (" ! ", "fatal: ", "error: ", "")
GIT_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/nonexistent",
    "LC_ALL": "C",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_SSH_COMMAND": "ssh -o BatchMode=yes",
    # Without ext and fd, which run what a URL says.
    "GIT_ALLOW_PROTOCOL": "file:git:http:https:ssh",
}
# How this host gets to others: git is given it for the runner's own calls only.
NETWORK_VARIABLES = frozenset(
    {"http_proxy", "https_proxy", "no_proxy", "all_proxy", "ssl_cert_file", "ssl_cert_dir", "git_ssl_cainfo"}
    | {"ssh_auth_sock"}
)
SAFE_SETTINGS = {"core.hooksPath": os.devnull, "core.fsmonitor": "false", "gc.auto": "0", "commit.gpgSign": "false"}


def git_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """All that git sees: none of this host's or a user's configuration, but these settings, which no command line shows."""
    pairs = list({**SAFE_SETTINGS, **settings}.items())
    environment = {**GIT_ENVIRONMENT, "GIT_CONFIG_COUNT": str(len(pairs))}
    for number, (name, value) in enumerate(pairs):
        environment |= {f"GIT_CONFIG_KEY_{number}": name, f"GIT_CONFIG_VALUE_{number}": value}
    return environment


def network_environment(source: GitSource) -> dict[str, str]:
    """The same for a call to the repository itself, with what opens it."""
    ways = {name: value for name, value in os.environ.items() if name.lower() in NETWORK_VARIABLES}
    return {**git_environment(_opening(source)), **ways}


class Mirror:
    """One repository's copy in the directory `repositories`. `source` says where it comes from, and what opens it.

    What fetches or pushes, or takes a bundle in, is called within `locked`.
    """

    def __init__(self, repositories: Path, source: GitSource) -> None:
        self._repositories = repositories
        self._source = source
        self.path = repositories / f"{source.repository_id}.git"

    def locked(self) -> AbstractAsyncContextManager[None]:
        """Within, nobody else on this host changes it."""
        make_passable(self._repositories)
        return file_lock(self._repositories / f"{self._source.repository_id}.lock")

    async def fetch(self) -> None:
        """Makes it what the origin is now. Raises OperationFailedError if that cannot be reached."""
        if not (self.path / "config").exists():
            await self._create()
        await whole(_drop_stale_locks, self.path)
        done = await self._git("fetch", "--quiet", "--prune", "--", self._source.url, TRACKED, TAGS, network=True)
        if done.code:
            raise OperationFailedError(f"the repository cannot be fetched: {self.reason(done)}")

    async def refs(self) -> list[tuple[str, str]]:
        """The origin's branches (as refs/remotes/origin/…) and tags, each with its object's id."""
        done = await self._git("for-each-ref", "--format=%(objectname) %(refname)", "refs/remotes/origin", "refs/tags")
        return [(name, object_id) for object_id, _, name in (line.partition(" ") for line in done.lines)]

    async def keep(self, bundle: Path, branches: Mapping[str, str]) -> None:
        """Takes a bundle's refs in as branches of this copy (ref in the bundle -> branch). Raises OperationFailedError."""
        specs = [f"+{ref}:refs/heads/{branch}" for ref, branch in branches.items()]
        done = await self._git("fetch", "--quiet", "--no-tags", "--", str(bundle), *specs)
        if done.code:
            raise OperationFailedError(self.reason(done))

    async def heads_of(self, bundle: Path) -> dict[str, str]:
        """The refs of a bundle, each with its object's id; none if it is no bundle."""
        done = await self._git("bundle", "list-heads", str(bundle))
        if done.code:
            return {}
        return {name: object_id for object_id, _, name in (line.partition(" ") for line in done.lines) if name}

    async def count_new(self, branches: Sequence[str], own: str) -> int:
        """How many commits of these branches of this copy the origin has at most on branches whose names begin with `own`."""
        names = [f"refs/heads/{branch}" for branch in branches]
        others = ["--not", f"--exclude=origin/{own}*", "--remotes=origin", "--tags"]
        done = await self._git("rev-list", "--count", *names, *others)
        return int(done.output) if not done.code else 0

    async def push(self, branches: Sequence[str]) -> str | None:
        """Gives branches of this copy to the origin; returns why it did not take them, if so."""
        specs = [f"+refs/heads/{branch}:refs/heads/{branch}" for branch in branches]
        done = await self._git("push", "--quiet", "--", self._source.url, *specs, network=True)
        return self.reason(done) if done.code else None

    def reason(self, done: Done) -> str:
        """What git says is wrong, in a line without the credential."""
        if done.code == TIMED_OUT:
            return "it took too long"
        said = [line for mark in PROBLEM_MARKS for line in done.lines if line.startswith(mark) and line.strip()]
        text = said[0] if said else f"git ended with {done.code}"
        for mark in PROBLEM_MARKS:
            text = text.removeprefix(mark)
        return Redactor(secrets_of(self._source)).text(" ".join(text.split()))

    async def _create(self) -> None:
        fresh = self._repositories / f".{self._source.repository_id}.git"
        creation = ["init", "--quiet", "--bare", "--template=", "--shared=0644", "--", str(fresh)]
        settings = [["--git-dir", str(fresh), "config", *setting] for setting in MIRROR_SETTINGS.items()]
        for arguments in [creation, *settings]:
            done = await run(Step(["git", *arguments], git_environment({}), self._repositories, LOCAL_SECONDS))
            if done.code:
                raise OperationFailedError(f"the runner cannot keep a copy of the repository: {self.reason(done)}")
        fresh.rename(self.path)

    async def _git(self, *arguments: str, network: bool = False) -> Done:
        environment = network_environment(self._source) if network else git_environment({})
        argv = ["git", "--git-dir", str(self.path), *arguments]
        seconds = NETWORK_SECONDS if network else LOCAL_SECONDS
        return await run(Step(argv, environment, self.path, seconds, most_bytes=REFS_BYTES))


def _drop_stale_locks(repository: Path) -> None:
    """Locks of a git that was killed with its worker. A living one holds a reference's for moments only."""
    paths = [*repository.glob("*.lock"), *repository.glob("refs/**/*.lock")]
    for path in paths:
        with suppress(FileNotFoundError):
            if time.time() - path.lstat().st_mtime > STALE_SECONDS:
                path.unlink()


def secrets_of(source: GitSource) -> list[str]:
    """What must show nowhere: the credential, and the password in it."""
    return [part for part in {source.credential, source.credential.rpartition(":")[2]} if part]


def _opening(source: GitSource) -> dict[str, str]:
    """The settings that open the repository to git over HTTP: for its own host alone."""
    parts = urlsplit(source.url)
    if not source.credential or parts.scheme not in {"http", "https"}:
        return {}
    login = source.credential if ":" in source.credential else f"{TOKEN_USER}:{source.credential}"
    header = f"Authorization: Basic {base64.b64encode(login.encode()).decode()}"
    return {f"http.{parts.scheme}://{parts.netloc}/.extraHeader": header}
