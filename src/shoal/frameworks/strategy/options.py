"""What a strategy was told, checked when it is made."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from shoal.dht.dht import DHT
from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.optim.optimizer import Optimizer

ENVIRONMENT = ("SHOAL_INITIAL_PEERS", "PL_INITIAL_PEERS")
"""Variables with addresses of peers, the first of which counts that is set; the second is lightning-Hivemind's."""

_DECIDED = {
    "auxiliary": "a Trainer processes batches; run an auxiliary peer with shoal.Optimizer",
    "batch_size_per_step": "it is called batch_size",
    "optimizer": "it is what the module's configure_optimizers returns",
    "params": "they are those of the module's optimizer",
    "scheduler": "it is called scheduler_fn, or comes from the module's configure_optimizers",
}
"""Parameters of :class:`~shoal.Optimizer` that a strategy does not take, each with what decides them."""


def check_optimizer_options(given: Mapping[str, Any]) -> None:
    """See that ``**optimizer_kwargs`` are parameters of :class:`~shoal.Optimizer`.

    :raises InvalidTypeError: one is not, or is decided otherwise
    """
    known = sorted(inspect.signature(Optimizer).parameters.keys() - _DECIDED.keys())
    for name in given:
        if name in _DECIDED:
            raise InvalidTypeError(f"ShoalStrategy does not take {name!r}: {_DECIDED[name]}")
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            advice = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise InvalidTypeError(f"ShoalStrategy got an unknown option {name!r}{advice}")


def find_initial_peers(
    given: Sequence[Any] | str | None, environment: Mapping[str, str]
) -> Sequence[Any] | str | None:
    """The addresses that were given, or else those of the environment; None: a new swarm begins."""
    if given is not None:
        return given
    return next((environment[name] for name in ENVIRONMENT if environment.get(name, "").strip()), None)


def check_dht(dht: Any, given: Mapping[str, Any]) -> None:
    """See that a DHT that was given is one, and comes without options for making one.

    :raises InvalidTypeError: it is no DHT; :raises InvalidValueError: an option was given besides
    """
    if dht is None:
        return
    if not isinstance(dht, DHT):
        raise InvalidTypeError(f"dht must be a shoal.DHT, got {dht!r}")
    besides = sorted(name for name, value in given.items() if value is not None)
    if besides:
        raise InvalidValueError(f"{besides[0]} must not be given with dht, which has its own")
