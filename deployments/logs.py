"""The format and level of the logs of a process."""

import json
import logging
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from datetime import UTC, datetime
from logging.handlers import MemoryHandler
from typing import Any, Literal

from engine.settings import Settings

#: Loggers of Sightline. Ray Serve sends records of the first to its files and to the console.
_LOGGERS = ("ray.serve", "engine")

#: Seconds after which a record is in its file.
WRITTEN_AFTER_S = 1.0

#: Attributes of every record; the others are a line's own fields.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class LoggingConfig(Settings):
    """Content of the log.

    Attributes:
        format: ``text``, or ``json`` with one object per line.
        level: the least important records to keep.
    """

    format: Literal["text", "json"] = "text"
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    def for_serve(self) -> dict[str, Any]:
        """Ray Serve's ``logging_config`` of a deployment. Its access log is off: the ingress has its own."""
        encoding = "JSON" if self.format == "json" else "TEXT"
        return {"encoding": encoding, "log_level": self.level, "enable_access_log": False}


class TracebackFormatter(logging.Formatter):
    """Formats tracebacks without ``print``.

    In replicas that log to files alone, as with ``RAY_SERVE_THROUGHPUT_OPTIMIZED=1``, Ray Serve 2.60 replaces
    ``print`` by a function that writes tuples, ``('...',)``, in place of texts for a file.
    """

    def formatException(self, ei: Any) -> str:
        """Return the traceback of ``sys.exc_info()``."""
        return "".join(traceback.format_exception(*ei)).rstrip("\n")


class JsonFormatter(TracebackFormatter):
    """Formats a record as one JSON object, with the fields of ``extra`` beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        own = vars(record).items()
        line |= {k: v for k, v in own if k not in _STANDARD and not k.startswith("_") and k not in line}
        if record.exc_info:
            line["exception"] = record.exc_text or self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class Rendered(logging.Filter):
    """Makes the text of each record when it is logged.

    Ray Serve keeps records in memory before it writes them, as many as its
    ``RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE`` says. An error among the arguments has a traceback, whose
    frames would keep a request's media in the object store until then.
    """

    _formatter = TracebackFormatter()

    def filter(self, record: logging.LogRecord) -> bool:
        """Render ``record``; return True."""
        try:
            record.msg, record.args = record.getMessage(), None
        except (TypeError, ValueError):
            # A wrong format of somebody else's; the handler reports it.
            return True
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = record.exc_text or self._formatter.formatException(record.exc_info)
            # Formatters only ask whether there is an error, and take its text.
            record.exc_info = record.exc_info[0], None, None  # type: ignore[assignment]
        return True


def set_up_logs(config: LoggingConfig) -> None:
    """Apply ``config`` to this process: all loggers share the handlers of the first, or a console handler."""
    first, *others = (logging.getLogger(name) for name in _LOGGERS)
    handlers = first.handlers
    if not handlers:
        first.addHandler(logging.StreamHandler())
    for logger in (first, *others):
        if not any(isinstance(each, Rendered) for each in logger.filters):
            logger.addFilter(Rendered())
    for handler in handlers:
        # Ray Serve's files have its own formatter for JSON.
        if config.format == "json" and type(handler) is logging.StreamHandler:
            handler.setFormatter(JsonFormatter())
    if any(isinstance(handler, MemoryHandler) and handler.capacity > 1 for handler in handlers):
        write_soon(first)
    first.setLevel(config.level)
    for logger in others:
        logger.setLevel(config.level)
        logger.handlers = handlers
        logger.propagate = False


def write_soon(log: logging.Logger) -> threading.Thread:
    """Write the records of ``log`` every :data:`WRITTEN_AFTER_S`.

    With ``RAY_SERVE_THROUGHPUT_OPTIMIZED=1`` Ray Serve keeps records in memory until there are a thousand, or
    an error. A server that has little to do would seem dead, and its last lines would be lost with it.

    Returns:
        The thread, which ends once nobody uses ``log``.
    """
    thread = threading.Thread(target=_write, args=(weakref.ref(log),), name="logs", daemon=True)
    thread.start()
    return thread


def _write(found: Callable[[], logging.Logger | None]) -> None:
    while True:
        time.sleep(WRITTEN_AFTER_S)
        log = found()
        if log is None:
            return
        # Ray Serve puts others in their place when its configuration changes.
        for handler in log.handlers:
            if isinstance(handler, MemoryHandler):
                handler.flush()
        del log
