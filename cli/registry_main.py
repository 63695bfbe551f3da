"""The registry's process: tidies its storage while nobody uses it, and becomes `docker-registry`.

`python -m cli.registry_main CONFIG STORAGE`. Standard library only.
"""

import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

PROGRAM = "docker-registry"
REPOSITORIES = Path("docker/registry/v2/repositories")
STAGING = "kiln-staging"
# A build whose engine is not Kiln's own may be pushing while the registry is started again.
STAGING_AGE = timedelta(hours=1)
# Garbage collection reads every manifest; it must not keep a start waiting for long, nor every one.
COLLECTION_INTERVAL = timedelta(days=1)
COLLECTION_TIMEOUT = timedelta(seconds=10)


def main() -> int:
    """Does not return unless the registry cannot be executed."""
    config, storage = Path(sys.argv[1]), Path(sys.argv[2])
    # The registry lets its environment overrule its configuration.
    env = {name: value for name, value in os.environ.items() if not name.startswith("REGISTRY_")}
    sweep_staging(storage)
    collect_garbage(config, storage, env)
    try:
        os.execvpe(PROGRAM, [PROGRAM, "serve", str(config)], env)  # noqa: S606  no shell is wanted
    except OSError as error:
        print(f"{PROGRAM}: {error.strerror}", file=sys.stderr)  # noqa: T201
    return 1


def sweep_staging(storage: Path) -> None:
    """Removes builds' staging repositories that hold no manifest any more."""
    staging = storage / REPOSITORIES / STAGING
    oldest = time.time() - STAGING_AGE.total_seconds()
    for repository in staging.iterdir() if staging.is_dir() else ():
        with suppress(OSError):
            touched = max(path.stat().st_mtime for path in (repository, *repository.iterdir()))
            manifests = repository.glob("_manifests/revisions/*/*/link")
            if touched < oldest and next(manifests, None) is None:
                shutil.rmtree(repository)


def collect_garbage(config: Path, storage: Path, env: dict[str, str]) -> None:
    """Removes blobs that no manifest needs, at most once a day; breaking off loses nothing but the rest of the work."""
    stamp = storage / "collected"
    if not (storage / REPOSITORIES).is_dir() or _is_recent(stamp):
        return
    try:
        subprocess.run(
            [PROGRAM, "garbage-collect", str(config)],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=COLLECTION_TIMEOUT.total_seconds(),
        )
    except (OSError, subprocess.SubprocessError) as error:
        print(f"registry: garbage collection: {error}", file=sys.stderr)  # noqa: T201
    stamp.touch()


def _is_recent(stamp: Path) -> bool:
    with suppress(OSError):
        return time.time() - stamp.stat().st_mtime < COLLECTION_INTERVAL.total_seconds()
    return False


if __name__ == "__main__":
    sys.exit(main())
