"""The demo's data: scikit-learn's handwritten digits, dealt out so that no two peers have an image in common.

Every process loads the same images (they come with scikit-learn, nothing is downloaded) and cuts them in the
same way, so that a peer needs to be told no more than the name of its part.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shoal.errors import InvalidValueError, UsageError

CLASSES = 10
PIXELS = 64
MAX_PIXEL = 16.0
HELD_OUT_FRACTION = 0.2
RESERVE_FRACTION = 0.06
"""Part of the training images that nobody has until somebody joins from another terminal."""
RESERVE_PARTS = 3
SPLIT_SEED = 1

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Samples:
    """``images``: float32 ``(n, 64)`` in 0..1; ``labels``: int64 ``(n,)`` in 0..9."""

    images: Array
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> tuple[int, ...]:
        return tuple(int(label) for label in np.unique(self.labels))

    def take(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> Samples:
        return Samples(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class Digits:
    """All images, dealt out: ``training`` is the union of ``parts`` and ``reserve``."""

    held_out: Samples
    training: Samples
    parts: tuple[Samples, ...]
    """One per founding peer; no class is in two of them."""
    reserve: tuple[Samples, ...]
    """For those who join from another terminal."""

    def part(self, index: int, *, reserve: bool) -> Samples:
        """:raises InvalidValueError: there is no such part"""
        parts = self.reserve if reserve else self.parts
        if not 0 <= index < len(parts):
            raise InvalidValueError(f"part must be 0 to {len(parts) - 1}, got {index}")
        return parts[index]


def require_demo_packages() -> None:
    """:raises UsageError: a package of the extra ``demo`` is missing"""
    packages = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f"the demo needs {' and '.join(missing)}: pip install -e '.[demo]' in a clone")


def load_samples() -> Samples:
    """The 1,797 images of 8 x 8 pixels, scaled to 0..1.

    Reads the file that ``sklearn.datasets.load_digits`` reads. Importing scikit-learn for that takes a second of CPU in
    each process, so it is done only if the file is not where it has always been.
    """
    rows = _read_digits_file()
    if rows is None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
    else:
        images, labels = rows[:, :PIXELS], rows[:, PIXELS]
    return Samples((images / MAX_PIXEL).astype(np.float32), labels.astype(np.int64))


def _read_digits_file() -> npt.NDArray[np.float64] | None:
    found = importlib.util.find_spec("sklearn")  # finds the package without importing it
    for folder in (found and found.submodule_search_locations) or ():
        path = Path(folder, "datasets", "data", "digits.csv.gz")
        if path.is_file():
            return np.loadtxt(path, delimiter=",")
    return None


def deal(samples: Samples, peers: int) -> Digits:
    """Hold images out, then deal the rest to ``peers`` founders by class; the same for the same arguments.

    Founder ``i`` gets all images of the classes ``c`` with ``c % peers == i``, but for the reserve.

    :raises InvalidValueError: there are more peers than classes
    """
    if not 1 <= peers <= CLASSES:
        raise InvalidValueError(
            f"peers must be 1 to {CLASSES}, since each needs a class of its own, got {peers}"
        )
    order = np.random.default_rng(SPLIT_SEED).permutation(len(samples))
    held_out_count = int(len(samples) * HELD_OUT_FRACTION)
    held_out, training = samples.take(order[:held_out_count]), samples.take(order[held_out_count:])
    reserve_count = int(len(training) * RESERVE_FRACTION)
    in_reserve = np.arange(len(training)) < reserve_count
    return Digits(
        held_out=held_out,
        training=training,
        parts=_by_class(training.take(~in_reserve), peers),
        reserve=_by_class(training.take(in_reserve), RESERVE_PARTS),
    )


def _by_class(samples: Samples, count: int) -> tuple[Samples, ...]:
    return tuple(samples.take(samples.labels % count == index) for index in range(count))
