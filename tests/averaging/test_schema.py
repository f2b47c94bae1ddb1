from __future__ import annotations

import pytest
import torch

from shoal.averaging.group import SCHEMA_HASH_BYTES
from shoal.averaging.schema import TensorSchema, TensorSpec
from shoal.averaging.trainer.tensor_checks import check_tensors
from shoal.compression import Float16Compression, NoCompression
from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.utils.dtypes import FLOAT16


def check(tensors):
    check_tensors(tensors, [f"tensors[{index}]" for index in range(len(tensors))])


def test_fit_tensors():
    tensors = [
        torch.zeros(3),
        torch.nn.Parameter(torch.zeros(2, 2)),
        torch.zeros(()),
        torch.zeros(0, 4),
        torch.zeros(0, 4),
        torch.zeros(3, 4).t(),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(2, dtype=torch.float16),
        torch.zeros(2, dtype=torch.bfloat16),
    ]
    check(tensors)


def without_memory():
    tensor = torch.zeros(3)
    tensor.untyped_storage().resize_(0)
    return tensor


def leaf():
    return torch.ones(2, 2, requires_grad=True)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (5, "int"),
        ([1.0, 2.0], "list"),
        (torch.zeros(2, dtype=torch.int64), "got int64: leave it out"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.zeros(2, dtype=torch.bool), "bool"),
        (torch.eye(2).to_sparse(), "sparse_coo"),
        (torch.zeros(2, device="meta"), "meta"),
        (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged), "nested"),
        (leaf() * 2, "grad_fn=MulBackward0"),
        (leaf()[0], "grad_fn"),
        (torch.zeros(1).expand(4), "share memory"),
        (torch.zeros(8).as_strided((3, 3), (2, 1)), "share memory"),
        (torch.nn.LazyLinear(3).weight, "UninitializedParameter"),
        (torch._neg_view(torch.ones(3)), "resolve_neg()"),
        (without_memory(), "storage of 0 bytes"),
    ],
)
def test_unfit_tensors_are_named(bad, words):
    with pytest.raises((InvalidTypeError, InvalidValueError)) as caught:
        check([torch.zeros(1), bad])
    assert "tensors[1]" in str(caught.value)
    assert words in str(caught.value)


def test_inference_tensors_are_refused():
    with torch.inference_mode():
        tensor = torch.zeros(2)
    with pytest.raises(InvalidValueError, match="inference mode"):
        check([tensor])


def test_the_same_tensor_twice():
    for tensor in (torch.zeros(2), torch.zeros(0)):
        with pytest.raises(InvalidValueError, match=r"\[2\] is tensors\[0\] again"):
            check([tensor, torch.zeros(3), tensor])


BASE = torch.zeros(64)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (BASE, BASE[:]),
        (BASE[:10], BASE[9:20]),
        (BASE[9:20], BASE[:10]),
        (BASE.view(8, 8)[:, 1], BASE.view(8, 8)[2]),
        (BASE, BASE.view(torch.bfloat16)[3:5]),
        (BASE.view(8, 8).t(), BASE[5:6]),
    ],
)
def test_shared_memory(first, second):
    with pytest.raises(InvalidValueError, match=r"\[1\] shares memory with tensors\[0\]"):
        check([first, second])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (BASE[:10], BASE[10:20]),
        (BASE.view(8, 8)[:, 1], BASE.view(8, 8)[:, 2]),
        (BASE[::2], BASE[1::2]),
        (BASE[::3], BASE[1:2]),
    ],
)
def test_neighbours_in_one_storage_are_fine(first, second):
    check([first, second])
    check([second, first])


def test_elements_that_only_seem_to_overlap():
    check([torch.zeros(40).as_strided((3, 2), (2, 3))])  # 0 3 2 5 4 7


def schema(*tensors, codecs=None):
    return TensorSchema.from_tensors(tensors, codecs)


def test_equal_schemas_have_equal_digests():
    mine = schema(torch.zeros(3, 4), torch.zeros(()))
    same = schema(torch.ones(4, 3).t().requires_grad_(), torch.zeros(()), codecs=[NoCompression()] * 2)
    assert mine == same
    assert mine.agreement(1024, 2) == same.agreement(1024, 2)
    assert len(mine.agreement(1024, 2).digest()) == SCHEMA_HASH_BYTES


def test_canonical_form_is_fixed():
    assert (
        schema(torch.zeros(3, 4), torch.zeros((), dtype=torch.bfloat16)).to_bytes()
        == b"shoal tensors 1\nfloat32 3x4 codec 0\nbfloat16 scalar codec 0\n"
    )


def test_different_schemas():
    variants = [
        schema(torch.zeros(3, 4)),
        schema(torch.zeros(4, 3)),
        schema(torch.zeros(12)),
        schema(torch.zeros(1, 2)),
        schema(torch.zeros(3, 4, dtype=torch.float64)),
        schema(torch.zeros(3, 4), codecs=[Float16Compression()]),
        schema(torch.zeros(3, 4), torch.zeros(3, 4)),
        schema(torch.zeros(())),
        schema(torch.zeros(1)),
        schema(torch.zeros(0)),
    ]
    assert len({variant.agreement(1024, 2).digest() for variant in variants}) == len(variants)


def test_number_of_codecs():
    with pytest.raises(InvalidValueError, match="2 codecs"):
        schema(torch.zeros(1), codecs=[NoCompression()] * 2)


def test_specs_print():
    assert str(TensorSpec((2, 3), FLOAT16, 1)) == "float16 2x3 codec 1"


def test_peers_agree_only_if_schema_part_size_and_smallest_group_are_equal():
    mine, other = (TensorSchema.from_tensors([torch.zeros(size)]) for size in (3, 4))
    agreed = [mine.agreement(1024, 2), mine.agreement(2048, 2), mine.agreement(1024, 3)]
    agreements = {agreement.digest() for agreement in agreed}
    assert len(agreements | {other.agreement(1024, 2).digest()}) == 4
