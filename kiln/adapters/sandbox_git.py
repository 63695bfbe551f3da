"""Git worktrees as sandboxes: each of a bare repository of the pod's own, which borrows the objects of a mirror.

What runs in a repository or worktree that an agent has been in is code of the agent's (filters, hooks): it runs as the
pod's user. The runner's user works in the mirror alone (sandbox_mirror.py).
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from kiln.adapters.sandbox_files import Places, make_own
from kiln.adapters.sandbox_mirror import LOCAL_SECONDS, NETWORK_SECONDS, Mirror, git_environment
from kiln.adapters.sandbox_steps import Done, PodUser, Step, run
from kiln.errors import OperationFailedError
from kiln.ports.pods import GitSource
from kiln.ports.sandboxes import Say

SOURCE = "git.json"
CONCLUDED = "concluded"
BUNDLE = "unpushed.bundle"
EMAIL = "pod@kiln.invalid"
MOST_BRANCHES = 100
NO_CREDENTIAL = "the runner was started anew since, and has no credential for it"

# $1 URL, $2 objects of the mirror, $3 branch, $4 worktree; standard input: the origin's refs.
SET_UP = """
git init --quiet --bare --template= .
git config remote.origin.url "$1"
git config remote.origin.fetch '+refs/heads/*:refs/remotes/origin/*'
printf '%s\\n' "$2" > objects/info/alternates
cat > packed-refs
git worktree add --quiet --track -b "$3" -- "$4" "refs/remotes/origin/$3"
"""

# $1 message. Exits with 3 if there was something to commit. What a killed git has locked, nobody holds any more.
COMMITTED = 3
COMMIT = """
git rev-parse --is-inside-work-tree > /dev/null
rm -f -- "$(git rev-parse --git-path index.lock)" "$(git rev-parse --git-path HEAD.lock)"
git add --all --ignore-errors || true
git diff --cached --quiet && exit 0
git commit --quiet --no-verify --message "$1"
exit 3
"""

# Standard input: what is on the origin, as ^ID. Writes a bundle of the rest, nothing if there is no rest.
TO_BUNDLE = """
excluded=$(cat)
git rev-parse --quiet --verify 'HEAD^{commit}' > /dev/null && set -- HEAD
new=$(printf '%s\\n' "$excluded" | git rev-list --max-count=1 "$@" --branches --stdin)
[ -z "$new" ] || printf '%s\\n' "$excluded" | git bundle create --quiet - "$@" --branches --stdin
"""


@dataclass(frozen=True)
class Tenant:
    """The pod whose worktree it is."""

    key: str
    places: Places
    user: PodUser


class Worktrees:
    """The worktrees of a host's pods. A credential is kept in memory alone, for as long as this process lives."""

    def __init__(self, repositories: Path) -> None:
        self._repositories = repositories
        self._credentials: dict[int, str] = {}

    async def prepare(self, tenant: Tenant, source: GitSource) -> None:
        """Makes the worktree, in a sandbox without one. Raises OperationFailedError."""
        self._credentials[source.repository_id] = source.credential
        mirror = Mirror(self._repositories, source)
        async with mirror.locked():
            await mirror.fetch()
            refs = await mirror.refs()
        if f"refs/remotes/origin/{source.branch}" not in dict(refs):
            raise OperationFailedError(f"branch {source.branch} is not in the repository")
        make_own(tenant.places.repository, tenant.user.uid)
        done = await _as_pod(tenant, SET_UP, _set_up_arguments(tenant, mirror, source), stdin=_packed(refs))
        if done.code:
            raise OperationFailedError(f"the worktree cannot be made: {mirror.reason(done)}")
        _note(tenant.places.pod, source)

    async def conclude(self, tenant: Tenant, say: Say) -> None:
        """Keeps what was not pushed, and tells where; once. Raises OSError if the host lets it not be kept now."""
        pod = tenant.places.pod
        if not (pod / SOURCE).exists() or (pod / CONCLUDED).exists():
            return
        try:
            for line in await self._keep_work(tenant):
                await say(line)
        except OperationFailedError as error:
            await say(f"unpushed work cannot be kept: {error}")
        (pod / CONCLUDED).touch()

    async def _keep_work(self, tenant: Tenant) -> list[str]:
        """What to tell of it."""
        source, has_credential = self._source(tenant.places.pod)
        mirror = Mirror(self._repositories, source)
        changes, lost = await _commit(tenant, mirror)
        bundle = tenant.places.pod / BUNDLE
        try:
            await _bundle(tenant, mirror, bundle)
            if not bundle.stat().st_size:
                return lost
            async with mirror.locked():
                branches, commits = await _take_over(tenant.key, mirror, bundle)
                if not branches:
                    return lost
                problem = await mirror.push(branches) if has_credential else NO_CREDENTIAL
        finally:
            bundle.unlink(missing_ok=True)
        return [*lost, _sentence(branches, commits - changes, changes=changes, problem=problem)]

    def _source(self, pod: Path) -> tuple[GitSource, bool]:
        """Where the pod's repository comes from, and whether this process has what opens it."""
        noted = json.loads((pod / SOURCE).read_text())
        needs_credential = noted.pop("needs_credential")
        credential = self._credentials.get(noted["repository_id"], "")
        return GitSource(**noted, credential=credential), bool(credential) or not needs_credential


def identity(key: str) -> str:
    """A user's git configuration: whom the pod's commits are by, unless the agent changes it."""
    return f"[user]\n\tname = {name_of(key)}\n\temail = {EMAIL}\n"


def name_of(key: str) -> str:
    return f"Kiln pod {key}"


def forget(pod: Path) -> None:
    """The pod has no worktree as yet."""
    for name in (SOURCE, CONCLUDED, BUNDLE):
        (pod / name).unlink(missing_ok=True)


async def _take_over(key: str, mirror: Mirror, bundle: Path) -> tuple[list[str], int]:
    """Takes a bundle into the mirror; the branches that hold what the origin does not have now, and how many commits."""
    branches = _branches(key, await mirror.heads_of(bundle))
    await mirror.keep(bundle, branches)
    # What the agent pushed by itself was not known when the bundle was made.
    with suppress(OperationFailedError):
        await mirror.fetch()
    own = _branch(key)
    new = [branch for branch in branches.values() if await mirror.count_new([branch], own)]
    return new, await mirror.count_new(new, own) if new else 0


def _branch(key: str) -> str:
    """What the names of the branches begin with that keep a pod's work. What is there was brought there by an earlier call,
    which was cut off before it could tell."""
    return f"kiln/{key}"


def _branches(key: str, heads: Mapping[str, str]) -> dict[str, str]:
    """Where each ref of a bundle is kept: what was checked out as kiln/KEY, the pod's other branches by their names."""
    found = {"HEAD": _branch(key)} if "HEAD" in heads else {}
    for ref, object_id in heads.items():
        if ref.startswith("refs/heads/") and object_id != heads.get("HEAD") and len(found) < MOST_BRANCHES:
            found[ref] = f"{_branch(key)}-{ref.removeprefix('refs/heads/')}"
    return found


async def _commit(tenant: Tenant, mirror: Mirror) -> tuple[bool, list[str]]:
    """Commits what is not; whether there was anything, and what to tell if that cannot be done."""
    done = await _as_pod(tenant, COMMIT, [f"Uncommitted work of pod {tenant.key}"], cwd=tenant.places.work)
    if done.code in {0, COMMITTED}:
        return done.code == COMMITTED, []
    return False, [f"uncommitted changes cannot be kept: {mirror.reason(done)}"]


async def _bundle(tenant: Tenant, mirror: Mirror, path: Path) -> None:
    """Writes the pod's commits that the mirror does not know as the origin's; an empty file if there are none."""
    own = f"refs/remotes/origin/{_branch(tenant.key)}"
    known = "".join(f"^{object_id}\n" for name, object_id in await mirror.refs() if not name.startswith(own))
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        done = await _as_pod(tenant, TO_BUNDLE, [], cwd=tenant.places.work, stdin=known, stdout=file.fileno())
    if done.code:
        raise OperationFailedError(mirror.reason(done))


async def _as_pod(  # noqa: PLR0913  what makes a step
    tenant: Tenant,
    script: str,
    arguments: Sequence[str],
    *,
    cwd: Path | None = None,
    stdin: str = "",
    stdout: int | None = None,
) -> Done:
    """Runs a shell script as the pod's user."""
    environment = {
        **git_environment({"user.name": name_of(tenant.key), "user.email": EMAIL}),
        "GIT_CEILING_DIRECTORIES": str(tenant.places.sandbox),
    }
    step = Step(
        ["sh", "-ec", script, "sh", *arguments],
        environment,
        cwd or tenant.places.repository,
        LOCAL_SECONDS,
        user=tenant.user,
        stdin=stdin.encode(),
        stdout=stdout,
    )
    return await run(step if stdout is None else replace(step, seconds=NETWORK_SECONDS))


def _set_up_arguments(tenant: Tenant, mirror: Mirror, source: GitSource) -> list[str]:
    return [source.url, str(mirror.path / "objects"), source.branch, str(tenant.places.work)]


def _packed(refs: Sequence[tuple[str, str]]) -> str:
    """Refs as git keeps many of them in one file (gitrepository-layout(5), packed-refs)."""
    return "".join(f"{object_id} {name}\n" for name, object_id in refs)


def _note(pod: Path, source: GitSource) -> None:
    """What a later process must know. Without the credential, which is written nowhere."""
    noted = {"repository_id": source.repository_id, "url": source.url, "branch": source.branch}
    (pod / SOURCE).write_text(json.dumps({**noted, "needs_credential": bool(source.credential)}))


def _sentence(branches: Sequence[str], commits: int, *, changes: bool, problem: str | None) -> str:
    counted = [f"{commits} commit" + "s" * (commits != 1)] * (commits > 0) + ["uncommitted changes"] * changes
    verb = "is" if commits == 1 and not changes else "are"
    where = ("branch " if len(branches) == 1 else "branches ") + ", ".join(branches)
    work = f"unpushed work: {' and '.join(counted)} {verb} on {where}"
    if problem is None:
        return f"{work} of the repository"
    return f"{work} in the runner's copy of the repository, since the repository did not take it: {problem}"
