"""The user that a pod's agent runs as: one of the host's by name, or a number of the pod's own that no user has."""

import ctypes
import os
import pwd
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kiln.adapters.pod_shim_tree import prctl

PR_SET_NO_NEW_PRIVS = 38
# As unshare(2) and mount(2) have them.
CLONE_NEWNS = 0x00020000
MS_BIND = 0x1000
MS_REC = 0x4000
MS_SLAVE = 0x80000
ACCOUNTS = Path("/etc/passwd")
OWN_ACCOUNTS = Path("passwd")


class Failure(Exception):  # noqa: N818  told of, not handled
    """Why an agent could not be started, and at which step."""

    def __init__(self, step: str, problem: str) -> None:
        super().__init__(f"{step}: {problem}")


@dataclass(frozen=True)
class Account:
    """A user to change to. `listed`: the host's own list of users has it."""

    uid: int
    gid: int
    groups: Sequence[int]
    listed: bool


def account_of(user: str | None) -> Account | None:
    """The user by name, or by number: that one has the group of the same number and no other. None if this process can
    or need not change. Raises Failure."""
    if user is None:
        return None
    account = _numbered(int(user)) if user.isdecimal() else _named(user)
    if os.geteuid() == account.uid:
        return None
    if os.geteuid():
        raise Failure("user", f"only root can run an agent as {user}")
    return account


def _named(name: str) -> Account:
    try:
        entry = pwd.getpwnam(name)
    except KeyError as error:
        raise Failure("user", f"there is no user {name}") from error
    return Account(entry.pw_uid, entry.pw_gid, os.getgrouplist(name, entry.pw_gid), listed=True)


def _numbered(uid: int) -> Account:
    listed = False
    with suppress(KeyError):
        listed = bool(pwd.getpwuid(uid))
    return Account(uid, uid, (), listed)


def drop_to(account: Account | None) -> None:
    """Becomes the user for good, and nobody with more rights ever after."""
    if account:
        os.setgroups(account.groups)
        os.setresgid(account.gid, account.gid, account.gid)
        os.setresuid(account.uid, account.uid, account.uid)
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def list_account(account: Account | None, environment: Mapping[str, str]) -> bool:
    """Writes a list of users that has this one too to the working directory, for `show_accounts`; whether it is needed:
    programs that ask who they are (ssh, Node's `os.userInfo`) fail for a user who is not in the list."""
    if account is None or account.listed:
        return False
    name, home = environment.get("USER") or "agent", environment.get("HOME", "/")
    fields = [name, "x", str(account.uid), str(account.gid), "", home, "/bin/sh"]
    if any(character in "".join(fields) for character in ":\n"):
        return False
    with suppress(OSError):
        OWN_ACCOUNTS.write_bytes(ACCOUNTS.read_bytes() + (":".join(fields) + "\n").encode())
        OWN_ACCOUNTS.chmod(0o644)
        return True
    return False


def show_accounts() -> None:
    """Puts that list in the place of the host's, for the calling process and its descendants alone: in mounts of their
    own, which end with them. Where this process may not, nothing changes."""
    libc = ctypes.CDLL(None)
    libc.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]
    if libc.unshare(CLONE_NEWNS) == 0 and libc.mount(None, b"/", None, MS_REC | MS_SLAVE, None) == 0:
        libc.mount(os.fsencode(OWN_ACCOUNTS), os.fsencode(ACCOUNTS), None, MS_BIND, None)
