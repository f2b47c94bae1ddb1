"""What is known of dtypes without torch is what torch says."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch

from shoal.utils.dtypes import AVERAGED, DTYPES, DType, dtype_of, name_of


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_sizes_and_kinds_are_those_of_torch(dtype: DType):
    assert dtype.torch_dtype is getattr(torch, dtype.name)
    assert dtype.itemsize == dtype.torch_dtype.itemsize
    assert dtype.is_floating == dtype.torch_dtype.is_floating_point
    assert dtype_of(torch.empty(0, dtype=dtype.torch_dtype)) is dtype
    assert name_of(dtype.torch_dtype) == str(dtype)
    assert pickle.loads(pickle.dumps(dtype)) == dtype


def test_a_dtype_that_no_state_has_is_a_key_error():
    with pytest.raises(KeyError):
        dtype_of(torch.empty(1, dtype=torch.float8_e5m2))
    assert name_of(torch.float8_e5m2) == "float8_e5m2"


def test_what_is_averaged_is_floating():
    assert list(AVERAGED) == ["float16", "bfloat16", "float32", "float64"]
    assert all(dtype.is_floating for dtype in AVERAGED.values())


def test_the_background_process_of_plain_tensors_needs_no_torch():
    """Seconds, and 140 MB, for each peer."""
    code = """
import pickle, sys
import shoal.averaging.background.service, shoal.dht.service
from shoal.averaging.partition import Layout, Partition
from shoal.averaging.schema import TensorSchema, TensorSpec
from shoal.utils.dtypes import DTYPES
schema = pickle.loads(pickle.dumps(TensorSchema((TensorSpec((5,), DTYPES["float32"]),))))
Partition.create(Layout.from_schema(schema), [20], 1 << 19)
print("torch" in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "False"
