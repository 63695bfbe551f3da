"""templates and machines of organizations; keys that sign"""

from alembic import op
import sqlalchemy as sa

from kiln.catalog.tables import UtcDateTime


revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("kind", sa.String(length=255), nullable=False, server_default="plain"))
    op.add_column("api_keys", sa.Column("sealed_secret", sa.LargeBinary(), nullable=True))
    op.create_table(
        "nonces",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("until", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_index("ix_nonces_until", "nonces", ["until"])
    _make_templates()
    _make_machines()
    op.create_table(
        "retired_instances",
        sa.Column("region", sa.String(length=255), nullable=False),
        sa.Column("instance_id", sa.String(length=255), nullable=False),
        sa.Column("account", sa.String(length=255), nullable=False),
        sa.Column("machine_id", sa.Integer(), nullable=False),
        sa.Column("retired_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("region", "instance_id"),
    )
    op.create_index("ix_retired_instances_machine_id", "retired_instances", ["machine_id"])


def _make_templates() -> None:
    op.create_table(
        "templates",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("organization_id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("name_key", sa.String(length=255), nullable=False),
        sa.Column("region", sa.String(length=255), nullable=False),
        sa.Column("size_gb", sa.Integer(), nullable=False),
        sa.Column("source", sa.String(length=255), nullable=False),
        sa.Column("software", sa.JSON(), nullable=False),
        sa.Column("build_id", sa.String(length=36), nullable=False),
        sa.Column("machine_id", sa.Integer(), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("deleted_at", UtcDateTime(), nullable=True),
        sa.ForeignKeyConstraint(["organization_id"], ["organizations.id"]),
        sa.ForeignKeyConstraint(["build_id"], ["builds.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("build_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_templates_page", "templates", ["organization_id", "deleted_at", "id", "name_key"])


def _make_machines() -> None:
    op.create_table(
        "machines",
        sa.Column("id", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("organization_id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("name_key", sa.Text(), nullable=False),
        sa.Column("region", sa.String(length=255), nullable=False),
        sa.Column("instance_type", sa.String(length=255), nullable=False),
        sa.Column("disk_gib", sa.Integer(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("updated_at", UtcDateTime(), nullable=False),
        sa.Column("account", sa.String(length=255), nullable=True),
        sa.Column("simulated", sa.Boolean(), nullable=False),
        sa.Column("instance_id", sa.String(length=255), nullable=True),
        sa.Column("ec2_state", sa.String(length=255), nullable=True),
        sa.Column("state_at", UtcDateTime(), nullable=True),
        sa.Column("placement", sa.JSON(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("base_image_id", sa.Integer(), nullable=True),
        sa.Column("template_id", sa.Integer(), nullable=True),
        sa.Column("assignment", sa.Integer(), nullable=False),
        sa.Column("built_assignment", sa.Integer(), nullable=False),
        sa.Column("operation", sa.String(length=255), nullable=True),
        sa.Column("operation_number", sa.Integer(), nullable=False),
        sa.Column("operation_at", UtcDateTime(), nullable=True),
        sa.Column("operation_run", sa.String(length=255), nullable=True),
        sa.Column("operation_forced", sa.Boolean(), nullable=False),
        sa.Column("operation_error", sa.Text(), nullable=True),
        sa.Column("launching_template_id", sa.Integer(), nullable=True),
        sa.Column("launching_assignment", sa.Integer(), nullable=True),
        sa.Column("next_instance_id", sa.String(length=255), nullable=True),
        sa.Column("imaging_build_id", sa.String(length=36), nullable=True),
        sa.ForeignKeyConstraint(["organization_id"], ["organizations.id"]),
        sa.ForeignKeyConstraint(["template_id"], ["templates.id"]),
        sa.ForeignKeyConstraint(["launching_template_id"], ["templates.id"]),
        sa.ForeignKeyConstraint(["imaging_build_id"], ["builds.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("account", "region", "instance_id"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_machines_page", "machines", ["organization_id", "id"])
    op.create_index("ix_machines_operation", "machines", ["operation", "operation_at"])
    op.create_index("ix_machines_template", "machines", ["template_id"])
    op.create_index("ix_machines_launching", "machines", ["launching_template_id"])


def downgrade() -> None:
    raise NotImplementedError("a catalog with machines does not go back to one that knows none")
