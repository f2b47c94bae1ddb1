"""accelerate in a swarm: :class:`LocalSGD`. A :class:`shoal.Optimizer` is taken by ``prepare()`` as it is."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch

from shoal.averaging.report import StepReport
from shoal.averaging.trainer.averager import DecentralizedAverager
from shoal.dht.dht import DHT
from shoal.errors import InvalidStateError, InvalidTypeError, InvalidValueError
from shoal.frameworks.needed import needed
from shoal.utils.checks import check_flag, check_number

with needed("accelerate", "shoal.frameworks.accelerate", "pip install 'shoal[accelerate]'"):
    from accelerate import Accelerator, DistributedType

_OWN = ("dht", "prefix", "start", "averaged_tensors", "apply_when")


class LocalSGD:
    """Lets a peer train by itself, and averages parameters with the swarm every so many steps.

    It is used as accelerate's own ``LocalSGD``, which averages the processes of one machine or cluster:

    >>> with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=8, dht=dht, run_id="my_run") as local_sgd:
    ...     for x, y in loader:
    ...         accelerator.backward(loss(model(x), y))
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    ...         local_sgd.step()

    When the block begins, the parameters become those of another peer, if there is one. When it ends without an error,
    they are averaged once more. A round that fails leaves them as they are, with a warning that says why.

    :param accelerator: of one process: each process is a peer
    :param model: its parameters that require grad are averaged, whether ``accelerator`` has prepared it or not
    :param local_sgd_steps: calls of :meth:`step` between two rounds
    :param enabled: whether anything happens; if not, ``dht`` and ``run_id`` may be left out
    :param dht: a running DHT
    :param run_id: name of the run; the same at all peers
    :param averaging_timeout: seconds for one round, search included
    :param load_state_timeout: seconds for the download of another peer's parameters
    :param averager_opts: more arguments of :class:`shoal.DecentralizedAverager`, such as ``target_group_size``
    :raises InvalidValueError: arguments are out of range, or the accelerator has several processes or shards models
    :raises InvalidTypeError: an argument is of the wrong type
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        local_sgd_steps: int,
        enabled: bool = True,
        *,
        dht: DHT | None = None,
        run_id: str | None = None,
        averaging_timeout: float = 60.0,
        load_state_timeout: float = 600.0,
        averager_opts: Mapping[str, Any] | None = None,
    ) -> None:
        self.enabled = check_flag("enabled", enabled)
        self.local_sgd_steps = int(check_number("local_sgd_steps", local_sgd_steps, minimum=1))
        self.num_steps = 0
        self._averaging_timeout = check_number("averaging_timeout", averaging_timeout, above=0)
        self._load_state_timeout = check_number("load_state_timeout", load_state_timeout, above=0)
        self._options = dict(averager_opts or {})
        self._averager: DecentralizedAverager | None = None
        self._report: StepReport | None = None
        self._averaged_at: int | None = None
        if not self.enabled:
            return
        if not isinstance(accelerator, Accelerator):
            raise InvalidTypeError(f"accelerator must be an accelerate.Accelerator, got {accelerator!r}")
        if accelerator.distributed_type != DistributedType.NO:
            raise InvalidValueError(
                f"accelerator must be of one process that is not sharded, got {accelerator.distributed_type}: each "
                "process is a peer, so start it with python. The processes of one machine are averaged by "
                "accelerate.local_sgd.LocalSGD"
            )
        if not isinstance(dht, DHT):
            raise InvalidTypeError(f"dht must be a shoal.DHT, got {dht!r}")
        if not isinstance(run_id, str) or not run_id:
            raise InvalidTypeError(f"run_id must be a text that is not empty, got {run_id!r}")
        for name in _OWN:
            if name in self._options:
                raise InvalidValueError(f"averager_opts must not have {name!r}, which LocalSGD decides")
        self._dht, self._prefix = dht, f"{run_id.replace('.', '_')}_local_sgd"
        self._model: torch.nn.Module = accelerator.unwrap_model(model)

    @property
    def last_report(self) -> StepReport | None:
        """What happened in the last round; None before the first one has ended."""
        return self._report if self._averager is None else self._averager.last_report

    def __enter__(self) -> Self:
        if not self.enabled:
            return self
        if self._averager is not None:
            raise InvalidStateError("a LocalSGD must not be entered while it is in use: make another one")
        self._averager = DecentralizedAverager(
            self._model,
            self._dht,
            prefix=self._prefix,
            start=True,
            apply_when="called",  # on this thread, between two steps of training
            **self._options,
        )
        try:
            self._load_state(self._averager)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._averager is not None and self._averaged_at != self.num_steps:
                self._average(self._averager)
        finally:
            self._end()

    def step(self) -> None:
        """Count a step of training, and average if ``local_sgd_steps`` have been taken. Call it after the optimizer's.

        :raises InvalidStateError: outside of the block
        """
        if self.enabled and self._averager is None:
            raise InvalidStateError("step() must be called inside `with LocalSGD(...) as local_sgd`")
        self.num_steps += 1
        if self._averager is not None and self.num_steps % self.local_sgd_steps == 0:
            self._average(self._averager)

    def _average(self, averager: DecentralizedAverager) -> None:
        if averager.step(timeout=self._averaging_timeout) is not None:
            self._averaged_at = self.num_steps

    @torch.no_grad()
    def _load_state(self, averager: DecentralizedAverager) -> None:
        loaded = averager.load_state_from_peers(timeout=self._load_state_timeout)
        if loaded is None:
            return  # the averager has said why
        given = loaded[1]
        with averager.get_tensors() as own:
            shapes, wanted = ([tuple(t.shape) for t in tensors] for tensors in (given, own))
            if shapes != wanted:
                raise InvalidValueError(
                    f"model must have parameters of the shapes that others have under this run_id, {shapes}, "
                    f"got {wanted}"
                )
            for target, source in zip(own, given, strict=True):
                target.copy_(source)

    def _end(self) -> None:
        averager, self._averager = self._averager, None
        if averager is not None:
            self._report = averager.last_report
            averager.shutdown()
