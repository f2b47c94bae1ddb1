"""What subclasses of DecentralizedAverager may override, and what is an error when the class is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import shoal
from shoal.averaging.overriding import INSTEAD
from shoal.averaging.trainer.averager import DecentralizedAverager
from shoal.errors import InvalidTypeError

# Of hivemind 1.1.12's DecentralizedAverager and its ServicerBase: what is called by the background process or by peers.
HOOKS_OF_HIVEMIND = """
    _aggregate_with_group _collect_rpc_handlers _declare_for_download_periodically _get_current_state_from_host_process
    _get_group_bits _get_handle_name _load_state_from_peers _make_rpc_caller _register_allreduce_group
    _run_allreduce_inplace_ _run_internal _set_group_bits _shutdown _step _trigger_declare_load_state add_p2p_handlers
    get_stub remove_p2p_handlers rpc_aggregate_part rpc_download_state rpc_join_group run start"""


def method(self: Any, *args: Any, **kwargs: Any) -> None:
    """Would be called by hivemind."""


@pytest.mark.parametrize("name", HOOKS_OF_HIVEMIND.split())
def test_what_hivemind_calls_and_shoal_does_not_is_an_error(name: str):
    with pytest.raises(InvalidTypeError, match=rf"^Mine\.{name} would have no effect.* Instead: \w+"):
        type("Mine", (DecentralizedAverager,), {name: method})


def test_every_entry_is_a_hook():
    assert sorted(INSTEAD) == sorted(HOOKS_OF_HIVEMIND.split())


def test_a_call_of_the_users_own_is_pointed_to_the_host():
    with pytest.raises(TypeError, match=r"Mine\.rpc_say_hello .*node\.host\.serve"):
        type("Mine", (DecentralizedAverager,), {"rpc_say_hello": method})


def test_a_mixin_counts_wherever_it_overrides():
    mixin = type("Mixin", (), {"_step": method})
    with pytest.raises(InvalidTypeError, match=r"Mixin\._step \(inherited by Mine\)"):
        type("Mine", (mixin, DecentralizedAverager), {})
    type("Harmless", (DecentralizedAverager, mixin), {})  # overrides nothing, in hivemind neither
    served = type("Served", (), {"rpc_say_hello": method})
    with pytest.raises(InvalidTypeError, match=r"Served\.rpc_say_hello \(inherited by Mine\)"):
        type("Mine", (DecentralizedAverager, served), {})


def test_a_subclass_of_a_subclass_is_checked_too():
    first = type("First", (DecentralizedAverager,), {"step": DecentralizedAverager.step})
    with pytest.raises(InvalidTypeError, match=r"^Second\._aggregate_with_group"):
        type("Second", (first,), {"_aggregate_with_group": method})


def test_parameters_of_the_class_statement_reach_the_users_own_init_subclass():
    class Registered(DecentralizedAverager):
        def __init_subclass__(cls, label: str, **options: Any) -> None:
            super().__init_subclass__(**options)
            cls.label = label

    class Mine(Registered, label="mine"):
        pass

    assert Mine.label == "mine"


@pytest.fixture
def dht() -> shoal.DHT:
    return shoal.DHT(start=False)


class Counting(DecentralizedAverager):
    """Overrides what users override, and uses names that the averager might use as well."""

    _steps = 5
    _ready = "not a method"

    def __init__(self, tensors: list[torch.Tensor], dht: shoal.DHT, **options: Any) -> None:
        self._config = self._schema = self._started = self._finalizer = "mine"
        super().__init__(tensors, dht, **options)
        self._keeper = self._serializer = self._shutdown_timeout = "mine"
        self.calls: list[str] = []

    def tensor_infos(self) -> list[shoal.CompressionInfo]:
        """A helper that classes written for hivemind have, whose result they give to the constructor."""
        return []

    def step(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append("step")
        return super().step(*args, **kwargs)

    @contextmanager
    def get_tensors(self) -> Iterator[Any]:
        self.calls.append("get_tensors")
        with super().get_tensors() as tensors:
            yield tensors

    def get_current_state(self) -> Any:
        return {"epoch": 3}, []

    def shutdown(self) -> None:
        self.calls.append("shutdown")
        super().shutdown()

    def __del__(self) -> None:
        self.calls.append("del")


def test_a_subclass_may_use_any_private_name_of_its_own(dht: shoal.DHT):
    averager = Counting([torch.zeros(3)], dht, prefix="run", start=False)
    with averager.get_tensors() as tensors:
        tensors[0] += 1
    with pytest.raises(shoal.InvalidStateError, match="not started"):
        averager.step()
    averager.shutdown()
    assert averager.calls == ["get_tensors", "step", "shutdown"]
    assert averager.total_size == 3
    assert averager.prefix == "run"
    assert not averager.is_alive()
    assert averager._config == "mine"


def test_the_averager_keeps_nothing_under_a_name_that_a_subclass_might_use(dht: shoal.DHT):
    averager = DecentralizedAverager([torch.zeros(3)], dht, prefix="run", start=False)
    names = {*vars(averager), *vars(DecentralizedAverager)}
    own = [name for name in names if name.startswith("_") and not name.startswith("__")]
    assert own
    assert all(name.startswith(("_DecentralizedAverager__", "_Startable__")) for name in own), own
