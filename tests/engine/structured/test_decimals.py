"""Patterns of decimal numbers without look-around."""

import re
from decimal import Decimal, InvalidOperation
from itertools import product

import pytest

from engine.structured.decimals import plain_decimals
from engine.structured.json_schema import prepare_schema

SIGN = r"^(?!^[-+.]*$)[+-]?0*"
#: As pydantic 2.12 and 2.13 write them, by max_digits and decimal_places.
PATTERNS = {
    (None, None): SIGN + r"\d*\.?\d*$",
    (None, 2): SIGN + r"\d*\.?\d{0,2}0*$",
    (None, 0): SIGN + r"\d*\.?\d{0,0}0*$",
    (3, None): SIGN + r"(?:\d{0,3}|(?=[\d.]{1,4}0*$)\d*\.\d*0*$)",
    (1, None): SIGN + r"(?:\d{0,1}|(?=[\d.]{1,2}0*$)\d*\.\d*0*$)",
    (3, 2): SIGN + r"(?:\d{0,1}|(?=[\d.]{1,4}0*$)\d{0,1}\.\d{0,2}0*$)",
    (3, 3): SIGN + r"(?:\d{0,0}|(?=[\d.]{1,4}0*$)\d{0,0}\.\d{0,3}0*$)",
    (2, 5): SIGN + r"(?:\d{0,0}|(?=[\d.]{1,3}0*$)\d{0,0}\.\d{0,5}0*$)",
    (3, 0): SIGN + r"(?:\d{0,3}|(?=[\d.]{1,4}0*$)\d{0,3}\.\d{0,0}0*$)",
}
TEXTS = ["".join(each) for length in range(6) for each in product("+-.019", repeat=length)]


def as_python_writes(text: str) -> bool:
    """The text of a decimal number without zeros at the end of its fraction."""
    try:
        return str(Decimal(text)) == text and not ("." in text and text.endswith("0"))
    except InvalidOperation:
        return False


@pytest.mark.parametrize("bounds", PATTERNS, ids=str)
def test_numbers_match_and_nothing_else_does(bounds):
    pattern = PATTERNS[bounds]
    plain = plain_decimals(pattern)
    assert plain is not None and "(?" not in plain
    matched = {text for text in TEXTS if re.search(plain, text)}
    assert matched and all(re.search(pattern, text) and Decimal(text) is not None for text in matched)
    assert matched >= {text for text in TEXTS if re.fullmatch(pattern, text) and as_python_writes(text)}


#: By digits, and digits with the point.
UNBOUNDED = SIGN + r"(?:\d{0,%d}|(?=[\d.]{1,%d}0*$)\d*\.\d*0*$)"


def test_most_digits():
    assert len(plain_decimals(UNBOUNDED % (65, 66))) < 2200


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "^a$",
        "^(?!a)b$",
        SIGN,
        PATTERNS[3, 2] + "|a",
        *(UNBOUNDED % n for n in ((66, 67), (0, 1), (0, 0))),
    ],
)
def test_other_patterns_stay(pattern):
    assert plain_decimals(pattern) is None
    assert prepare_schema({"type": "string", "pattern": pattern}) == {"type": "string", "pattern": pattern}
