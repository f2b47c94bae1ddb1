"""The function by which programs for hivemind choose its log handler."""

from __future__ import annotations

import importlib
import warnings


def use_hivemind_log_handler(where: object = "in_root_logger") -> None:
    """Warn that nothing has to be chosen. In hivemind, ``where`` names the logger that gets its handler.

    Shoal's records are seen anyway, and go to the handlers that the program brings.
    """
    importlib.import_module("shoal.utils.logging").show_logs()
    warnings.warn(
        f"use_hivemind_log_handler({where!r}) has no effect: Shoal's records are shown anyway, and go to the handlers "
        "of the logging module if you add some; SHOAL_LOGLEVEL sets the level",
        UserWarning,
        stacklevel=2,
    )
