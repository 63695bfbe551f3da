"""Names that people search in: kept a second time as a key, so that upper and lower case do not matter in any script."""

import unicodedata
from typing import Final

from sqlalchemy import ColumnElement, func
from sqlalchemy.orm import InstrumentedAttribute, Session

# Ids beyond it are in no row, and PostgreSQL would refuse to compare with them.
ID_LIMIT: Final = 2**31 - 1


def search_key(name: str) -> str:
    """A name as it is searched in: case-folded, and the same for the several ways to write one character."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def contains(session: Session, column: InstrumentedAttribute[str], text: str) -> ColumnElement[bool]:
    """Whether a column of keys contains a text as it stands: a `%` means itself."""
    find = func.strpos if session.get_bind().dialect.name == "postgresql" else func.instr
    return find(column, search_key(text)) > 0


def is_id(number: int) -> bool:
    """Whether a row may have this id."""
    return 0 < number <= ID_LIMIT
