"""The user process's end of the arena: has the values of the tensors there when a round begins, and the average written
when it has committed. How, :mod:`.transfer` says.
"""

from __future__ import annotations

import logging

import torch

from shoal.averaging.trainer.control import StepControl
from shoal.averaging.trainer.tensors import TensorStore
from shoal.averaging.trainer.transfer import CopyingTransfer, Transfer
from shoal.errors import AllreduceException, DeadlineExceeded, InvalidStateError, InvalidValueError
from shoal.runtime.memory import SharedMemory

logger = logging.getLogger(__name__)

LOCK_TIMEOUT = 30.0
"""Seconds for which a round waits for the lock before its snapshot; groupmates wait with it."""


class TensorArena:
    """The shared memory of the snapshot and the average behind it, and when values come there and back.

    :param alpha: the fraction of the way to the average that tensors move
    :param auxiliary: the tensors are this peer's own, and nothing is read of them
    :param transfer: how values come there and back; default: by copies
    """

    def __init__(
        self,
        store: TensorStore,
        transfer: Transfer | None = None,
        *,
        alpha: float = 1.0,
        auxiliary: bool = False,
    ) -> None:
        self.store = store
        self.transfer: Transfer = CopyingTransfer(store) if transfer is None else transfer
        self._alpha = alpha
        self._auxiliary = auxiliary
        self._is_ending = False

    def create_memory(self) -> SharedMemory:
        """The memory of both areas, to be attached in the background process."""
        if self._is_ending:
            raise InvalidStateError("the averager was shut down")
        return self.transfer.open()

    def stop_waiting(self) -> None:
        """From now on nothing waits for the lock of the tensors: the thread that ends the averager may hold it."""
        self._is_ending = True

    @property
    def is_ending(self) -> bool:
        return self._is_ending

    def close(self) -> None:
        """Give the memory back."""
        self._is_ending = True
        self.transfer.close()

    def take_snapshot(self, step: int, control: StepControl) -> float:
        """All-reduce of a step begins: settle its weight, which is returned, and take the tensors.

        :raises AllreduceException: the lock was not free in time
        :raises UsageError: the tensors cannot be averaged as they are now
        """
        weight = control.begin_allreduce()
        if self._auxiliary:
            return weight
        try:
            # The next step's request waits behind this one, on the same thread.
            not_finite = self.transfer.snapshot(
                step,
                # Else nothing is sent: a peer whose training has diverged may ask for the average.
                checks_finite=weight > 0,
                timeout=LOCK_TIMEOUT,
                abandoned=lambda: control.done() or self._is_ending,
            )
        except DeadlineExceeded as e:
            logger.warning("withdrawing from a round, whose other members wait: %s", e)
            raise AllreduceException(f"withdrawn from the round: {e}") from e
        if not_finite is not None:
            raise InvalidValueError(
                f"{self.store.labels[not_finite]} has NaN or infinite elements; nothing was sent"
            )
        return weight

    def write_average(self) -> None:
        """Write the average that is in the arena to the tensors.

        :raises UsageError: they are not what they were
        """
        self.transfer.apply(self._alpha, lambda: self._is_ending)

    def write_visibly(self) -> None:
        """As :meth:`write_average`, on the user's thread: a backward pass whose forward pass used the old values is an
        error of autograd from now on.
        """
        self.write_average()
        for tensor in self.store.tensors:
            if not tensor.is_inference():
                torch.autograd.graph.increment_version(tensor)
