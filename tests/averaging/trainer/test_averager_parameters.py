"""Every parameter of the averager is checked before anything starts; no process is needed for that."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import math
import re
import weakref
from typing import Any

import numpy as np
import pytest
import torch

import shoal
from shoal.averaging import DecentralizedAverager
from shoal.averaging.checks import check_scheduled_time
from shoal.averaging.config import default_start
from shoal.averaging.matchmaking_config import matchmaking_config
from shoal.averaging.trainer import holders
from shoal.averaging.trainer.control import check_weight
from shoal.utils.timed import get_dht_time

SIGNATURE = [
    "averaged_tensors",
    "dht",
    "start",
    "prefix",
    "target_group_size",
    "min_group_size",
    "initial_group_bits",
    "min_matchmaking_time",
    "request_timeout",
    "averaging_alpha",
    "part_size_bytes",
    "allreduce_timeout",
    "next_chunk_timeout",
    "sender_timeout",
    "reducer_timeout",
    "adaptive_timeouts",
    "compression",
    "state_compression",
    "tensor_infos",
    "bandwidth",
    "min_vector_size",
    "auxiliary",
    "allow_state_sharing",
    "declare_state_period",
    "client_mode",
    "daemon",
    "shutdown_timeout",
    "apply_when",
    "max_state_age",
    "detect_lost_updates",
]


class Unregistered(shoal.NoCompression):
    compression_type = 200


def make(**options: Any) -> DecentralizedAverager:
    dht = shoal.DHT(start=False)
    settings: dict[str, Any] = {
        "averaged_tensors": [torch.zeros(3)],
        "dht": dht,
        "start": False,
        "prefix": "p",
    }
    return DecentralizedAverager(**(settings | options))


def test_the_signature_is_that_of_the_reference():
    parameters = inspect.signature(DecentralizedAverager).parameters
    assert sorted(parameters) == sorted(SIGNATURE)
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert (defaults["min_group_size"], defaults["min_matchmaking_time"], defaults["request_timeout"]) == (
        2,
        5,
        3,
    )
    assert (defaults["part_size_bytes"], defaults["averaging_alpha"], defaults["shutdown_timeout"]) == (
        524288,
        1,
        5,
    )


def test_the_defaults_make_an_averager():
    averager = make()
    assert averager.prefix == "p"
    assert averager.total_size == 3
    assert not averager.is_alive()


@pytest.mark.parametrize(
    "given",
    [
        {"bandwidth": 50.0},
        {"next_chunk_timeout": 2.5},
        {"declare_state_period": 7.0},
        {"shutdown_timeout": 3.0},
        {"state_compression": shoal.Float16Compression()},
        {"tensor_infos": (shoal.compression.CompressionInfo.from_tensor(torch.zeros(3), "weights"),)},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_holds_for_life_can_be_read_and_not_be_set(given: dict[str, Any]):
    """Who sets it would rely on it, as with hivemind."""
    averager = make(**given)
    ((name, value),) = given.items()
    assert getattr(averager, name) == value
    with pytest.raises(AttributeError, match=name):
        setattr(averager, name, value)


def test_what_tensors_are_for_may_be_any_iterable():
    tensors = [torch.zeros(3), torch.zeros(2)]
    infos = [shoal.CompressionInfo.from_tensor(tensor, key=f"k{tensor.numel()}") for tensor in tensors]
    averager = make(averaged_tensors=tensors, tensor_infos=(info for info in infos))
    _, _, kept = averager.get_current_state()
    assert kept == tuple(infos)


def test_a_bound_is_said_with_all_its_digits():
    now = get_dht_time()
    with pytest.raises(ValueError, match=r"^scheduled_time must be") as caught:
        check_scheduled_time(now + 86500, None)
    allowed = float(re.search(r"at most (\S+), got", str(caught.value))[1])
    assert abs(allowed - now - 86400) < 10


def test_waiting_for_an_averager_that_was_not_started_says_so():
    with pytest.raises(shoal.InvalidStateError, match="run_in_background"):
        make().wait_until_ready(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": ""}, "prefix must be 1 to 256 characters, got ''"),
        ({"target_group_size": 0}, "target_group_size must be 1 to 4096 peers, got 0"),
        (
            {"target_group_size": 2, "min_group_size": 3},
            "target_group_size must be None or at least 3 (min_group_size), got 2",
        ),
        ({"min_group_size": 0}, "min_group_size must be 1 to 4096 peers, got 0"),
        ({"min_matchmaking_time": 0}, "min_matchmaking_time must be more than 0 and at most 86400 s, got 0"),
        ({"min_matchmaking_time": math.inf}, "min_matchmaking_time must be a finite number, got inf"),
        ({"request_timeout": -1}, "request_timeout must be more than 0 s, got -1"),
        ({"averaging_alpha": math.nan}, "averaging_alpha must be a finite number, got nan"),
        (
            {"averaging_alpha": 10**5000},
            "averaging_alpha must be a number in the range of float, got a whole number of 16610 bits",
        ),
        ({"averaging_alpha": 0}, "averaging_alpha must be more than 0 and at most 2, got 0"),
        ({"averaging_alpha": 1e300}, "averaging_alpha must be more than 0 and at most 2, got 1e+300"),
        ({"part_size_bytes": 10}, "part_size_bytes must be 1024 to 67108864 bytes, got 10"),
        ({"part_size_bytes": 1 << 40}, "part_size_bytes must be 1024 to 67108864 bytes, got 1099511627776"),
        ({"allreduce_timeout": 0}, "allreduce_timeout must be more than 0 s, got 0"),
        ({"bandwidth": -1.0}, "bandwidth must be at least 0 Mbit/s, got -1.0"),
        ({"bandwidth": math.inf}, "bandwidth must be a finite number, got inf"),
        ({"shutdown_timeout": -1}, "shutdown_timeout must be 0 to 9223372036 s, got -1"),
        ({"shutdown_timeout": 1e10}, "shutdown_timeout must be 0 to 9223372036 s, got 10000000000.0"),
        (
            {"initial_group_bits": "012"},
            "initial_group_bits must be at most 64 characters '0' and '1', got '012'",
        ),
        (
            {"initial_group_bits": "0" * 65},
            "initial_group_bits must be at most 64 characters '0' and '1', got '000",
        ),
        ({"next_chunk_timeout": 0}, "next_chunk_timeout must be more than 0 s, got 0"),
        ({"sender_timeout": -1.0}, "sender_timeout must be more than 0 s, got -1.0"),
        ({"reducer_timeout": math.inf}, "reducer_timeout must be a finite number, got inf"),
        ({"allreduce_timeout": math.inf}, "allreduce_timeout must be a finite number, got inf"),
        ({"min_vector_size": -1}, "min_vector_size must be 0 to 4611686018427387904 elements, got -1"),
        (
            {"min_vector_size": 1 << 64},
            "min_vector_size must be 0 to 4611686018427387904 elements, got 18446744073709551616",
        ),
        (
            {"min_vector_size": 10**5000},
            "min_vector_size must be 0 to 4611686018427387904 elements, got a whole number of 16610 bits",
        ),
        (
            {"target_group_size": 10**5000},
            "target_group_size must be 1 to 4096 peers, got a whole number of 16610 bits",
        ),
        (
            {"min_group_size": 10**5000},
            "min_group_size must be 1 to 4096 peers, got a whole number of 16610 bits",
        ),
        (
            {"part_size_bytes": 10**5000},
            "part_size_bytes must be 1024 to 67108864 bytes, got a whole number of 16610 bits",
        ),
        ({"declare_state_period": 1e-9}, "declare_state_period must be 0.1 to 3000 s, got 1e-09"),
        ({"prefix": "a\ud800"}, "prefix must be a text that can be written in UTF-8, got 'a\\ud800'"),
        ({"declare_state_period": 0}, "declare_state_period must be 0.1 to 3000 s, got 0"),
        ({"declare_state_period": 4000}, "declare_state_period must be 0.1 to 3000 s, got 4000"),
        ({"client_mode": True, "auxiliary": True}, "auxiliary must be False with client_mode=True, got True"),
        (
            {"client_mode": True, "allow_state_sharing": True},
            "allow_state_sharing must be False or None with client_mode=True, got True",
        ),
        ({"tensor_infos": []}, "tensor_infos must have 1 items, one for each averaged tensor, got 0"),
        (
            {"tensor_infos": [shoal.CompressionInfo.from_tensor(torch.zeros(4))]},
            "tensor_infos[0] must describe torch.float32 [3]",
        ),
        ({"compression": Unregistered()}, "compression must be a registered codec, got Unregistered()"),
        (
            {"state_compression": Unregistered()},
            "state_compression must be a registered codec, got Unregistered()",
        ),
        ({"daemon": False}, "daemon=False"),
        ({"averaged_tensors": []}, "averaged_tensors must hold at least one tensor, got none"),
    ],
)
def test_a_value_out_of_range_is_a_value_error_that_names_it(options: dict[str, Any], message: str):
    with pytest.raises(ValueError) as caught:
        make(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": 3}, "prefix must be a text, got 3"),
        ({"target_group_size": "4"}, "target_group_size must be a whole number, got '4'"),
        ({"min_group_size": 2.5}, "min_group_size must be a whole number, got 2.5"),
        ({"min_matchmaking_time": "5"}, "min_matchmaking_time must be a number, got '5'"),
        ({"client_mode": 1}, "client_mode must be True or False, got 1"),
        ({"start": "yes"}, "start must be True or False, got 'yes'"),
        ({"compression": "fp16"}, "compression must be an object of a CompressionBase subclass, got 'fp16'"),
        (
            {"state_compression": "fp16"},
            "state_compression must be an object of a CompressionBase subclass, got 'fp16'",
        ),
        ({"initial_group_bits": 1}, "initial_group_bits must be a text, got 1"),
        ({"auxiliary": "no"}, "auxiliary must be True or False, got 'no'"),
        ({"allow_state_sharing": 1}, "allow_state_sharing must be True or False, got 1"),
        ({"min_vector_size": 0.5}, "min_vector_size must be a whole number, got 0.5"),
        ({"sender_timeout": "5"}, "sender_timeout must be a number, got '5'"),
        ({"declare_state_period": None}, "declare_state_period must be a number, got None"),
        ({"tensor_infos": 5}, "tensor_infos must be None or a CompressionInfo for each tensor, got 5"),
        ({"tensor_infos": [None]}, "tensor_infos[0] must be a CompressionInfo, got None"),
        ({"dht": "dht"}, "dht must be a shoal.DHT, got 'dht'"),
        ({"averaged_tensors": torch.zeros(3)}, "got a single tensor: pass [tensor]"),
        (
            {"averaged_tensors": [torch.zeros(3, dtype=torch.int64)]},
            "averaged_tensors[0] must be a dense torch.Tensor of float16, bfloat16, float32, float64, got int64",
        ),
        ({"averaged_tensors": [torch.zeros(3).to_sparse()]}, "averaged_tensors[0]"),
        ({"averaged_tensors": [1.0]}, "averaged_tensors[0] must be a dense torch.Tensor"),
    ],
)
def test_a_wrong_type_is_a_type_error_that_names_it(options: dict[str, Any], message: str):
    with pytest.raises(TypeError) as caught:
        make(**options)
    assert message in str(caught.value)


def test_a_tensor_computed_by_autograd_is_refused():
    with pytest.raises(ValueError, match=r"averaged_tensors\[0\] was computed by autograd"):
        make(averaged_tensors=[torch.zeros(3, requires_grad=True) * 2])


@pytest.mark.parametrize("timeout", [-1, 1e10, math.nan])
def test_a_time_to_wait_for_the_start_that_cannot_be_is_named(timeout: float):
    with pytest.raises(ValueError, match=r"^timeout must be"):
        make().run_in_background(timeout=timeout)
    with pytest.raises(ValueError, match=r"^timeout must be"):
        make().wait_until_ready(timeout)


NUMBERS = {
    "target_group_size": np.int64(4),
    "min_group_size": np.int32(3),
    "min_vector_size": np.int64(1 << 40),
    "part_size_bytes": np.uint32(1 << 16),
    "min_matchmaking_time": np.float32(2.5),
    "request_timeout": np.float64(1.5),
    "averaging_alpha": np.float32(0.5),
    "allreduce_timeout": np.int16(60),
    "next_chunk_timeout": np.float32(10),
    "bandwidth": np.float32(100),
    "declare_state_period": torch.tensor(7.0),
    "shutdown_timeout": np.int8(3),
    "auxiliary": np.bool_(False),
    "prefix": np.str_("run"),
}


def test_numbers_of_numpy_and_torch_are_taken_as_pythons_own():
    averager = make(**NUMBERS)
    config = averager._DecentralizedAverager__parts.config
    values = [getattr(config, field.name) for field in dataclasses.fields(config)]
    values += [getattr(config.matchmaking, field.name) for field in dataclasses.fields(config.matchmaking)]
    kinds = {type(value) for value in values} - {type(config.matchmaking)}
    assert kinds <= {int, float, bool, str, type(None)}
    assert (config.min_vector_size, config.matchmaking.min_matchmaking_time) == (1 << 40, 2.5)
    assert averager.bandwidth == 100


@pytest.mark.parametrize("value", [np.float32(math.nan), np.float64(-1), np.array([5.0]), np.int64(-3)])
def test_numbers_of_numpy_are_checked_as_others_are(value: Any):
    with pytest.raises((ValueError, TypeError), match=r"^bandwidth must be"):
        make(bandwidth=value)


def test_weights_and_times_may_be_numbers_of_numpy():
    assert type(check_weight(np.float32(3))) is float
    assert type(check_scheduled_time(np.float64(get_dht_time() + 1), None)) is float


@pytest.mark.parametrize("prefix", ["Qwen2.5-0.5B", ".", "run.0b01"])
def test_a_prefix_may_have_dots(prefix: str):
    assert make(prefix=prefix).prefix == prefix


def test_an_averager_of_a_module_has_its_trainable_parameters():
    model = torch.nn.Linear(4, 2)
    averager = make(averaged_tensors=model)
    with averager.get_tensors() as tensors:
        assert [id(one) for one in tensors] == [id(one) for one in model.parameters()]
    model.weight = torch.nn.Parameter(torch.zeros(2, 4))
    with averager.get_tensors() as tensors:
        assert tensors[0] is model.weight
    assert averager.get_current_state()[1][0] is model.weight


def test_a_module_that_refers_to_its_averager_is_collected_with_it():
    model = torch.nn.Linear(4, 2)
    model.averager = make(averaged_tensors=model)
    gone = weakref.ref(model.averager)
    del model
    gc.collect()
    assert gone() is None


def test_lists_of_plain_tensors_are_searched_for_nowhere(monkeypatch: pytest.MonkeyPatch):
    """The search for the places of tensors takes time that simple programs are spared."""
    monkeypatch.setattr(holders, "find_slots", lambda _: pytest.fail("nothing is to be searched for them"))
    make(averaged_tensors=[torch.zeros(3), torch.ones(2)])
    searched = []
    monkeypatch.setattr(holders, "find_slots", lambda tensors: searched.extend(tensors) or {})
    make(averaged_tensors=list(torch.nn.Linear(2, 2).parameters()))
    assert len(searched) == 2


def test_a_step_before_the_start_says_so():
    with pytest.raises(RuntimeError, match="not started"):
        make().step(wait=False)


@pytest.mark.parametrize(
    "use",
    [list, len, lambda block: block[0], lambda block: torch.zeros(1) in block, lambda block: [*block]],
    ids=["list", "len", "index", "in", "unpack"],
)
def test_get_tensors_outside_of_a_block_says_how_to_use_it(use: Any):
    averager = make()
    with pytest.raises(TypeError, match=r"`with averager\.get_tensors\(\) as tensors:`"):
        use(averager.get_tensors())
    with averager.get_tensors() as tensors, averager.get_tensors():
        assert len(tensors) == 1
    assert averager.get_tensors()


def test_more_parts_than_there_may_be_are_found_out_when_the_averager_is_made():
    huge = torch.zeros(1).expand(3 << 30)
    with pytest.raises(ValueError, match="memory"):
        make(averaged_tensors=[huge])
    layout = torch.empty(1200 << 20, dtype=torch.float32)  # never touched: takes no memory
    with pytest.raises(ValueError, match=r"part_size_bytes must be .*, got 1024"):
        make(averaged_tensors=[layout], part_size_bytes=1024)


def test_a_search_shorter_than_the_matchmaking_time_begins_before_its_end():
    settings = matchmaking_config(None, 2, 5.0, 3.0)
    assert default_start(100.0, None, settings) == 105.0
    assert default_start(100.0, 120.0, settings) == 105.0
    assert default_start(100.0, 102.0, settings) == 101.6
