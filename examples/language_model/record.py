"""What a run leaves behind: a folder for each peer with ``log.jsonl``, a line an event, and ``*.pt``, copies
of the model.

Held-out text is not evaluated while the run goes on, which would take time away from it, but afterwards
(``evaluate.py``), from the copies.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from training import LocalTrainer, Settings

LOG = "log.jsonl"
FINAL = "final.pt"
SUMMARY = "run.json"


class Record:
    """:param folder: made if it is not there
    :param started: when the run began, in seconds of :func:`time.time`; None: now
    """

    def __init__(self, folder: Path, started: float | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._started = time.time() if started is None else started
        self._log = (folder / LOG).open("a", encoding="utf-8", buffering=1)  # a whole line at a time

    def write(self, event: str, **values: Any) -> None:
        """Append a line: the event, seconds since the beginning of the run, and ``values``."""
        seconds = round(time.time() - self._started, 3)
        self._log.write(json.dumps({"event": event, "seconds": seconds, **values}) + "\n")

    def save(self, tensors: Iterable[torch.Tensor], trainer: LocalTrainer, *, final: bool = False) -> None:
        """Keep a copy of the model, whose parameters are ``tensors`` (those of ``trainer``, or the base they
        started from).
        """
        name = FINAL if final else f"step-{trainer.step:06d}.pt"
        torch.save([tensor.detach() for tensor in tensors], self._folder / name)
        self.write("saved", file=name, step=trainer.step, tokens=trainer.tokens)

    def close(self) -> None:
        self._log.close()


def write_summary(run: Path, settings: Settings, **more: Any) -> None:
    """Write what is known of a run, the folder above those of its peers, to ``run.json``."""
    summary = {"settings": asdict(settings), "events": [], **more}
    (run / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")


def read_log(folder: Path) -> Iterator[dict[str, Any]]:
    """The events of a peer so far; none if it has not begun. The last line may still be being written: it is
    left out.
    """
    try:
        text = (folder / LOG).read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    for line in text.splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)
