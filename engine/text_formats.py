"""Patterns of formats of texts. They are bounded: llguidance would follow some for any number of digits."""

_YEAR = r"(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP_YEAR = r"([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DAY = (
    r"((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = rf"({_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
_HOUR_MINUTE = r"([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOUR_MINUTE}:[0-5][0-9](\.[0-9]{{1,9}})?([zZ]|[+-]{_HOUR_MINUTE})"
_COUNT = "[0-9]{1,6}"
_SECONDS = "[0-9]{1,8}S"
_MINUTES = f"{_COUNT}M({_SECONDS})?"
_CLOCK = f"T({_COUNT}H({_MINUTES})?|{_MINUTES}|{_SECONDS})"
_DAYS = f"{_COUNT}D"
_MONTHS = f"{_COUNT}M({_DAYS})?"
_CALENDAR = f"({_DAYS}|{_MONTHS}|{_COUNT}Y({_MONTHS})?)({_CLOCK})?"

_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"{_OCTET}(\.{_OCTET}){{3}}"
_GROUP = "[0-9a-fA-F]{1,4}"


def _ipv6() -> str:
    """Eight groups, of which an IPv4 address may stand for the last two, and ``::`` for one or more."""
    forms = [f"({_GROUP}:){{7}}{_GROUP}", f"({_GROUP}:){{6}}{_IPV4}"]
    for before in range(8):
        head = f"{_GROUP}(:{_GROUP}){{{before - 1}}}" if before else ""
        behind = [f"({_GROUP}:){{0,{6 - before}}}{_GROUP}"] if before < 7 else []
        behind += [f"({_GROUP}:){{0,{5 - before}}}{_IPV4}"] if before < 6 else []
        forms.append(f"{head}::({'|'.join(behind)})?" if behind else f"{head}::")
    return "|".join(forms)


def _uuid(version: str = "") -> str:
    """UUIDs, or those of one version, whose variant is that of the standard."""
    digit = "[0-9a-fA-F]"
    third, fourth = (f"{version}{digit}{{3}}", f"[89abAB]{digit}{{3}}") if version else (f"{digit}{{4}}",) * 2
    return f"{digit}{{8}}-{digit}{{4}}-{third}-{fourth}-{digit}{{12}}"


_ALNUM, _INNER = "[a-zA-Z0-9]", "[a-zA-Z0-9-]"
# One to four characters, or five to 63. Hyphens in the third and fourth place would make it an encoded name
# (RFC 5890), and no pattern can check the code.
_LABEL = f"{_ALNUM}({_INNER}{{0,2}}{_ALNUM}|{_INNER}({_ALNUM}{_INNER}|-{_ALNUM}){_INNER}{{0,58}}{_ALNUM})?"
_OF_ATOM = "[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]"
# At most 64 characters. Each form bounds them in its own way: a pattern can't count across dots.
_LOCAL = "|".join(
    [
        f"{_OF_ATOM}{{1,64}}",
        rf"{_OF_ATOM}{{1,31}}\.{_OF_ATOM}{{1,32}}",
        rf"{_OF_ATOM}{{1,20}}(\.{_OF_ATOM}{{1,20}}){{2}}",
        rf"{_OF_ATOM}(\.?{_OF_ATOM}){{0,31}}",
    ]
)

#: Dates and times of RFC 3339, and the durations of its appendix A. A fraction of a second has at most nine
#: digits, as in nanoseconds. Every date is in the calendar. Leap seconds are left out: few programs read
#: them. Numbers of a duration have at most six digits, seconds eight: Python's ``timedelta`` holds them all.
#: UUIDs (RFC 4122 and 9562), host names (RFC 1123), addresses of IPv4 (RFC 2673, 3.2) and of IPv6 (RFC 4291,
#: 2.2). Mail addresses (RFC 5322) have no quotes and no comments, and their domain is below a top-level one.
BOUNDED_FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}[tT]{_TIME}$",
    "duration": f"^P({_CALENDAR}|{_CLOCK}|{_COUNT}W)$",
    "email": rf"^({_LOCAL})@({_LABEL}\.)+[a-zA-Z]{{2,63}}$",
    "hostname": rf"^{_LABEL}(\.{_LABEL})*$",
    "ipv4": f"^{_IPV4}$",
    "ipv6": f"^({_ipv6()})$",
    "uuid": f"^{_uuid()}$",
    **{f"uuid{version}": f"^{_uuid(str(version))}$" for version in range(1, 9)},
}

#: The most characters of texts whose pattern doesn't bound them.
FORMAT_LENGTHS = {"email": 254, "hostname": 253}
