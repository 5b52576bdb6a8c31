"""Patterns of the formats that llguidance would follow for any number of digits."""

_YEAR = r"(000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP_YEAR = r"([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DAY = (
    r"((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
)
_DATE = rf"({_YEAR}-{_DAY}|{_LEAP_YEAR}-02-29)"
_HOUR_MINUTE = r"([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_HOUR_MINUTE}:[0-5][0-9](\.[0-9]{{1,9}})?([zZ]|[+-]{_HOUR_MINUTE})"
_COUNT = "[0-9]{1,9}"
_SECONDS = f"{_COUNT}S"
_MINUTES = f"{_COUNT}M({_SECONDS})?"
_CLOCK = f"T({_COUNT}H({_MINUTES})?|{_MINUTES}|{_SECONDS})"
_DAYS = f"{_COUNT}D"
_MONTHS = f"{_COUNT}M({_DAYS})?"
_CALENDAR = f"({_DAYS}|{_MONTHS}|{_COUNT}Y({_MONTHS})?)({_CLOCK})?"

#: Dates and times of RFC 3339, and the durations of its appendix A. A fraction of a second has at most nine
#: digits, as in nanoseconds, and so has each number of a duration. Every date is in the calendar. Leap
#: seconds are left out: few programs read them.
BOUNDED_FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}[tT]{_TIME}$",
    "duration": f"^P({_CALENDAR}|{_CLOCK}|{_COUNT}W)$",
}
