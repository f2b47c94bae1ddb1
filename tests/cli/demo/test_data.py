from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from shoal.cli.demo import data
from shoal.cli.demo.data import CLASSES, RESERVE_PARTS, deal, load_samples
from shoal.errors import InvalidValueError


def rows(samples: data.Samples) -> set[bytes]:
    return {image.tobytes() for image in samples.images}


@pytest.mark.parametrize("file_there", [True, False])
def test_images_are_those_of_scikit_learn(file_there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not file_there:
        monkeypatch.setattr(data, "_read_digits_file", lambda: None)
    images, labels = load_digits(return_X_y=True)
    samples = load_samples()
    assert samples.images.dtype == np.float32
    np.testing.assert_array_equal(samples.images * 16, images)
    np.testing.assert_array_equal(samples.labels, labels)


@pytest.mark.parametrize("peers", range(2, 11))
def test_parts_are_disjoint_and_nothing_is_lost(peers: int) -> None:
    samples = load_samples()
    digits = deal(samples, peers)
    everything = [digits.held_out, *digits.parts, *digits.reserve]
    assert sum(map(len, everything)) == len(samples)
    assert set().union(*map(rows, everything)) == rows(samples)
    assert sum(map(len, [*digits.parts, *digits.reserve])) == len(digits.training)
    assert len(digits.parts) == peers
    assert sorted(label for part in digits.parts for label in part.classes) == list(range(CLASSES))
    assert sorted(label for part in digits.reserve for label in part.classes) == list(range(CLASSES))
    assert min(map(len, digits.reserve)) >= 20
    assert digits.held_out.classes == tuple(range(CLASSES))


def test_every_process_deals_the_same() -> None:
    first, second = deal(load_samples(), 4), deal(load_samples(), 4)
    np.testing.assert_array_equal(first.held_out.images, second.held_out.images)
    np.testing.assert_array_equal(first.part(3, reserve=False).images, second.parts[3].images)
    np.testing.assert_array_equal(first.part(2, reserve=True).labels, second.reserve[2].labels)


def test_what_cannot_be_dealt() -> None:
    samples = load_samples()
    for peers in (0, CLASSES + 1):
        with pytest.raises(InvalidValueError, match=f"peers must be 1 to 10, .*, got {peers}"):
            deal(samples, peers)
    digits = deal(samples, 4)
    with pytest.raises(InvalidValueError, match="part must be 0 to 3, got 4"):
        digits.part(4, reserve=False)
    with pytest.raises(InvalidValueError, match=f"part must be .*, got {RESERVE_PARTS}"):
        digits.part(RESERVE_PARTS, reserve=True)
