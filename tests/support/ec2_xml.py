"""EC2's XML: error documents, what a reply created, and edits of lists in a reply.

Shapes: EC2 API Reference, "Common response elements" and "Error codes".
"""

import copy
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from xml.etree import ElementTree as ET

from support.ec2_message import Reply

REQUEST_ID = "00000000-0000-4000-8000-000000000000"


def error_reply(code: str, message: str, status: int, fault: str) -> Reply:
    """EC2's error document with HTTP status `status`."""
    root = ET.Element("Response")
    error = ET.SubElement(ET.SubElement(root, "Errors"), "Error")
    ET.SubElement(error, "Code").text = code
    ET.SubElement(error, "Message").text = message
    ET.SubElement(root, "RequestID").text = REQUEST_ID
    body: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    headers = (("Content-Type", "text/xml;charset=UTF-8"), ("Content-Length", str(len(body))))
    return Reply(status, "", headers, body, fault)


class Document:
    """A reply's XML. Names are given without the namespace, which is kept as it came."""

    def __init__(self, body: bytes) -> None:
        self._root = ET.fromstring(body)
        self._namespace = self._root.tag.rpartition("}")[0].removeprefix("{")

    def to_bytes(self) -> bytes:
        body: bytes = ET.tostring(
            self._root, encoding="utf-8", xml_declaration=True, default_namespace=self._namespace or None
        )
        return body

    def texts(self, path: str) -> list[str]:
        """Texts of the elements at `path` (`imagesSet/item/imageId`) under the root."""
        return [element.text or "" for element in self._root.findall(_anywhere(path))]

    def items(self, list_name: str) -> list["Item"]:
        return [Item(item) for item in self._root.iterfind(f".//{{*}}{list_name}/{{*}}item")]

    def remove_items(self, list_name: str, unwanted: Callable[["Item"], bool]) -> None:
        for parent in self._root.iterfind(f".//{{*}}{list_name}"):
            for element in [element for element in parent if unwanted(Item(element))]:
                parent.remove(element)


class Item:
    """One `<item>` of a list."""

    def __init__(self, element: ET.Element) -> None:
        self._element = element

    def text(self, path: str) -> str:
        return self._element.findtext(_anywhere(path)) or ""

    def set_text(self, path: str, text: str) -> None:
        element = self._element.find(_anywhere(path))
        if element is None:
            raise LookupError(f"the reply has no {path}")
        element.text = text

    def is_empty(self, path: str) -> bool:
        element = self._element.find(_anywhere(path))
        return element is None or len(element) == 0

    def append_copy(self, list_name: str, changes: dict[str, str]) -> None:
        """Add to the list a copy of its first item, with the texts at some paths changed."""
        parent = self._list(list_name)
        added = copy.deepcopy(parent[0])
        for path, text in changes.items():
            Item(added).set_text(path, text)
        parent.append(added)

    def clear(self, list_name: str) -> None:
        self._list(list_name).clear()

    def _list(self, list_name: str) -> ET.Element:
        element = self._element.find(_anywhere(list_name))
        if element is None:
            raise LookupError(f"the reply has no {list_name}")
        return element


def matches(value: str, patterns: Iterable[str]) -> bool:
    """Whether a filter's values, in which `*` and `?` are wildcards, let `value` through."""
    return any(fnmatchcase(value, pattern) for pattern in patterns)


def without_filter(params: dict[str, str], name: str) -> tuple[dict[str, str], list[str] | None]:
    """Parameters without the filter `name`, the others numbered anew, and its values (None: not there)."""
    rest = {key: value for key, value in params.items() if not key.startswith("Filter.")}
    values: list[str] | None = None
    kept = 0
    for number in _filter_numbers(params):
        own = {key: value for key, value in params.items() if key.startswith(f"Filter.{number}.")}
        if own.get(f"Filter.{number}.Name") == name:
            values = [value for key, value in own.items() if ".Value." in key]
            continue
        kept += 1
        rest |= {key.replace(f"Filter.{number}.", f"Filter.{kept}.", 1): value for key, value in own.items()}
    return rest, values


def _filter_numbers(params: dict[str, str]) -> list[str]:
    return sorted({key.split(".")[1] for key in params if key.startswith("Filter.")}, key=int)


def _anywhere(path: str) -> str:
    return "/".join(f"{{*}}{name}" for name in path.split("/"))
