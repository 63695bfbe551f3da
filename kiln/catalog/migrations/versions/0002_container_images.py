"""container images: their builds, tags, agents, and the registry's errands"""

from alembic import op
import sqlalchemy as sa

from kiln.catalog.tables import UtcDateTime


revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

BUILD_COLUMNS = (
    ("agent_name", sa.String(length=255)),
    ("repository", sa.String(length=255)),
    ("tag", sa.String(length=255)),
    ("source_commit", sa.String(length=255)),
    ("working_tree_hash", sa.String(length=255)),
    ("upload_until", UtcDateTime()),
    ("context_uploaded_at", UtcDateTime()),
    ("context_started_at", UtcDateTime()),
    ("context_sha256", sa.String(length=64)),
    ("context_bytes", sa.BigInteger()),
    ("publishing_at", UtcDateTime()),
)
BUILD_INDEXES = (
    ("ix_builds_api", ["organization_id", "api", "created_at", "id"]),
    ("ix_builds_agent", ["organization_id", "agent_name", "created_at", "id"]),
    ("ix_builds_commit", ["organization_id", "source_commit", "created_at", "id"]),
    ("ix_builds_tree", ["organization_id", "working_tree_hash", "created_at", "id"]),
    ("ix_builds_target", ["repository", "tag", "created_at"]),
)
IMAGE_COLUMNS = (
    ("repository", sa.String(length=255)),
    ("digest", sa.String(length=255)),
    ("platforms", sa.JSON()),
)
# SQLite's constraint has no name; the copy of the table gives it one.
NAMING = {"uq": "images_%(column_0_N_name)s_key"}
IMAGE_UNIQUE = "images_account_region_reference_key"
AMIS = sa.text("kind = 'ami'")


def upgrade() -> None:
    op.create_table(
        "agents",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("organization_id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("deployed_at", UtcDateTime(), nullable=True),
        sa.ForeignKeyConstraint(["organization_id"], ["organizations.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("organization_id", "name"),
    )
    _extend_builds()
    _extend_images()
    op.create_table(
        "tags",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("organization_id", sa.String(length=36), nullable=True),
        sa.Column("owner_type", sa.String(length=255), nullable=False),
        sa.Column("owner", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("tag", sa.String(length=255), nullable=False),
        sa.Column("visibility", sa.String(length=255), nullable=False),
        sa.Column("build_id", sa.String(length=36), nullable=False),
        sa.Column("built_at", UtcDateTime(), nullable=False),
        sa.Column("digest", sa.String(length=255), nullable=True),
        sa.Column("image_id", sa.String(length=36), nullable=True),
        sa.Column("pushed_at", UtcDateTime(), nullable=True),
        sa.ForeignKeyConstraint(["organization_id"], ["organizations.id"]),
        sa.ForeignKeyConstraint(["build_id"], ["builds.id"]),
        sa.ForeignKeyConstraint(["image_id"], ["images.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("owner", "name", "tag"),
    )
    op.create_index("ix_tags_page", "tags", ["owner", "built_at", "id"])
    op.create_table(
        "registry_errands",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("repository", sa.String(length=255), nullable=False),
        sa.Column("tag", sa.String(length=255), nullable=False),
        sa.Column("digest", sa.String(length=255), nullable=False),
        sa.Column("source_repository", sa.String(length=255), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_registry_errands_created_at", "registry_errands", ["created_at"])


def _extend_builds() -> None:
    # Not as a copy of the table: SQLite would not let it go while images refer to it.
    op.execute("ALTER TABLE builds ADD COLUMN agent_id VARCHAR(36) REFERENCES agents (id)")
    for name, kind in BUILD_COLUMNS:
        op.add_column("builds", sa.Column(name, kind, nullable=True))
    for name, columns in BUILD_INDEXES:
        op.create_index(name, "builds", columns)


def _extend_images() -> None:
    with op.batch_alter_table("images", naming_convention=NAMING) as images:
        images.drop_constraint(IMAGE_UNIQUE, type_="unique")
        images.alter_column(
            "reference", existing_type=sa.String(length=255), type_=sa.String(length=1100), existing_nullable=False
        )
        for name, kind in IMAGE_COLUMNS:
            images.add_column(sa.Column(name, kind, nullable=True))
    op.create_index("ix_images_digest", "images", ["digest", "repository"])
    op.create_index(
        "ix_images_ami",
        "images",
        ["account", "region", "reference"],
        unique=True,
        sqlite_where=AMIS,
        postgresql_where=AMIS,
    )


def downgrade() -> None:
    raise NotImplementedError("a catalog with container images does not go back to one that knows none")
