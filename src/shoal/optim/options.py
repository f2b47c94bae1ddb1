"""What :class:`~shoal.optim.optimizer.Optimizer` was told, checked before any process starts."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from shoal.averaging.trainer.averager import DecentralizedAverager
from shoal.dht.dht import DHT
from shoal.errors import InvalidTypeError, InvalidValueError
from shoal.optim.epoch import AfterFailedRound
from shoal.optim.progress.tracker import ProgressTracker
from shoal.optim.progress_bar import ProgressBar
from shoal.optim.watching import OnEpoch, Watchers
from shoal.utils.checks import check_choice, check_flag, check_number

_OWN_PARAMETERS = {
    "dht": "dht", "prefix": "run_id", "start": "nothing, the averagers are started", "client_mode": "client_mode",
    "auxiliary": "auxiliary", "compression": "grad_compression and state_averaging_compression",
    "state_compression": "load_state_compression", "apply_when": "delay_state_averaging",
    "averaged_tensors": "params", "tensor_infos": "params", "initial_group_bits": "the epoch",
}  # fmt: skip
"""Arguments of averagers that must not be in ``averager_opts``, and what decides them."""
_NAMES = {"dht", "prefix", "target_batch_size", "start", "client_mode", "performance_ema_alpha"}


@dataclass(frozen=True)
class Options:
    """The settings that do not change; those that were not given are filled in."""

    run_id: str
    target_batch_size: int
    batch_size_per_step: int | None
    matchmaking_time: float
    averaging_timeout: float
    allreduce_timeout: float
    next_chunk_timeout: float
    load_state_timeout: float
    reuse_grad_buffers: bool
    offload_optimizer: bool
    delay_optimizer_step: bool
    delay_grad_averaging: bool
    delay_state_averaging: bool
    average_state_every: int
    use_local_updates: bool
    auxiliary: bool
    after_failed_round: AfterFailedRound
    max_grad_norm: float | None
    shutdown_timeout: float
    verbose: bool
    on_epoch: OnEpoch | None
    record: str | os.PathLike[str] | None
    progress_bar: bool

    def watchers(self, rank: int) -> Watchers:
        """Those of one rank: rank 0 speaks for all.

        :raises InvalidValueError: the record can't be written
        """
        if rank > 0:
            return Watchers(None, None, None)
        bar = ProgressBar(self.run_id, self.target_batch_size) if self.progress_bar else None
        return Watchers(self.record, bar, self.on_epoch)

    @property
    def prefix(self) -> str:
        """Averagers' names have no dots; those of runs that are named after a model may."""
        return self.run_id.replace(".", "_")


def checked(given: Mapping[str, Any], rank: int = 0, ranks: int = 1) -> Options:
    """The options out of all arguments of the constructor.

    :param rank: of this process among the ``ranks`` that are one peer
    :raises InvalidValueError: an argument is out of range, or does not go with another one
    :raises InvalidTypeError: an argument is of the wrong type
    """
    _check_dht(given["dht"], rank, ranks)
    _check_objects(given)
    flags = {
        name: check_flag(name, given[name])
        for name in (
            "reuse_grad_buffers", "delay_grad_averaging", "delay_state_averaging", "use_local_updates", "auxiliary",
            "verbose", "progress_bar",
        )
    }  # fmt: skip
    check_choice("after_failed_round", given["after_failed_round"], ("local", "skip", "wait"))
    is_factory = not isinstance(given["optimizer"], torch.optim.Optimizer)
    offload, delay_step = given["offload_optimizer"], given["delay_optimizer_step"]
    matchmaking_time = check_number("matchmaking_time", given["matchmaking_time"], above=0)
    averaging_timeout = check_number("averaging_timeout", given["averaging_timeout"], above=0)
    options = Options(
        run_id=given["run_id"],
        target_batch_size=_count("target_batch_size", given["target_batch_size"]),
        batch_size_per_step=_optional(_count, "batch_size_per_step", given["batch_size_per_step"]),
        matchmaking_time=matchmaking_time,
        averaging_timeout=averaging_timeout,
        allreduce_timeout=_seconds("allreduce_timeout", given["allreduce_timeout"], averaging_timeout),
        next_chunk_timeout=_seconds("next_chunk_timeout", given["next_chunk_timeout"], matchmaking_time),
        load_state_timeout=check_number("load_state_timeout", given["load_state_timeout"], above=0),
        offload_optimizer=(
            given["params"] is not None and is_factory and not flags["use_local_updates"]
            if offload is None
            else check_flag("offload_optimizer", offload)
        ),
        delay_optimizer_step=(
            flags["delay_grad_averaging"]
            if delay_step is None
            else check_flag("delay_optimizer_step", delay_step)
        ),
        average_state_every=_count("average_state_every", given["average_state_every"]),
        after_failed_round=given["after_failed_round"],
        max_grad_norm=_optional(_seconds, "max_grad_norm", given["max_grad_norm"]),
        shutdown_timeout=check_number("shutdown_timeout", given["shutdown_timeout"], minimum=0),
        on_epoch=given["on_epoch"],
        record=given["record"],
        **flags,
    )
    _check_modes(options, given, is_factory)
    if ranks > 1 and options.auxiliary:
        raise InvalidValueError(
            "auxiliary must be False with several ranks, which process batches: start it by itself"
        )
    return options


def checked_step(
    auxiliary: bool, planned: int | None, closure: Any, batch_size: int | None, grad_scaler: Any, loss: Any
) -> int:
    """The samples of one step, out of its arguments; 0 for auxiliaries.

    :param planned: samples of a step that is not told how many it has
    :raises InvalidValueError: arguments are out of range, or do not go together
    :raises InvalidTypeError: an argument is of the wrong type
    """
    if auxiliary:
        if any(given is not None for given in (closure, batch_size, grad_scaler, loss)):
            raise InvalidValueError("step() must have no arguments with auxiliary: it processes no batches")
        return 0
    if closure is not None and not callable(closure):
        raise InvalidTypeError(f"closure must be callable or None, got {closure!r}")
    if closure is not None and loss is not None:
        raise InvalidValueError(f"loss must be None with a closure, which returns it, got {loss!r}")
    if grad_scaler is not None and not hasattr(grad_scaler, "unscale_"):
        raise InvalidTypeError(f"grad_scaler must be a torch.amp.GradScaler, got {grad_scaler!r}")
    if batch_size is None:
        batch_size = planned
    if batch_size is None:
        raise InvalidValueError("batch_size must be given to step(), or batch_size_per_step to the optimizer")
    return int(check_number("batch_size", batch_size, minimum=1))


def _check_dht(dht: Any, rank: int, ranks: int) -> None:
    if rank > 0:
        if dht is not None:
            raise InvalidValueError(
                f"dht must be None at rank {rank} of {ranks}, got {dht!r}: rank 0 talks for all. If each rank "
                "is to be a peer, give each a process_group of its own"
            )
        return
    where = f" at rank 0 of {ranks}, which talks for all" if ranks > 1 else ""
    if not isinstance(dht, DHT):
        raise InvalidTypeError(f"dht must be a shoal.DHT{where}, got {dht!r}")
    if not dht.is_alive():
        raise InvalidValueError(f"dht must be running{where}: start it with DHT(start=True)")


def _check_objects(given: Mapping[str, Any]) -> None:
    run_id, optimizer, scheduler = given["run_id"], given["optimizer"], given["scheduler"]
    if not isinstance(run_id, str) or not run_id:
        raise InvalidTypeError(f"run_id must be a text that is not empty, got {run_id!r}")
    is_instance = isinstance(optimizer, torch.optim.Optimizer)
    if not is_instance and not callable(optimizer):
        raise InvalidTypeError(f"optimizer must be a torch optimizer or a callable, got {optimizer!r}")
    if not is_instance and given["params"] is None:
        raise InvalidValueError("params must be given if optimizer is a callable, got None")
    if not is_instance and scheduler is not None and not callable(scheduler):
        raise InvalidValueError(
            f"scheduler must be a callable if optimizer is one, got {type(scheduler).__name__}"
        )
    on_epoch, record = given["on_epoch"], given["record"]
    if on_epoch is not None and not callable(on_epoch):
        raise InvalidTypeError(f"on_epoch must be callable or None, got {on_epoch!r}")
    if record is not None and not isinstance(record, str | os.PathLike):
        raise InvalidTypeError(f"record must be the path of a file or None, got {record!r}")
    _check_contents(given)


def _check_contents(given: Mapping[str, Any]) -> None:
    for name, taken, owner in (
        ("averager_opts", _OWN_PARAMETERS, DecentralizedAverager),
        ("tracker_opts", dict.fromkeys(_NAMES, "the optimizer"), ProgressTracker),
    ):
        known = inspect.signature(owner).parameters.keys()
        opts = given[name]
        if opts is not None and not isinstance(opts, Mapping):
            raise InvalidTypeError(f"{name} must be a dictionary, got {opts!r}")
        for key in sorted(taken.keys() & (opts or {}).keys()):
            raise InvalidValueError(f"{name} must not have {key!r}, which follows from {taken[key]}")
        for key in sorted((opts or {}).keys() - known):
            raise InvalidValueError(
                f"{name} must have names of {owner.__name__}'s parameters alone, got {key!r}"
            )
    statistics = given["average_opt_statistics"]
    if isinstance(statistics, str) or not all(isinstance(name, str) for name in statistics):
        raise InvalidTypeError(f"average_opt_statistics must be a sequence of names, got {statistics!r}")
    for tensor in given["extra_tensors"]:
        if not isinstance(tensor, torch.Tensor):
            raise InvalidTypeError(f"extra_tensors must be tensors, got {tensor!r}")


def _check_modes(options: Options, given: Mapping[str, Any], is_factory: bool) -> None:
    delayed = options.delay_optimizer_step or options.delay_grad_averaging
    rules = (
        (not is_factory and options.offload_optimizer, ("offload_optimizer must be False with an optimizer instance: "
         "give a callable and params")),
        (not is_factory and delayed, ("delay_optimizer_step and delay_grad_averaging must be False with an optimizer "
         "instance: give a callable and params")),
        (options.use_local_updates and options.reuse_grad_buffers, ("reuse_grad_buffers must be False with "
         "use_local_updates, which accumulates no gradients")),
        (options.use_local_updates and delayed, ("delay_grad_averaging and delay_optimizer_step must be False with "
         "use_local_updates, where gradients are not averaged")),
        (options.use_local_updates and given["grad_averager_factory"] is not None, ("grad_averager_factory must be "
         "None with use_local_updates, where gradients are not averaged")),
        (options.delay_grad_averaging and not options.delay_optimizer_step, ("delay_optimizer_step must be True with "
         "delay_grad_averaging: the step waits for the gradients")),
        (options.delay_optimizer_step and not options.offload_optimizer, ("offload_optimizer must be True with "
         "delay_optimizer_step: the step works on copies meanwhile")),
        (delayed and options.after_failed_round == "wait", ("after_failed_round must be 'local' or 'skip' with "
         "delay_optimizer_step or delay_grad_averaging, which go on meanwhile")),
        (options.auxiliary and options.batch_size_per_step is not None, ("batch_size_per_step must be None with "
         "auxiliary: it processes no batches")),
        (options.auxiliary and bool(given["client_mode"]), ("client_mode must be False with auxiliary: a helper must "
         "accept connections")),
    )  # fmt: skip
    for broken, message in rules:
        if broken:
            raise InvalidValueError(message)


def _count(name: str, value: Any) -> int:
    number = check_number(name, value, minimum=1)
    if number != int(number):
        raise InvalidValueError(f"{name} must be a whole number, got {value!r}")
    return int(number)


def _seconds(name: str, value: Any, default: float | None = None) -> float:
    return default if value is None and default is not None else check_number(name, value, above=0)


def _optional(check: Any, name: str, value: Any) -> Any:
    return None if value is None else check(name, value)
