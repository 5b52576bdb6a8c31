"""ARCHITECTURE.md's statements about files and floors are true."""

import re

from tests.serving import ROOT
from tests.test_architecture import FLOORS

PAGE = (ROOT / "ARCHITECTURE.md").read_text()


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_every_file_that_the_page_names_exists():
    named = {*re.findall(r"`((?:engine|deployments|tests)/[\w/.]+)`", PAGE)}
    named |= {*re.findall(r"\]\((?!https?://)([^)#]+)\)", PAGE)}
    assert len(named) > 30
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_a_request_lives_in_fourteen_files():
    rows = re.findall(r"^\| (\d+) \| `([\w/.]+)` \|", section("The life of a request"), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    assert 8 <= len({name for _, name in rows}) == len(rows) <= 14


def test_the_floors_are_those_that_are_tested():
    rows = re.findall(r"^\| (\d+) \| ((?:`\w+` ?)+)\|", section("Floors"), re.MULTILINE)
    floors = {int(number): re.findall(r"`(\w+)`", names) for number, names in rows}
    assert floors == dict(enumerate(FLOORS, 1))


def test_the_glossary_explains_terms_that_the_code_uses():
    terms = re.findall(r"^\| ([a-z, ]+) \| ", section("Glossary"), re.MULTILINE)
    source = "\n".join(path.read_text() for path in (ROOT / "engine").rglob("*.py"))
    names = [name for term in terms for name in term.split(", ") if name != "term"]
    assert len(names) > 12
    assert [name for name in names if name not in source] == []


def test_a_section_fits_on_a_screen():
    for part in PAGE.split("\n## ")[1:]:
        assert len(part.splitlines()) <= 45, part.splitlines()[0]
