"""Alembic's environment: migrations run on the connection that `Catalog.migrate` hands in, inside its transaction."""

from alembic import context

from kiln.catalog import pod_tables  # noqa: F401  its tables are the metadata's too
from kiln.catalog.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    transactional_ddl=False,
    render_as_batch=True,
)
context.run_migrations()
