"""What Shoal logs, and when it is seen.

Shoal logs to loggers named ``shoal...`` and leaves everybody else's alone. A program that configures logging
(the root logger has a handler) gets the records there, at its own levels. In one that does not, as in a
notebook or a short script, Shoal's records from INFO up go to standard error, by a handler that gives way as
soon as the program brings its own.

The environment variable ``SHOAL_LOGLEVEL`` is a level's name or number, and holds for the background
processes as well; ``off`` leaves everything to the program.
"""

from __future__ import annotations

import logging
import os
import sys

_OFF = "OFF"
_FORMAT = "%(asctime)s.%(msecs)03d [%(levelname)s] [%(name)s] %(message)s"
_TIME_FORMAT = "%b %d %H:%M:%S"


class DefaultHandler(logging.Handler):
    """Writes to whatever ``sys.stderr`` is at the moment, while nobody else would show the record."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(_FORMAT, _TIME_FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        others = [handler for handler in logging.getLogger("shoal").handlers if handler is not self]
        if logging.getLogger().handlers or others or sys.stderr is None:
            return
        try:
            # In one piece, so that lines of several processes and threads do not mix.
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except (OSError, ValueError):
            self.handleError(record)


def get_logger(name: str | None = None) -> logging.Logger:
    """The logger ``name``, as :func:`logging.getLogger` gives it; Shoal's own ("shoal") without a name.

    The first call sees to it that Shoal's records are seen in a program that does not configure logging.
    """
    show_logs()
    return logging.getLogger(name or "shoal")


def show_logs() -> None:
    """Install the handler and the level that this module describes, unless that was done. Idempotent."""
    logger = logging.getLogger("shoal")
    if any(isinstance(handler, (DefaultHandler, logging.NullHandler)) for handler in logger.handlers):
        return
    wanted = os.environ.get("SHOAL_LOGLEVEL", "").strip().upper()
    if wanted == _OFF:
        logger.addHandler(logging.NullHandler())
        return
    logger.addHandler(DefaultHandler())
    level = _parse_level(wanted)
    if level is not None:
        logger.setLevel(level)
    elif logger.level == logging.NOTSET and not logging.getLogger().handlers:
        logger.setLevel(logging.INFO)
    if wanted and level is None:
        names = ", ".join([*logging.getLevelNamesMapping(), "OFF"])
        logger.warning("SHOAL_LOGLEVEL=%r is not a level; known are %s and numbers", wanted, names)


def _parse_level(text: str) -> int | None:
    if text.isdigit():
        return int(text)
    return logging.getLevelNamesMapping().get(text)
