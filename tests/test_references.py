"""References in docstrings and comments, such as :func:`undefined_references`, lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.serving import ROOT

PACKAGES = ("engine", "deployments", "tests", "benchmarks")
_REFERENCE = re.compile(r":\w+:`~?([A-Za-z_][\w.]*)`")


@cache
def _words(path: Path) -> frozenset[str]:
    """The words of a file outside references."""
    return frozenset(re.findall(r"\w+", _REFERENCE.sub("", path.read_text())))


def _leads_somewhere(reference: str, path: Path) -> bool:
    """Whether a file's reference names a module and words of it, or else a word of the file."""
    names = reference.split(".")
    if names[0] not in PACKAGES:
        return names[0] in _words(path)
    for depth in range(len(names), 0, -1):
        place = ROOT.joinpath(*names[:depth])
        for module in (place.with_suffix(".py"), place / "__init__.py"):
            if module.exists():
                return _words(module).issuperset(names[depth:])
    return False


def undefined_references(path: Path) -> Iterator[str]:
    """The references in a file that lead nowhere."""
    for reference in dict.fromkeys(_REFERENCE.findall(path.read_text())):
        if not _leads_somewhere(reference, path):
            yield f"{path}: {reference}"


def test_references_lead_somewhere():
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 500
    assert [found for path in files for found in undefined_references(path)] == []


def test_planted_references_that_lead_nowhere_are_found(tmp_path):
    path = tmp_path / "module.py"
    planted = "engine.prompt.MediaLump", "engine.no_such.MediaItem", "lost", "Lost.Path"
    path.write_text(
        "".join(f'"""See :func:`{name}`."""\n' for name in (*planted, "engine.llm.LLM", "Path")) + "Path"
    )
    assert [found.split(": ")[1] for found in undefined_references(path)] == [*planted]
