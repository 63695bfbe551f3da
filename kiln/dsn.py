"""The databases that Kiln knows, by their URLs."""

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from kiln.errors import KilnError

DRIVERS = {"sqlite": "sqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
# A process that froze inside a transaction holds its locks no longer than this: its build's next attempt waits for them.
IDLE_TRANSACTION_MILLISECONDS = 5000


def database_url(dsn: str, setting: str) -> URL:
    """The URL with the driver that Kiln brings. Raises KilnError that names the setting for any other database."""
    try:
        url = make_url(dsn)
        driver = DRIVERS[url.get_backend_name()]
    except (ArgumentError, KeyError, ValueError):
        raise KilnError(f"{setting}: must be a sqlite:/// or postgresql:// URL") from None
    return url.set(drivername=driver)


def postgres_options() -> dict[str, str]:
    """What a PostgreSQL connection is opened with."""
    return {"options": f"-c idle_in_transaction_session_timeout={IDLE_TRANSACTION_MILLISECONDS}"}
