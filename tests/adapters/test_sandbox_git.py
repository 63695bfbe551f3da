"""Worktrees as sandboxes: what an agent finds, and that none of its work is lost."""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from kiln.errors import OperationFailedError
from kiln.ports.pods import GitSource, PodOrder
from support.git_server import serving
from support.pod_rig import runner_folder
from support.processes import read_proc, soon, state_of
from support.sandboxes import AS_ROOT, Origin, Sandboxed, git

KEY = "pod-aaaaaaaaaaaa"
OTHER = "pod-bbbbbbbbbbbb"
CREDENTIAL = "robot:s3cr3t-t0ken"


@pytest.fixture
async def host(mark: str) -> AsyncIterator[Sandboxed]:
    with runner_folder() as root:
        host = Sandboxed(root, mark)
        yield host
        await host.close()


@pytest.fixture
async def origin(host: Sandboxed) -> Origin:
    return await asyncio.to_thread(Origin, host.root / "origin")


async def finish(host: Sandboxed, order: PodOrder) -> list[str]:
    """What the agent prints; then its work is kept."""
    lines = await host.run(order)
    await host.sandboxes.conclude(order.key, host.say)
    return lines


async def test_worktree_at_the_branch(host: Sandboxed, origin: Origin):
    """The agent stands in a worktree at its branch, which follows the origin's, with the origin's other branches at hand."""
    script = """
        cat README feature; git -c color.ui=never status --short --branch; git remote get-url origin
        git rev-parse --is-inside-work-tree; git -c color.ui=never branch -r; git config user.name
    """
    lines = await host.run(host.order(KEY, script, source=origin.source("feature/a")))
    assert lines == [
        *("hello", "a", "## feature/a...origin/feature/a", str(origin.path), "true"),
        *("  origin/feature/a", "  origin/main", f"Kiln pod {KEY}"),
    ]


async def test_one_branch_in_two_pods(host: Sandboxed, origin: Origin):
    """Pods on one branch do not see each other's commits, branches or configuration."""
    script = "git commit -q --allow-empty -m mine; git branch own; git config kiln.own yes; git log --oneline | wc -l"
    assert await host.run(host.order(KEY, script, source=origin.source())) == ["2"]
    script = "git log --oneline | wc -l; git branch --list own; git config kiln.own"
    assert await host.run(host.order(OTHER, script, source=origin.source())) == ["1"]


async def test_second_pod_sees_what_came_meanwhile(host: Sandboxed, origin: Origin):
    """The runner's copy is brought up to date for each pod, also when branches have gone."""
    await host.run(host.order(KEY, "", source=origin.source()))
    await asyncio.to_thread(git, origin.path, "branch", "-D", "feature/a")
    await asyncio.to_thread(origin.commit, "feature/a/b", "late", "late\n")
    source = origin.source("feature/a/b")
    assert await host.run(host.order(OTHER, "cat late", source=source)) == ["late"]


async def test_unknown_branch(host: Sandboxed, origin: Origin):
    """A branch that is not there fails the pod with a sentence, and the sandbox can be removed."""
    with pytest.raises(OperationFailedError, match=r"^branch --no is not in the repository$"):
        await host.sandboxes.prepare(host.order(KEY, "", source=origin.source("--no")), host.say)
    await host.sandboxes.remove(KEY)
    assert not host.sandbox(KEY).exists()


async def test_repository_out_of_reach(host: Sandboxed):
    """Why a repository cannot be had is said without its credential."""
    source = GitSource(1, "http://127.0.0.1:9/nothing.git", "main", CREDENTIAL)
    with pytest.raises(OperationFailedError, match=r"the repository cannot be fetched: .*127.0.0.1") as raised:
        await host.sandboxes.prepare(host.order(KEY, "", source=source), host.say)
    assert "t0ken" not in str(raised.value)


@pytest.mark.parametrize("url", ["ext::sh -c touch% {}/ran", "fd::3"])
async def test_urls_that_run_programs(host: Sandboxed, url: str):
    """Git's transports that run what a URL says are refused."""
    source = GitSource(1, url.format(host.root), "main")
    with pytest.raises(OperationFailedError, match="not allowed"):
        await host.sandboxes.prepare(host.order(KEY, "", source=source), host.say)
    assert not (host.root / "ran").exists()


async def test_nothing_to_keep(host: Sandboxed, origin: Origin):
    """An agent that changed nothing, or pushed all of it, leaves no branch and no word."""
    script = "echo 1 > one; git add one; git commit -q -m one; git push -q origin HEAD:refs/heads/done"
    if AS_ROOT:
        # The origin is a directory of the test's: an agent may not write there.
        script = "git fetch -q origin || true"
    await finish(host, host.order(KEY, script, source=origin.source()))
    assert host.said == []
    assert not [branch for branch in origin.branches() if branch.startswith("kiln/")]


async def test_work_is_pushed_to_a_branch(host: Sandboxed, origin: Origin):
    """Commits and uncommitted changes come to a branch of the repository, once, and the log says so."""
    script = """
        echo 1 > one; git add one; git commit -q -m one; echo 2 > two; git add two; git commit -q -m two
        echo more >> README; echo new > 'new file'; echo '*.o' > .gitignore; touch ignored.o
    """
    await finish(host, host.order(KEY, script, source=origin.source()))
    branch = f"kiln/{KEY}"
    assert host.said == [f"unpushed work: 2 commits and uncommitted changes are on branch {branch} of the repository"]
    log = git(origin.path, "log", "--format=%an <%ae> %s", f"main..{branch}").splitlines()
    who = f"Kiln pod {KEY} <pod@kiln.invalid>"
    assert log == [f"{who} Uncommitted work of pod {KEY}", f"{who} two", f"{who} one"]
    assert git(origin.path, "show", f"{branch}:new file") == "new"
    assert "ignored.o" not in git(origin.path, "ls-tree", "--name-only", branch)
    await host.sandboxes.conclude(KEY, host.say)
    await host.sandboxes.remove(KEY)
    assert len(host.said) == 1


async def test_told_after_a_killed_runner(host: Sandboxed, origin: Origin):
    """Where work was pushed by a process that died before it could tell, the next one tells."""

    async def die(_: str) -> None:
        raise asyncio.CancelledError

    await host.run(host.order(KEY, "echo 1 > one", source=origin.source()))
    with pytest.raises(asyncio.CancelledError):
        await host.sandboxes.conclude(KEY, die)
    assert git(origin.path, "show", f"kiln/{KEY}:one") == "1"
    host.start_anew()
    await host.run(host.order(OTHER, "", source=origin.source()))
    await host.sandboxes.conclude(KEY, host.say)
    assert host.said == [f"unpushed work: 1 commit is on branch kiln/{KEY} of the repository"]


async def test_other_branches_and_detached_heads(host: Sandboxed, origin: Origin):
    """What an agent left on another branch, or on none, is kept too, each by its name."""
    script = """
        git checkout -q -b idea/1; git commit -q --allow-empty -m idea
        git checkout -q --detach main; git commit -q --allow-empty -m loose
    """
    await finish(host, host.order(KEY, script, source=origin.source()))
    names = [f"kiln/{KEY}", f"kiln/{KEY}-idea/1"]
    assert host.said == [f"unpushed work: 2 commits are on branches {', '.join(names)} of the repository"]
    assert [git(origin.path, "log", "-1", "--format=%s", name) for name in names] == ["loose", "idea"]


async def test_repository_refuses(host: Sandboxed, origin: Origin):
    """Work that the repository does not take stays in the runner's copy, also while other pods fetch, and is told of."""
    hook = origin.path / "hooks" / "pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    await finish(host, host.order(KEY, "echo 1 > one", source=origin.source()))
    [line] = host.said
    start = (
        f"unpushed work: uncommitted changes are on branch kiln/{KEY} in the runner's copy of the repository, since "
    )
    assert line.startswith(f"{start}the repository did not take it: [remote rejected]")
    await host.sandboxes.remove(KEY)
    await host.run(host.order(OTHER, "", source=origin.source()))
    mirror = host.root / "repositories" / "7.git"
    assert git(mirror, "show", f"kiln/{KEY}:one") == "1"


async def test_removal_after_a_restart_keeps_the_work(host: Sandboxed, origin: Origin):
    """A process that never saw the credential keeps the work in the runner's copy and says why."""
    await host.run(host.order(KEY, "echo 1 > one", source=origin.source(credential=CREDENTIAL)))
    host.start_anew()
    await host.sandboxes.conclude(KEY, host.say)
    assert host.said[0].endswith("the runner was started anew since, and has no credential for it")
    await host.sandboxes.remove(KEY)
    assert git(host.root / "repositories" / "7.git", "show", f"kiln/{KEY}:one") == "1"


async def test_credential_is_on_no_disk(host: Sandboxed, origin: Origin):
    """Nowhere below the runner's directory, nor in the agent's environment, is the credential to be found."""
    lines = await host.run(host.order(KEY, "env; git config --list", source=origin.source(credential=CREDENTIAL)))
    assert "t0ken" not in "\n".join(lines)
    found = await asyncio.create_subprocess_exec("grep", "-r", "-l", "t0ken", str(host.root), stdout=-1)
    assert (await found.communicate())[0] == b""


async def test_repository_with_a_password(host: Sandboxed, origin: Origin):
    """Over HTTP the runner reads and writes with the repository's credential, and the agent cannot."""
    with serving(host.root, CREDENTIAL) as url:
        source = origin.source(url=f"{url}/origin", credential=CREDENTIAL)
        script = "echo 1 > one; GIT_TERMINAL_PROMPT=0 git fetch -q 2>&1 | head -1; git remote get-url origin"
        lines = await finish(host, host.order(KEY, script, source=source))
        with pytest.raises(OperationFailedError, match="could not read Username"):
            await host.sandboxes.prepare(host.order(OTHER, "", source=replace(source, credential="")), host.say)
    assert lines[0].startswith("fatal: could not read Username")
    assert lines[1] == f"{url}/origin"
    assert git(origin.path, "show", f"kiln/{KEY}:one") == "1"


async def test_locks_of_a_killed_runner(host: Sandboxed, origin: Origin):
    """What a git of the runner's that was killed has locked does not stop the next fetch."""
    await host.run(host.order(KEY, "", source=origin.source()))
    await asyncio.to_thread(origin.commit, "main", "late", "late\n")
    lock = host.root / "repositories" / "7.git" / "refs" / "remotes" / "origin" / "main.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    os.utime(lock, (0, 0))
    assert await host.run(host.order(OTHER, "cat late", source=origin.source())) == ["late"]


@pytest.mark.skipif(not AS_ROOT, reason="only root can give agents users of their own")
async def test_agents_code_runs_as_its_own_user(host: Sandboxed, origin: Origin):
    """Filters, hooks and monitors that an agent set up are run by its own user, if at all, and their children end."""
    spy = host.root / "spied"
    spy.mkdir(mode=0o777)
    spy.chmod(0o777)
    tell = f"id -u >> {spy}/$1; (setsid sleep 600 > /dev/null &) ; cat"
    script = f"""
        printf '%s\\n' '#!/bin/sh' '{tell}' > $HOME/spy; chmod +x $HOME/spy
        git config filter.f.clean "$HOME/spy filter"; echo '* filter=f' > .gitattributes
        git config core.fsmonitor "$HOME/spy monitor"; git config core.alternateRefsCommand "$HOME/spy alternates"
        hooks=$(git rev-parse --git-path hooks); mkdir -p $hooks
        for hook in pre-commit post-commit pre-push; do cp $HOME/spy $hooks/$hook; done
        echo 1 > one; id -u
    """
    lines = await finish(host, host.order(KEY, script, source=origin.source()))
    assert (spy / "filter").exists()
    assert {uid for file in spy.iterdir() for uid in file.read_text().split()} == {lines[-1]}
    assert await soon(lambda: not _processes_of(int(lines[-1])))
    assert "uncommitted changes are on branch" in host.said[0]


async def test_ruined_repository(host: Sandboxed, origin: Origin):
    """What an agent made unreadable for git is told of, and the sandbox goes all the same."""
    await finish(host, host.order(KEY, "rm .git; rm -r ../repository.git/*", source=origin.source()))
    assert [line.partition(":")[0] for line in host.said] == ["unpushed work cannot be kept"]
    await host.sandboxes.remove(KEY)
    assert not host.sandbox(KEY).exists()


async def test_killed_git_leaves_its_locks(host: Sandboxed, origin: Origin):
    """A lock that a git of the agent's left behind does not keep its work from being kept."""
    await finish(
        host, host.order(KEY, "echo 1 > one; touch $(git rev-parse --git-dir)/index.lock", source=origin.source())
    )
    assert git(origin.path, "show", f"kiln/{KEY}:one") == "1"


def _processes_of(uid: int) -> list[str]:
    """The user's live processes."""
    pids = [entry.name for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [
        pid for pid in pids if f"Uid:\t{uid}\t".encode() in read_proc(int(pid), "status") and state_of(int(pid)) != "Z"
    ]
