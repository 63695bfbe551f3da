"""The directories of tools' runs: each for one run and its worker's user alone, gone with the run or with the worker."""

import base64
import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

# The worker's pid follows the kind, so that a later worker knows what nobody owns any more.
RUN_KINDS = ("packer", "container", "transfer")
# What a tool that talks to other hosts needs of the worker's environment.
NETWORK_ENVIRONMENT = (
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "NO_PROXY",
    "https_proxy",
    "http_proxy",
    "no_proxy",
    "SSL_CERT_FILE",
)


def new_run_dir(work_dir: Path, kind: str) -> Path:
    """A new directory (mode 0700) for a run of this kind, which is one of RUN_KINDS."""
    work_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{kind}-{os.getpid()}-", dir=work_dir))


def sweep_work_dir(work_dir: Path) -> None:
    """Removes the directories of runs whose worker is no more: a killed one leaves secrets behind in them."""
    with contextlib.suppress(FileNotFoundError):
        for folder in work_dir.iterdir():
            kind, _, rest = folder.name.partition("-")
            owner = rest.partition("-")[0]
            if kind in RUN_KINDS and not (owner.isdigit() and Path(f"/proc/{owner}").exists()):
                shutil.rmtree(folder, ignore_errors=True)


def write_private(path: Path, text: str) -> None:
    """Makes a file that nobody else can read (mode 0600). Raises FileExistsError."""
    with open(path, "x", opener=_private, encoding="utf-8") as file:
        file.write(text)


def base_environment(folder: Path) -> dict[str, str]:
    """An environment that has nothing of the worker's but its PATH."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "LANG": "C.UTF-8",
        "HOME": str(folder),
        "TMPDIR": str(folder),
    }


def inherited(*names: str) -> dict[str, str]:
    """Those of the worker's variables that are set."""
    return {name: os.environ[name] for name in names if name in os.environ}


def registry_login(host: str, user: str, password: str, **more: object) -> str:
    """A Docker `config.json`, which skopeo reads too, that logs in to one registry."""
    auth = base64.b64encode(f"{user}:{password}".encode()).decode()
    return json.dumps({"auths": {host: {"auth": auth}}, **more})


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)
