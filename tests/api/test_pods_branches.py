"""A branch that a pod is to work on is looked for in its repository, as far as the API gets there."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kiln.catalog import repositories
from kiln.catalog.tables import Organization
from support.api_server import RunningApi
from support.pod_tenants import PodTenant, pod_refusal
from support.tenants import row_counts


@pytest.fixture
def tenant(api: RunningApi) -> Iterator[PodTenant]:
    tenant = PodTenant(api)
    yield tenant
    tenant.close()


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A repository with the branch main."""
    work = tmp_path / "origin"
    for arguments in (
        ["init", "-q", "-b", "main", str(work)],
        [
            "-C",
            str(work),
            "-c",
            "user.name=t",
            "-c",
            "user.email=t@kiln.invalid",
            "commit",
            "-q",
            "--allow-empty",
            "-m",
            "m",
        ],
    ):
        subprocess.run(["git", *arguments], check=True)
    return work


def repository(tenant: PodTenant, url: str) -> int:
    with tenant.catalog.transaction() as tx:
        owner = tx.get_one(Organization, tenant.organization_id)
        return repositories.add(tx, owner, "app", url, "main").id


def test_a_branch_that_is_not_there_is_refused(tenant: PodTenant, origin: Path) -> None:
    """A 400 that names it, and nothing is written."""
    body = {"runner_id": tenant.runner().runner_id, "repository_id": repository(tenant, str(origin))}
    before = row_counts(tenant.catalog)
    refused = pod_refusal(tenant.post(body={**body, "branch": "mai"}))
    assert refused == (400, "VALIDATION_FAILED", "branch: branch mai is not in the repository")
    assert row_counts(tenant.catalog) == before
    assert tenant.post(body={**body, "branch": "main"}).status_code == 201


def test_a_repository_that_does_not_answer_is_its_runners_matter(tenant: PodTenant, tmp_path: Path) -> None:
    """Its branch is taken for there."""
    body = {"runner_id": tenant.runner().runner_id, "repository_id": repository(tenant, str(tmp_path / "none"))}
    assert tenant.post(body={**body, "branch": "main"}).status_code == 201


def test_what_else_is_wrong_is_said_first(tenant: PodTenant, origin: Path) -> None:
    """An unknown runner is a 404, whatever the branch."""
    body = {"runner_id": "nobody", "repository_id": repository(tenant, str(origin)), "branch": "mai"}
    assert pod_refusal(tenant.post(body=body))[:2] == (404, "RESOURCE_NOT_FOUND")
