"""How many samples a batch has, whatever a data loader makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from shoal.frameworks.batches import batch_size


@dataclass
class Batch:
    name: str
    x: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(3, 2), 3),
        ([[torch.zeros(4)], torch.zeros(2)], 4),
        ({"scale": torch.tensor(1.0), "of": {"x": torch.zeros(5, 1)}}, 5),
        ([None, torch.tensor(1.0), {"mask": None, "ids": torch.zeros(7, 2)}], 7),
        (("text", Batch("text", torch.zeros(6))), 6),
        (torch.nn.utils.rnn.pack_sequence([torch.zeros(3), torch.zeros(2)]), 2),
        (torch.zeros(0, 2), 0),
        ([None, 3, "text"], None),
    ],
)
def test_it_is_the_length_of_the_first_tensor_that_is_no_scalar(batch: Any, size: int | None):
    assert batch_size(batch) == size
