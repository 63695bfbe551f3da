"""The catalog's tables of runners and pods. Every change of them is a migration, as of the others (`tables.py`)."""

from datetime import datetime
from typing import Any

from sqlalchemy import ForeignKey, Index, LargeBinary, String, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from kiln.catalog.tables import ID, SHORT, Base

CLAIMED = "run_id IS NOT NULL"


class Runner(Base):
    """A worker process on some host that runs pods. Only its token's SHA-256 is kept. `incarnation` is the process that
    registered last: what an earlier one says is refused. `limits` are what its host can enforce."""

    __tablename__ = "runners"
    __table_args__ = (UniqueConstraint("organization_id", "name"),)

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    name: Mapped[str] = mapped_column(SHORT)
    token_hash: Mapped[str] = mapped_column(String(64), unique=True)
    hint: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime]
    disabled_at: Mapped[datetime | None]
    incarnation: Mapped[str | None] = mapped_column(ID)
    seen_at: Mapped[datetime | None]
    max_concurrent_pods: Mapped[int] = mapped_column(default=0)
    allows_custom_commands: Mapped[bool] = mapped_column(default=False)
    available_agents: Mapped[list[str]] = mapped_column(default=list)
    limits: Mapped[list[str]] = mapped_column(default=list)
    host_info: Mapped[dict[str, Any]] = mapped_column(default=dict)


class Repository(Base):
    """A git repository that an organization's pods may work on. `url` holds no credential; that is sealed."""

    __tablename__ = "repositories"
    __table_args__ = (UniqueConstraint("organization_id", "name"), {"sqlite_autoincrement": True})

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    name: Mapped[str] = mapped_column(SHORT)
    url: Mapped[str]
    default_branch: Mapped[str] = mapped_column(SHORT)
    sealed_credential: Mapped[bytes | None] = mapped_column(LargeBinary)
    created_at: Mapped[datetime]


class Pod(Base):
    """One agent at work on a runner. `attempt` counts how often its work was begun, `shim` is the process that won; from
    `lease_until` on nobody vouches for it. `secrets` are gone at its end, `run_id` once its workflow has ended too."""

    __tablename__ = "pods"
    __table_args__ = (
        Index("ix_pods_page", "organization_id", "created_at", "id"),
        # Holds all that a page of some statuses is chosen by: each status is a range of it.
        Index("ix_pods_status", "organization_id", "status", "created_at", "id", "runner_id"),
        Index("ix_pods_runner", "runner_id", "status"),
        Index("ix_pods_open", "status", "created_at"),
        Index("ix_pods_run", "run_id", sqlite_where=text(CLAIMED), postgresql_where=text(CLAIMED)),
    )

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    key: Mapped[str] = mapped_column(String(16), unique=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    runner_id: Mapped[str] = mapped_column(ForeignKey("runners.id"))
    status: Mapped[str] = mapped_column(SHORT)
    spec: Mapped[dict[str, Any]]
    initial_prompt: Mapped[str | None]
    secrets: Mapped[bytes | None] = mapped_column(LargeBinary)
    image_id: Mapped[str | None] = mapped_column(ForeignKey("images.id"))
    created_by: Mapped[str] = mapped_column(ID)
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    exit_code: Mapped[int | None]
    error: Mapped[str | None]
    run_id: Mapped[str | None] = mapped_column(SHORT)
    terminate_requested_at: Mapped[datetime | None]
    attempt: Mapped[int] = mapped_column(default=0)
    shim: Mapped[str | None] = mapped_column(ID)
    lease_until: Mapped[datetime | None]


class PodPrompt(Base):
    """A prompt for a pod's agent, numbered from 1 without a gap; `taken_at` is when its shim had it."""

    __tablename__ = "pod_prompts"

    pod_id: Mapped[str] = mapped_column(ForeignKey("pods.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    created_at: Mapped[datetime]
    taken_at: Mapped[datetime | None]
