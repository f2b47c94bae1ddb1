"""Log records of the background process, and what is printed there, on their way to the user process's ``logging``."""

from __future__ import annotations

import io
import logging
import pickle
import threading
from collections.abc import Callable
from typing import Any

OUTPUT_LOGGER = "shoal.runtime.output"
"""The logger of what code in the background process prints."""

_MAX_UNSENT_BYTES = 1 << 20
_PLAIN = (str, int, float, bool, type(None))
_OWN_ATTRIBUTES = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_FORMATTER = logging.Formatter()


class ForwardingHandler(logging.Handler):
    """Sends records to the user process; drops and counts them while the user process does not read, and never blocks.

    :param send: takes a record's bytes; on any thread
    :param unsent_bytes: how much waits to be read by the user process
    """

    def __init__(self, send: Callable[[bytes], None], unsent_bytes: Callable[[], int]) -> None:
        super().__init__()
        self._send = send
        self._unsent_bytes = unsent_bytes
        self._dropped = 0
        self.fields: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if self._unsent_bytes() > _MAX_UNSENT_BYTES:
            self._dropped += 1
            return
        try:
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                text = f"{dropped} log records were dropped because the user process did not read them"
                self._forward(logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, None, None))
            self._forward(record)
        except BrokenPipeError:
            pass  # the user process is gone; the process is about to end
        except (TypeError, ValueError, pickle.PicklingError):
            self.handleError(record)  # a record whose arguments do not fit its message

    def _forward(self, record: logging.LogRecord) -> None:
        attributes: dict[str, Any] = dict(self.fields)
        for name, value in record.__dict__.items():
            if name not in _OWN_ATTRIBUTES:
                attributes[name] = value if isinstance(value, _PLAIN) else str(value)
        if record.exc_info and not record.exc_text:
            record.exc_text = _FORMATTER.formatException(record.exc_info)
        attributes |= {
            "name": record.name,
            "msg": record.getMessage(),
            "levelno": record.levelno,
            "levelname": record.levelname,
            "created": record.created,
            "msecs": record.msecs,
            "pathname": record.pathname,
            "filename": record.filename,
            "module": record.module,
            "lineno": record.lineno,
            "funcName": record.funcName,
            "process": record.process,
            "threadName": record.threadName,
            "exc_text": record.exc_text,
            "stack_info": record.stack_info,
        }
        self._send(pickle.dumps(attributes))


class OutputWriter(io.TextIOBase):
    """Takes the place of ``sys.stdout`` or ``sys.stderr``: every line printed becomes a log record.

    The process's own descriptors 1 and 2 stay a pipe to the user process, for what is written past Python (crashes).
    """

    def __init__(self, level: int) -> None:
        self._level = level
        self._logger = logging.getLogger(OUTPUT_LOGGER)
        self._lock = threading.RLock()
        self._line = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if line.strip():
                self._logger.log(self._level, "%s", line)
        return len(text)


class Reemitter:
    """The user process's side: turns what the process sent into records of the user process's loggers.

    :param process_name: becomes ``processName`` of every record
    """

    def __init__(self, process_name: str) -> None:
        self._process_name = process_name
        # logging counts relativeCreated from the moment when it was imported.
        probe = logging.LogRecord("", 0, "", 0, "", None, None)
        self._started = probe.created - probe.relativeCreated / 1000

    def record_from(self, data: bytes) -> logging.LogRecord:
        """The record, with its own time, level, logger, thread and process."""
        attributes = pickle.loads(data)  # noqa: S301 - from our own process, over the private channel
        attributes["processName"] = self._process_name
        attributes["relativeCreated"] = (attributes["created"] - self._started) * 1000
        return logging.makeLogRecord(attributes)

    def output_record(self, line: str, pid: int) -> logging.LogRecord:
        """The record of a line that the process wrote past its own logging."""
        record = logging.LogRecord(OUTPUT_LOGGER, logging.WARNING, __file__, 0, line, None, None)
        record.process = pid
        record.processName = self._process_name
        return record


def emit(record: logging.LogRecord) -> None:
    """Hand a record to the user process's logger of its name, if that is enabled for its level."""
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


def summarize(record: logging.LogRecord) -> str:
    """One record as the lines that :class:`~shoal.errors.PeerProcessDied` shows."""
    text = f"{record.levelname} {record.name}: {record.getMessage()}"
    return f"{text}\n{record.exc_text}" if record.exc_text else text
