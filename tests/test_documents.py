"""What the documents say of themselves: links that lead somewhere, and a row for every setting."""

import re

from kiln.settings import PROJECT_ROOT, Settings

DOCUMENTS = (*PROJECT_ROOT.glob("*.md"), *PROJECT_ROOT.glob("docs/**/*.md"))
OPERATING = PROJECT_ROOT / "docs" / "operating.md"
LINK = re.compile(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
# `kiln up` tells its parts by it; it is nobody else's to set.
OWN_SETTINGS = frozenset({"containers_off"})


def test_every_setting_has_its_row() -> None:
    """The table of settings names each setting, and no setting that is not there."""
    rows = set(re.findall(r"^\| `KILN_(\w+)` \|", OPERATING.read_text(), re.MULTILINE))
    assert rows == {name.upper() for name in Settings.model_fields.keys() - OWN_SETTINGS}


def test_links_lead_somewhere() -> None:
    """Each names a file of the repository, and a heading that is in it."""
    broken = []
    for document in DOCUMENTS:
        for place, anchor in LINK.findall(FENCED.sub("", document.read_text())):
            if place.startswith("http"):
                continue
            target = (document.parent / place).resolve() if place else document
            if not target.exists() or (anchor and anchor not in _anchors(target.read_text())):
                broken.append(f"{document.name}: {place}#{anchor}")
    assert not broken


def _anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = HEADING.findall(FENCED.sub("", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
