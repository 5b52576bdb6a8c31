"""Decimal numbers as pydantic 2.12 and 2.13 describe them, without look-around, which no grammar has."""

from __future__ import annotations

import re

#: ``max_digits`` is one more in the pattern, for the point. The fraction's digits have a bound if
#: ``decimal_places`` is given.
_WRITTEN = re.compile(
    re.escape(r"^(?!^[-+.]*$)[+-]?0*")
    + "(?:"
    + re.escape(r"\d*\.?\d")
    + r"(?P<any>\*\$|\{0,(?P<places>\d{1,3})\}0\*\$)"
    + "|"
    + re.escape(r"(?:\d{0,")
    + r"(?P<whole>\d{1,3})"
    + re.escape(r"}|(?=[\d.]{1,")
    + r"(?P<length>\d{1,3})"
    + re.escape(r"}0*$)\d")
    + r"(?:\*|\{0,(?P=whole)\})"
    + re.escape(r"\.\d")
    + r"(?:\*|\{0,(?P<fraction>\d{1,3})\})"
    + re.escape("0*$)")
    + ")"
)


#: Most digits of a number: where its fraction has no bound of its own, each number of digits before the point
#: is an alternative. Databases have up to 65.
_MOST_DIGITS = 65


def plain_decimals(pattern: str) -> str | None:
    """A pattern of decimal numbers without look-around; None if ``pattern`` is none of pydantic's, or is for
    numbers of more than 65 digits.

    All numbers that ``pattern`` is meant for match, in the form in which Python writes them, and every match
    is one of ``pattern``. It has more matches: strings that only begin with a number, and further zeros.
    """
    written = _WRITTEN.fullmatch(pattern)
    if written is None:
        return None
    if written["any"] is not None:
        return _pattern([_number("+", f"{{0,{written['places']}}}" if written["places"] else "*")])
    digits = int(written["length"]) - 1
    if not 0 < digits <= _MOST_DIGITS:
        return None
    if written["fraction"] is not None:
        whole, places = int(written["whole"]), min(int(written["fraction"]), digits)
        return _pattern([_number(f"{{1,{whole}}}", f"{{0,{places}}}")] * (whole > 0) + _below_one(places))
    options = [_number(f"{{1,{whole}}}", f"{{0,{digits - whole}}}") for whole in range(1, digits + 1)]
    return _pattern(options + _below_one(digits))


def _pattern(options: list[str]) -> str:
    return f"^[+-]?({'|'.join(options)})$"


def _number(whole: str, fraction: str) -> str:
    """A number of digits before the point, and of digits behind it, if there is one."""
    return rf"[0-9]{whole}(\.[0-9]{fraction})?"


def _below_one(places: int) -> list[str]:
    """Numbers whose zero before the point does not count."""
    return [rf"0?\.[0-9]{{1,{places}}}", "0"] if places else ["0"]
