"""The text: the source code of Python's own standard library, about 30 MB that every machine with Python has.

It is dealt out by *unit*: a top-level module or package together with its tests (``json``, ``test/test_json``
and ``test/json_tests.py`` are the unit ``json``). A unit goes to one split only, chosen by a hash of its
name, so that every machine deals in the same way, whatever other units its version of Python has: no two
peers have a package in common, and what is held out has been seen by nobody.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

HELD_OUT_PERCENT = 5
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__"}
"""Folders inside that of the standard library that are not part of it."""


@dataclass(frozen=True)
class Corpus:
    """Bytes of text: one-dimensional ``torch.uint8`` tensors."""

    parts: tuple[torch.Tensor, ...]
    """One for each peer."""
    held_out: torch.Tensor


def unit_of(path: PurePosixPath) -> str:
    """The unit of a file, by its path relative to the standard library."""
    names = [name.removesuffix(".py") for name in path.parts]
    name = names[1] if names[0] == "test" and len(names) > 1 else names[0]
    return name.removeprefix("test_").removesuffix("_tests").lstrip("_")


def split_of(unit: str, peers: int) -> int | None:
    """Which peer's part a unit belongs to; None: it is held out. Names decide, so the split is the same
    everywhere.
    """
    number = int.from_bytes(hashlib.sha256(unit.encode()).digest()[:8], "big")
    percent, rest = number % 100, number // 100
    return None if percent < HELD_OUT_PERCENT else rest % peers


def load_corpus(peers: int, folder: Path | None = None) -> Corpus:
    """Read every ``.py`` file below ``folder`` (default: the standard library), in the order of their names.

    :raises FileNotFoundError: there is so little that a part or the held-out text would be empty
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    texts: dict[int | None, list[bytes]] = {split: [] for split in (None, *range(peers))}
    for path in _source_files(folder):
        unit = unit_of(PurePosixPath(path.relative_to(folder).as_posix()))
        texts[split_of(unit, peers)].append(path.read_bytes())
    for split, found in texts.items():
        if not any(found):
            what = "the held-out text" if split is None else f"part {split}"
            raise FileNotFoundError(f"{folder} has too few Python files: there is none for {what}")
    return Corpus(tuple(_as_tensor(texts[part]) for part in range(peers)), _as_tensor(texts[None]))


def _source_files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.rglob("*.py") if LEFT_OUT.isdisjoint(path.relative_to(folder).parts)
    )


def _as_tensor(texts: Iterable[bytes]) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"\n".join(texts)), dtype=torch.uint8)


def random_batch(
    text: torch.Tensor, size: int, length: int, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """``size`` windows of ``text`` at random places.

    :returns: the windows, and for each of their bytes the one that follows it: both ``(size, length)``, int64
    """
    starts = torch.randint(len(text) - length, (size, 1), generator=rng)
    windows = text[starts + torch.arange(length + 1)].long()
    return windows[:, :-1], windows[:, 1:]


def even_windows(text: torch.Tensor, count: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` windows spread evenly over ``text``, in the form of :func:`random_batch`."""
    starts = torch.linspace(0, len(text) - length - 1, count).long()[:, None]
    windows = text[starts + torch.arange(length + 1)].long()
    return windows[:, :-1], windows[:, 1:]
