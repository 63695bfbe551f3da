"""What the embedded registry's storage is rid of before the registry serves."""

import os
import time
from pathlib import Path

from cli.registry_main import REPOSITORIES, STAGING, STAGING_AGE, sweep_staging


def staged(storage: Path, build: str, *, manifest: bool, age_seconds: float) -> Path:
    """A build's staging repository as the registry keeps it."""
    repository = storage / REPOSITORIES / STAGING / build
    revision = repository / "_manifests" / "revisions" / "sha256" / "ab12"
    for folder in (revision, repository / "_layers"):
        folder.mkdir(parents=True)
    if manifest:
        (revision / "link").write_text("sha256:ab12")
    then = time.time() - age_seconds
    for path in (repository, *repository.iterdir()):
        os.utime(path, (then, then))
    return repository


def test_staging_repositories_without_manifests_are_removed(tmp_path: Path) -> None:
    """One whose image waits to be published stays, and one that somebody may be pushing to."""
    old = STAGING_AGE.total_seconds() + 60
    empty = staged(tmp_path, "empty", manifest=False, age_seconds=old)
    full = staged(tmp_path, "full", manifest=True, age_seconds=old)
    fresh = staged(tmp_path, "fresh", manifest=False, age_seconds=0)
    sweep_staging(tmp_path)
    assert [path.exists() for path in (empty, full, fresh)] == [False, True, True]


def test_a_storage_that_was_never_used_is_left_alone(tmp_path: Path) -> None:
    """Nothing is made."""
    sweep_staging(tmp_path)
    assert list(tmp_path.iterdir()) == []
