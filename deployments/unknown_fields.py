"""Logs fields of requests that nothing reads, each name once, up to a number of names."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

logger = logging.getLogger("ray.serve")

#: Names that were logged; bounded, since clients choose them.
_logged: set[tuple[str, str]] = set()
_MAX_LOGGED = 256
_MAX_NAME = 100


def log_unknown(body: str, given: Mapping[Any, Any], known: Collection[str], where: str = "") -> None:
    """Log the fields of an object that are not among the ``known``. Null is absence.

    Args:
        body: the kind of request.
        where: the object that holds them, such as ``messages[].content[].``; empty for the body itself.
    """
    for each, value in given.items():
        if each in known or value is None:
            continue
        name = f"{where}{str(each)[:_MAX_NAME]}"
        if (body, name) in _logged or len(_logged) == _MAX_LOGGED:
            continue
        _logged.add((body, name))
        logger.warning("the unknown field %r is ignored", name)
        if len(_logged) == _MAX_LOGGED:
            logger.warning("%d unknown fields were logged; further ones are ignored in silence", _MAX_LOGGED)
