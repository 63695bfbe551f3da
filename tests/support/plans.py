"""How a database goes about a query."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import event, text

from kiln.catalog.session import Catalog


@contextmanager
def statements(catalog: Catalog) -> Iterator[list[tuple[str, Any]]]:
    """What is sent to the database, with its parameters."""
    sent: list[tuple[str, Any]] = []

    def note(_conn: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        sent.append((statement, parameters))

    event.listen(catalog.engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(catalog.engine, "before_cursor_execute", note)


def plan(catalog: Catalog, statement: str, parameters: Any) -> str:
    """How the database would go about it, if going through whole tables and sorting were as dear as they become."""
    postgres = catalog.engine.dialect.name == "postgresql"
    with catalog.engine.connect() as connection:
        if postgres:
            for way in ("seqscan", "bitmapscan", "sort"):
                connection.execute(text(f"SET enable_{way} TO off"))
        rows = connection.exec_driver_sql(f"EXPLAIN {'' if postgres else 'QUERY PLAN '}{statement}", parameters)
        steps = "\n".join(str(row[-1]) for row in rows)
        connection.rollback()
    return steps
