"""Packer templates that builds may use, and the variables that each declares.

A template runs code on the worker, so only Kiln's own (`builtin://`) and the operator's (`operator://`) are run, and
`kiln://workstation`, which no request may name.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hcl2
from lark.exceptions import LarkError

from kiln.errors import InvalidRequestError, KilnError
from kiln.naming import RESERVED_VARIABLE_PREFIX, WORKSTATION_TEMPLATE
from kiln.redact import is_secret_name

BUILTIN_FILES = {"default-ec2": "agent.pkr.hcl"}
BUILTIN_SOURCE = "amazon-ebs.agent"
WORKSTATION_FILE = "workstation.pkr.hcl"
WORKSTATION_SOURCE = "amazon-ebs.workstation"
REQUIRED_OF_OPERATORS = ("kiln_image_name", "kiln_key_pair_name", "kiln_security_group_id", "kiln_tags")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
TEMPLATE_SUFFIXES = (".pkr.hcl", ".pkr.json")


class TemplateError(KilnError):
    """A template on disk cannot be read; the message names it, without its path."""


@dataclass(frozen=True)
class Template:
    """A template that may be run. `only` is the source to build, or None for all; `secrets` are declared `sensitive`."""

    source: str
    path: Path
    declared: frozenset[str]
    secrets: frozenset[str]
    only: str | None = None

    @property
    def public_names(self) -> list[str]:
        """The variables that a request may set, sorted."""
        return sorted(name for name in self.declared if not name.startswith(RESERVED_VARIABLE_PREFIX))

    def is_secret(self, name: str) -> bool:
        """Whether a variable's value is a secret: its name or the template says so."""
        return name in self.secrets or is_secret_name(name)


class Templates:
    """Looks templates up. Each is parsed once, and again when its files change."""

    def __init__(self, builtin_dir: Path, operator_dir: Path | None) -> None:
        self._builtin_dir = builtin_dir
        self._operator_dir = operator_dir
        self._parsed: dict[Path, tuple[tuple[float, ...], Template]] = {}

    def find(self, source: str) -> Template:
        """The template that a request names. Raises InvalidRequestError that names `template_source`."""
        scheme, separator, name = source.partition("://")
        if not separator or scheme not in ("builtin", "operator"):
            raise InvalidRequestError(
                "template_source",
                "only builtin://NAME and operator://NAME are served, because a template runs code on the worker; "
                "the operator can vendor another one by putting it into KILN_TEMPLATE_DIR, as operator://NAME",
            )
        if not NAME.fullmatch(name):
            raise InvalidRequestError("template_source", f"{name!r} is not the name of a template")
        return self._builtin(source, name) if scheme == "builtin" else self._operator(source, name)

    def of_build(self, source: str) -> Template:
        """The template of a build that was accepted: of any source that `find` knows, or Kiln's own. Raises as `find`."""
        if source == WORKSTATION_TEMPLATE:
            return self._load(source, self._builtin_dir / WORKSTATION_FILE, only=WORKSTATION_SOURCE)
        return self.find(source)

    def _builtin(self, source: str, name: str) -> Template:
        if name not in BUILTIN_FILES:
            known = ", ".join(f"builtin://{known}" for known in sorted(BUILTIN_FILES))
            raise InvalidRequestError("template_source", f"there is no builtin template {name!r}; there is {known}")
        return self._load(source, self._builtin_dir / BUILTIN_FILES[name], only=BUILTIN_SOURCE)

    def _operator(self, source: str, name: str) -> Template:
        if self._operator_dir is None:
            raise InvalidRequestError("template_source", "this server has no operator templates (KILN_TEMPLATE_DIR)")
        found = [path for path in self._candidates(self._operator_dir, name) if path.exists()]
        if not found:
            raise InvalidRequestError("template_source", f"the operator has no template {name!r}")
        template = self._load(source, found[0], only=None)
        missing = [needed for needed in REQUIRED_OF_OPERATORS if needed not in template.declared]
        if missing:
            raise InvalidRequestError(
                "template_source",
                f"template {name!r} declares no {', '.join(missing)}; without them Kiln could not clean up after it",
            )
        return template

    @staticmethod
    def _candidates(folder: Path, name: str) -> list[Path]:
        return [folder / name, *(folder / f"{name}{suffix}" for suffix in TEMPLATE_SUFFIXES)]

    def _load(self, source: str, path: Path, only: str | None) -> Template:
        files = _template_files(path)
        stamp = tuple(file.stat().st_mtime for file in files)
        known = self._parsed.get(path)
        if known is None or known[0] != stamp:
            declared, secrets = _declarations(source, files)
            known = (stamp, Template(source, path.resolve(), declared, secrets, only))
            self._parsed[path] = known
        return known[1]


def _template_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.name.endswith(TEMPLATE_SUFFIXES))


def _declarations(source: str, files: list[Path]) -> tuple[frozenset[str], frozenset[str]]:
    declared: set[str] = set()
    secrets: set[str] = set()
    for file in files:
        for name, body in _variables(source, file).items():
            declared.add(name)
            if body.get("sensitive") is True:
                secrets.add(name)
    return frozenset(declared), frozenset(secrets)


def _variables(source: str, file: Path) -> dict[str, Mapping[str, Any]]:
    try:
        text = file.read_text()
        parsed = json.loads(text) if file.name.endswith(".json") else hcl2.loads(text)
    except (OSError, ValueError, LarkError):
        raise TemplateError(f"the template {source} cannot be read") from None
    blocks = parsed.get("variable", [])
    return {
        name.strip('"'): body
        for block in (blocks if isinstance(blocks, list) else [blocks])
        for name, body in block.items()
        if isinstance(body, Mapping)
    }
