"""What every averager has besides averaging: a life, the values that it was made with, and what it knows of its steps.

:class:`~shoal.DecentralizedAverager` adds what it is for.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from shoal.averaging.factory import create_averager_service
from shoal.averaging.group import PeerMode
from shoal.averaging.trainer.link import check_timeout
from shoal.averaging.trainer.parts import Parts
from shoal.compression import CompressionBase, CompressionInfo
from shoal.compression.registry import user_codecs
from shoal.dht.dht import DHT
from shoal.p2p.identity import PeerID
from shoal.runtime import pickling
from shoal.runtime.startable import Startable, wait_or_end
from shoal.utils.checks import check_flag

if TYPE_CHECKING:
    from shoal.averaging.report import DoubtReport, StateReport, StepReport


class AveragerBase(Startable):
    """The life of an averager, its properties that are read, and late averages."""

    def __init__(self, dht: DHT, parts: Parts) -> None:
        super().__init__(
            parts.link,
            instead_of_a_copy="a DecentralizedAverager can't be pickled or copied: it belongs to this process; "
            "make one in each process",
        )
        self.dht = dht
        self.__parts = parts
        # The end of the interpreter ends the background process, and all in it.
        weakref.finalize(self, parts.link.end_in_background).atexit = False

    # life

    def run_in_background(self, await_ready: bool = True, timeout: float | None = None) -> None:
        """Start the averager in the background process of its DHT, as soon as that is ready.

        :param await_ready: wait until it can take steps, for up to ``timeout`` seconds, the wait for the DHT included
        :raises InvalidStateError: it was started before, or the DHT is not running
        :raises TimeoutError: it was not ready in time; it is shut down
        """
        await_ready = check_flag("await_ready", await_ready)
        timeout = check_timeout(timeout)
        setup = pickling.dumps(
            (user_codecs(), self.__parts.config, self.__parts.schema), "the averager's setup"
        )
        self.__parts.link.start(self.dht, partial(create_averager_service, setup, self.dht.service_name))
        if await_ready:
            wait_or_end(self, timeout)

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Wait until steps can be taken, for up to ``timeout`` seconds.

        :raises TimeoutError: not in time; the start goes on
        :raises InvalidStateError: not started, or shut down
        :raises InvalidValueError: client_mode=False, and the DHT turned out to be in client mode
        """
        super().wait_until_ready(timeout)

    def shutdown(self) -> None:
        """End the averager: steps that run are cancelled, groupmates learn it at once. Idempotent; the DHT runs on."""
        self.__parts.link.end(self.__parts.own.shutdown_timeout)

    def is_alive(self) -> bool:
        """Whether steps can be taken, or will be when it is ready; False once the start has failed."""
        return self.__parts.link.is_alive and self.dht.is_alive()

    # what it is, and was made with

    @property
    def peer_id(self) -> PeerID:
        """The identity of the DHT's node, also after its end; waits until that is ready."""
        return self.dht.peer_id

    @property
    def prefix(self) -> str:
        """As given: averagers of one prefix, and with tensors of the same shapes, average with each other."""
        return self.__parts.config.prefix

    @property
    def client_mode(self) -> bool:
        """Whether this averager only joins groups that others lead: it was told to, or nobody can dial its DHT. After
        the DHT's end: as it was last known.
        """
        return bool(self.__parts.config.client_mode) or self.dht.client_mode

    @property
    def mode(self) -> PeerMode:
        """What this peer does in a group: ``AveragingMode.NODE``, ``CLIENT`` or ``AUX``."""
        return PeerMode.CLIENT if self.client_mode else self.__parts.config.mode

    @property
    def total_size(self) -> int:
        """Number of elements that are averaged."""
        return self.__parts.store.layout.numel

    @property
    def bandwidth(self) -> float | None:
        """As given, in Mbit/s; like all that was given to the constructor it cannot be set later."""
        return self.__parts.config.bandwidth

    @property
    def next_chunk_timeout(self) -> float | None:
        """As given, in seconds."""
        return self.__parts.config.next_chunk_timeout

    @property
    def declare_state_period(self) -> float:
        """As given, in seconds."""
        return self.__parts.config.declare_state_period

    @property
    def state_compression(self) -> CompressionBase:
        """As given."""
        return self.__parts.states.compression

    @property
    def tensor_infos(self) -> Sequence[CompressionInfo] | None:
        """As given, as a tuple; None: none were."""
        return self.__parts.infos

    @property
    def shutdown_timeout(self) -> float:
        """As given, in seconds."""
        return self.__parts.own.shutdown_timeout

    @property
    def last_report(self) -> StepReport | None:
        """What happened in the last step that has finished."""
        return self.__parts.steps.last_report

    @property
    def last_doubt(self) -> DoubtReport | None:
        """What is known by now of the last step that ended in doubt; None: none has. While that is open, the members of
        its group are asked in the background.
        """
        return self.__parts.late.last

    @property
    def last_loaded_state(self) -> StateReport | None:
        """Whose state :meth:`load_state_from_peers` has returned last, and how old it was; None: none yet."""
        return self.__parts.states.last_loaded

    def apply_late_average(self) -> bool:
        """Write the average of a step that has ended in doubt, if it has turned out since that the others committed it.

        :meth:`step` does so when it begins, so that few programs need this: call it to have the average earlier, before
        a checkpoint for instance. :attr:`last_doubt` says whether one waits. What the trainer has changed since the
        round began is kept. An average is dropped as soon as a later round takes the tensors,
        :meth:`load_state_from_peers` has returned a state, or :meth:`drop_late_average` is called.

        :returns: whether there was one
        :raises InvalidStateError: not started, shut down; or the average can't be written, since a tensor has another
          shape now, for instance: it is dropped then
        """
        self.__parts.link.check_running()
        return self.__parts.late.write()

    def drop_late_average(self) -> None:
        """Never write the average of the last step that ended in doubt. Call it when you have put other values into the
        tensors, from a checkpoint for instance: what the round changed would be added to them.
        """
        self.__parts.late.drop("by drop_late_average()")
