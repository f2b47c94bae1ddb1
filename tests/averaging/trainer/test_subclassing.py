"""What subclasses of DecentralizedAverager may override, and which names they may use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import shoal
from shoal.averaging.trainer.averager import DecentralizedAverager


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
    names = {name for holder in (averager, *DecentralizedAverager.__mro__[:-1]) for name in vars(holder)}
    own = [name for name in names if name.startswith("_") and not name.startswith("__")]
    assert own
    assert all(
        name.startswith(("_DecentralizedAverager__", "_AveragerBase__", "_Startable__")) for name in own
    ), own
