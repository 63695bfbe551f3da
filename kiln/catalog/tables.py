"""The catalog's tables. Every change of them is a migration beside this file."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    LargeBinary,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC time on both databases: PostgreSQL keeps the zone, SQLite does not, so it is given back here."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return value.astimezone(UTC) if value is not None else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """Root of the mapped classes. Rows are read detached: nothing is loaded after a transaction's end."""

    type_annotation_map = {datetime: UtcDateTime, dict[str, Any]: JSON, list[str]: JSON, str: Text}  # noqa: RUF012


ID = String(36)
SHORT = String(255)
# What a client may send as an image's reference, made whole with its digest (kiln/references.py).
REFERENCE = String(1100)


class Installation(Base):
    """The one row that names this installation; its id is the tag on everything that Kiln makes in a cloud account."""

    __tablename__ = "installation"

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    created_at: Mapped[datetime]


class Organization(Base):
    """Who owns builds, images and keys."""

    __tablename__ = "organizations"

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    slug: Mapped[str] = mapped_column(SHORT, unique=True)
    created_at: Mapped[datetime]


class ApiKey(Base):
    """A key that opens the APIs. Only its SHA-256 is kept: 320 random bits need no slow hash."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"), index=True)
    name: Mapped[str] = mapped_column(SHORT)
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    hint: Mapped[str] = mapped_column(String(16))
    scopes: Mapped[list[str]]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    disabled_at: Mapped[datetime | None]
    # `plain` is sent as it is; of an `hmac` key only the id is ever sent, and its secret is sealed (kiln/sealing.py).
    kind: Mapped[str] = mapped_column(SHORT, default="plain")
    sealed_secret: Mapped[bytes | None] = mapped_column(LargeBinary)


class Nonce(Base):
    """A signed request that was let in: the SHA-256 of its key's id and nonce, until its timestamp can no longer pass."""

    __tablename__ = "nonces"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    until: Mapped[datetime] = mapped_column(index=True)


class Build(Base):
    """One build of any kind. `run_id` is the workflow run that claimed it; `lease_until` is the attempt's own hold;
    from `closing_at` on, no attempt begins or goes on; from `publishing_at` on, the image is public whatever comes;
    `pending_image` is the AMI that EC2 is making for it; `upload_until` is set for a build that waits for its context."""

    __tablename__ = "builds"
    __table_args__ = (
        Index("ix_builds_page", "organization_id", "created_at", "id"),
        Index("ix_builds_open", "status", "created_at"),
        Index("ix_builds_api", "organization_id", "api", "created_at", "id"),
        Index("ix_builds_agent", "organization_id", "agent_name", "created_at", "id"),
        Index("ix_builds_commit", "organization_id", "source_commit", "created_at", "id"),
        Index("ix_builds_tree", "organization_id", "working_tree_hash", "created_at", "id"),
        Index("ix_builds_target", "repository", "tag", "created_at"),
    )

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    kind: Mapped[str] = mapped_column(SHORT)
    api: Mapped[str] = mapped_column(SHORT)
    platform: Mapped[str] = mapped_column(SHORT)
    status: Mapped[str] = mapped_column(SHORT)
    spec: Mapped[dict[str, Any]]
    secrets: Mapped[bytes | None] = mapped_column(LargeBinary)
    created_by: Mapped[str] = mapped_column(ID)
    created_at: Mapped[datetime]
    run_id: Mapped[str | None] = mapped_column(SHORT)
    cancel_requested_at: Mapped[datetime | None]
    attempt: Mapped[int] = mapped_column(default=0)
    lease_holder: Mapped[str | None] = mapped_column(SHORT)
    lease_until: Mapped[datetime | None]
    closing_at: Mapped[datetime | None]
    account: Mapped[str | None] = mapped_column(SHORT)
    region: Mapped[str | None] = mapped_column(SHORT)
    known_ids: Mapped[list[str]] = mapped_column(default=list)
    pending_image: Mapped[str | None] = mapped_column(SHORT)
    started_at: Mapped[datetime | None]
    deadline_at: Mapped[datetime | None]
    completed_at: Mapped[datetime | None]
    cleaned_at: Mapped[datetime | None]
    error_code: Mapped[str | None] = mapped_column(SHORT)
    error_message: Mapped[str | None]
    agent_id: Mapped[str | None] = mapped_column(ForeignKey("agents.id"))
    agent_name: Mapped[str | None] = mapped_column(SHORT)
    repository: Mapped[str | None] = mapped_column(SHORT)
    tag: Mapped[str | None] = mapped_column(SHORT)
    source_commit: Mapped[str | None] = mapped_column(SHORT)
    working_tree_hash: Mapped[str | None] = mapped_column(SHORT)
    upload_until: Mapped[datetime | None]
    context_uploaded_at: Mapped[datetime | None]
    context_started_at: Mapped[datetime | None]
    context_sha256: Mapped[str | None] = mapped_column(String(64))
    context_bytes: Mapped[int | None] = mapped_column(BigInteger)
    publishing_at: Mapped[datetime | None]


class Agent(Base):
    """What an organization's cloud builds are of. `deployed_at` is set once a pod ran from one of its images."""

    __tablename__ = "agents"
    __table_args__ = (UniqueConstraint("organization_id", "name"),)

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    name: Mapped[str] = mapped_column(SHORT)
    created_at: Mapped[datetime]
    deployed_at: Mapped[datetime | None]


class Tag(Base):
    """A tag of a container image: what its newest build is, and what it points at once one has succeeded.

    A platform image's tag has no organization. `digest`, `image_id` and `pushed_at` are null until then.
    """

    __tablename__ = "tags"
    __table_args__ = (
        UniqueConstraint("owner", "name", "tag"),
        Index("ix_tags_page", "owner", "built_at", "id"),
    )

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    organization_id: Mapped[str | None] = mapped_column(ForeignKey("organizations.id"))
    owner_type: Mapped[str] = mapped_column(SHORT)
    owner: Mapped[str] = mapped_column(SHORT)
    name: Mapped[str] = mapped_column(SHORT)
    tag: Mapped[str] = mapped_column(SHORT)
    visibility: Mapped[str] = mapped_column(SHORT)
    build_id: Mapped[str] = mapped_column(ForeignKey("builds.id"))
    built_at: Mapped[datetime]
    digest: Mapped[str | None] = mapped_column(SHORT)
    image_id: Mapped[str | None] = mapped_column(ForeignKey("images.id"))
    pushed_at: Mapped[datetime | None]


class RegistryErrand(Base):
    """Something that the registry is still to do because the catalog says so: take a tag away, and with it the manifest
    that nobody needs any more; or point a tag at a digest."""

    __tablename__ = "registry_errands"

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    repository: Mapped[str] = mapped_column(SHORT)
    tag: Mapped[str] = mapped_column(SHORT)
    digest: Mapped[str] = mapped_column(SHORT)
    source_repository: Mapped[str | None] = mapped_column(SHORT)
    created_at: Mapped[datetime] = mapped_column(index=True)


class Image(Base):
    """A finished image. `status` is `available`, `deleting`, `deleted` or `gone` (not in EC2 any more; see `gone_reason`)."""

    __tablename__ = "images"
    __table_args__ = (
        Index(
            "ix_images_ami",
            "account",
            "region",
            "reference",
            unique=True,
            sqlite_where=text("kind = 'ami'"),
            postgresql_where=text("kind = 'ami'"),
        ),
        Index("ix_images_digest", "digest", "repository"),
        Index("ix_images_page", "organization_id", "created_at", "id"),
        Index("ix_images_status", "status"),
    )

    id: Mapped[str] = mapped_column(ID, primary_key=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    build_id: Mapped[str] = mapped_column(ForeignKey("builds.id"), unique=True)
    kind: Mapped[str] = mapped_column(SHORT)
    api: Mapped[str] = mapped_column(SHORT)
    reference: Mapped[str] = mapped_column(REFERENCE, index=True)
    account: Mapped[str] = mapped_column(SHORT)
    region: Mapped[str] = mapped_column(SHORT)
    platform: Mapped[str] = mapped_column(SHORT)
    provider: Mapped[str] = mapped_column(SHORT)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    snapshot_ids: Mapped[list[str]]
    kept_snapshot_ids: Mapped[list[str]] = mapped_column(default=list)
    simulated: Mapped[bool]
    status: Mapped[str] = mapped_column(SHORT)
    created_at: Mapped[datetime]
    deleting_at: Mapped[datetime | None]
    gone_at: Mapped[datetime | None]
    gone_reason: Mapped[str | None]
    repository: Mapped[str | None] = mapped_column(SHORT)
    digest: Mapped[str | None] = mapped_column(SHORT)
    platforms: Mapped[list[str] | None]


class Template(Base):
    """An organization's image: an AMI made from one of its machines, or from a list of software.

    Its status is its build's, and its AMI's once there is one. `name_key` is the name case-folded, to search in;
    `software` a list of `{"id", "name", "size"}`; `machine_id` the machine that it was made from.
    """

    __tablename__ = "templates"
    __table_args__ = (
        # Holds all that a page is chosen by. Not a partial index: SQLite would read the rows beside it.
        Index("ix_templates_page", "organization_id", "deleted_at", "id", "name_key"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    name: Mapped[str] = mapped_column(SHORT)
    name_key: Mapped[str] = mapped_column(SHORT)
    region: Mapped[str] = mapped_column(SHORT)
    size_gb: Mapped[int]
    source: Mapped[str] = mapped_column(SHORT)
    software: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    build_id: Mapped[str] = mapped_column(ForeignKey("builds.id"), unique=True)
    machine_id: Mapped[int | None]
    created_at: Mapped[datetime]
    deleted_at: Mapped[datetime | None]


class Machine(Base):
    """A machine of an organization: a name and an id that stay, over EC2 instances that come and go.

    `ec2_state` is EC2's own word for `instance_id` as it was at `state_at`. Each assignment of an image counts
    `assignment` up; the instance carries out the one numbered `built_assignment`, so that a machine awaits an image while
    the two differ. While an operation is open, `operation` says which, and `next_instance_id` is what it has launched;
    `launching_template_id` and `launching_assignment` are what it launches from, whatever is assigned meanwhile.
    `imaging_build_id` is the last build that made an image of this machine.
    """

    __tablename__ = "machines"
    __table_args__ = (
        UniqueConstraint("account", "region", "instance_id"),
        Index("ix_machines_page", "organization_id", "id"),
        Index("ix_machines_operation", "operation", "operation_at"),
        Index("ix_machines_template", "template_id"),
        Index("ix_machines_launching", "launching_template_id"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    name: Mapped[str] = mapped_column(SHORT)
    # Case-folded, a name may be three times as long.
    name_key: Mapped[str]
    region: Mapped[str] = mapped_column(SHORT)
    instance_type: Mapped[str] = mapped_column(SHORT)
    disk_gib: Mapped[int]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    account: Mapped[str | None] = mapped_column(SHORT)
    simulated: Mapped[bool]
    instance_id: Mapped[str | None] = mapped_column(SHORT)
    ec2_state: Mapped[str | None] = mapped_column(SHORT)
    state_at: Mapped[datetime | None]
    placement: Mapped[dict[str, Any]] = mapped_column(default=dict)
    tags: Mapped[dict[str, Any]] = mapped_column(default=dict)
    base_image_id: Mapped[int | None]
    template_id: Mapped[int | None] = mapped_column(ForeignKey("templates.id"))
    assignment: Mapped[int] = mapped_column(default=0)
    built_assignment: Mapped[int] = mapped_column(default=0)
    operation: Mapped[str | None] = mapped_column(SHORT)
    operation_number: Mapped[int] = mapped_column(default=0)
    operation_at: Mapped[datetime | None]
    operation_run: Mapped[str | None] = mapped_column(SHORT)
    operation_forced: Mapped[bool] = mapped_column(default=False)
    operation_error: Mapped[str | None]
    launching_template_id: Mapped[int | None] = mapped_column(ForeignKey("templates.id"))
    launching_assignment: Mapped[int | None]
    next_instance_id: Mapped[str | None] = mapped_column(SHORT)
    imaging_build_id: Mapped[str | None] = mapped_column(ForeignKey("builds.id"))


class RetiredInstance(Base):
    """An instance that no machine has any more, or never came to have: it is to be terminated. Gone from here, it is."""

    __tablename__ = "retired_instances"

    region: Mapped[str] = mapped_column(SHORT, primary_key=True)
    instance_id: Mapped[str] = mapped_column(SHORT, primary_key=True)
    account: Mapped[str] = mapped_column(SHORT)
    machine_id: Mapped[int] = mapped_column(index=True)
    retired_at: Mapped[datetime]


class IdempotencyKey(Base):
    """A POST that was answered already. The body is kept as a keyed digest: it may hold secrets."""

    __tablename__ = "idempotency_keys"

    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"), primary_key=True)
    key: Mapped[str] = mapped_column(SHORT, primary_key=True)
    body_digest: Mapped[str] = mapped_column(String(64))
    build_id: Mapped[str] = mapped_column(ID)
    status_code: Mapped[int]
    response: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(index=True)


class Worker(Base):
    """A worker's presence, noted every few seconds; a queue without a live one is said to be so."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(SHORT, primary_key=True)
    role: Mapped[str] = mapped_column(SHORT)
    queues: Mapped[list[str]]
    slots: Mapped[int]
    seen_at: Mapped[datetime]
