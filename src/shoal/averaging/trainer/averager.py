"""What users hold: :class:`DecentralizedAverager`, which averages tensors with other peers, in place."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any, Literal, overload

import torch

from shoal.averaging.checks import check_bits
from shoal.averaging.commands import GetGroupBits, SetGroupBits
from shoal.averaging.config import (
    DEFAULT_DECLARE_STATE_PERIOD,
    DEFAULT_MAX_STATE_AGE,
    DEFAULT_PART_SIZE_BYTES,
)
from shoal.averaging.group import PeerMode, group_key
from shoal.averaging.timeouts import LOAD_TIMEOUT, MIN_MATCHMAKING_TIME, REQUEST_TIMEOUT
from shoal.averaging.trainer.base import AveragerBase
from shoal.averaging.trainer.block import TensorsBlock
from shoal.averaging.trainer.control import StepControl
from shoal.averaging.trainer.parts import make_parts
from shoal.averaging.trainer.pending import ApplyWhen
from shoal.averaging.trainer.shared_buffers import SharedBuffers
from shoal.averaging.trainer.sources import AveragedTensors, HeldTensors
from shoal.averaging.trainer.state_pieces import DownloadData, state_pieces
from shoal.averaging.trainer.state_sharing import DownloadedState
from shoal.averaging.trainer.steps import WhenBusy
from shoal.compat.overriding import check_overrides
from shoal.compression import CompressionBase, CompressionInfo, NoCompression
from shoal.dht.dht import DHT
from shoal.errors import InvalidStateError, InvalidValueError
from shoal.p2p.identity import PeerID
from shoal.runtime.futures import MPFuture
from shoal.utils.checks import check_flag, check_number
from shoal.utils.serializer import MSGPackSerializer


class DecentralizedAverager(AveragerBase):
    """Averages tensors with the other peers that run an averager under the same prefix, in groups, in place.

    A group that reaches ``target_group_size`` begins at once. With the default, None, a group is never full,
    so that **each step takes** ``min_matchmaking_time``: give a size if you know how many peers there are.

    The averager runs in the background process of its ``dht``, and the trainer is never blocked by the
    network: when a group is complete, the tensors are copied under the lock of :meth:`get_tensors`; when its round
    has committed, the average is written under the same lock. What the trainer has added in between is kept.
    A round that fails leaves every tensor as it was.

    **Update the tensors under that lock**, since an update and an average that meet overwrite each other, and nothing
    raises. Or give ``apply_when="called"``, and have averages written between two training steps::

        optimizer.step()
        averager.step(wait=False, when_busy="current")  # writes the average that is there; begins a round if none runs

    Peers average together if they agree on ``prefix``, the tensors' shapes, dtypes and codecs, ``min_group_size``,
    ``part_size_bytes`` and ``min_vector_size``; the other parameters are each peer's own. Times are in seconds.

    :param averaged_tensors: what is averaged. All peers need the same shapes, dtypes and order. Dense tensors in
      float16, bfloat16, float32 or float64, of any shape and on any device, given as

      - a :class:`torch.nn.Module`: those of its parameters that require grad now, tied ones once. They are found
        anew by name in each round, so that ``load_state_dict(assign=True)`` and the like do no harm. Its buffers
        (running statistics) stay this peer's own.
      - an iterable of tensors, such as ``list(model.parameters())``: these very objects, in all rounds; a warning
        says when they are no longer used.
      - tensors by name: a ``state_dict()`` or other mapping, or pairs as from ``named_parameters()``. Errors use the
        names; names of the same elements (tied weights) count once.
      - a function without arguments that returns any of these, called whenever the tensors are read or written, with
        the lock of :meth:`get_tensors` held and without grad; it must return the same shapes, dtypes and names each
        time, and the tensors themselves or views of them: what is written to copies is lost, which is a warning.
        For tensors that are replaced: ``lambda: [p.grad for p in model.parameters()]``.
      - :class:`~shoal.averaging.SharedBuffers`: tensors that are averaged where they are, without a copy. Nothing may
        write to them from a step's trigger to its outcome.
    :param dht: a started :class:`~shoal.dht.DHT`, through which peers find each other
    :param start: start at once; otherwise call :meth:`run_in_background`
    :param prefix: peers with the same prefix average together. An averager's prefix is its own on its ``dht``.
    :param target_group_size: a group of this many peers is full. Best the same at all peers: where it is not, that of
      a group's leader counts.
    :param min_group_size: a smaller group does not begin; the same at all peers
    :param initial_group_bits: look for groups among the peers with these bits ('0' and '1', at most 64) only; they
      change after every round. Empty: chosen automatically by the number of peers. Unless the bits of all peers make a
      full grid, some may find no partners. See :meth:`set_group_bits`.
    :param min_matchmaking_time: time that a group that is not full waits for further peers; more than 5 s if you give a
      ``request_timeout`` that needs it
    :param request_timeout: time to wait for a leader's first answer; smaller than ``min_matchmaking_time``, which a
      default of less than 3 s follows
    :param averaging_alpha: tensors move by this fraction of the way to the average; 1: they become the average; above 1
      they go beyond it, and by 2 at most, where they end as far from it as they were
    :param part_size_bytes: tensors travel in parts of at most this many bytes, after compression (1 KiB to 64
      MiB); the same at all peers. Of large tensors that are not compressed up to four travel as one, of 2 MiB at most
    :param allreduce_timeout: time for the exchange of tensors once a group has begun, after which this peer leaves the
      round; None: no limit but those for each member
    :param next_chunk_timeout: default of ``sender_timeout``; also the longest time between two whole pieces (2^18
      elements each, 1 MiB of float32) of a state that is downloaded. None: no limit.
    :param sender_timeout: a member that sends no next part for this long is excluded: the others average without what
      it has not sent, and its own step fails. Default: ``next_chunk_timeout``, or half of ``reducer_timeout``, or 180 s
      (and then 60 s for each part on the average); or a third of ``allreduce_timeout``, if that is less.
    :param reducer_timeout: when a member returns no next average for this long, its share of the work is given to the
      others, in the same round. A member that takes no average for so long, and 1 s, when all are there is excluded.
      Default: twice ``sender_timeout``, but less than ``allreduce_timeout``.
    :param adaptive_timeouts: have the deadlines for senders follow what was seen in recent rounds. They are never later
      than ``sender_timeout``, which is 60 s then by default. A late member is excluded only while ``min_group_size``
      others are in time. See docs/timeouts.md.
    :param compression: the codec of the parts; the same at all peers
    :param state_compression: the codec of the state that others download from this peer
    :param tensor_infos: what each tensor is for, one :class:`~shoal.compression.CompressionInfo` for each; for codecs
      that choose by it
    :param bandwidth: of this peer, in Mbit/s; faster peers average a larger share. None: what it measured over
      long paths, if it has sent enough; else the mean of the others' figures. 0: averages nothing, unless all say so.
    :param min_vector_size: a member whose share would have fewer elements than this averages nothing; the same at all
      peers
    :param auxiliary: help others with averaging without tensors of one's own: nothing is sent of them and they do not
      change. Counts in the group's size.
    :param allow_state_sharing: let others download this peer's state; None: unless in client mode or auxiliary. See
      :attr:`allow_state_sharing`.
    :param declare_state_period: time after which the peer declares itself anew as one to download the state from
    :param max_state_age: a peer that joins gets a copy of the state that is not older than its request. While others
      still download a copy, it shares theirs if that is at most this old, since there is one at a time; None: however
      old it is. With a state that takes longer to download, newcomers may be sent to other donors.
    :param client_mode: this peer cannot be dialed; it only joins groups that others lead. None: as the DHT.
    :param daemon: False is allowed only if the DHT, whose process the averager shares, was made so
    :param shutdown_timeout: time that :meth:`shutdown` waits for the service to end
    :param apply_when: "ready": write each average as soon as its round has committed, on a thread of the averager;
      update the tensors inside :meth:`get_tensors` then. "called": write it when :meth:`apply_average` or :meth:`step`
      is called, on the caller's thread; updates need no lock.
    :param detect_lost_updates: a debug switch: compare all elements of tensors on the CPU, to warn of the first that is
      updated while the averager copies or writes it. Without it, what torch's own count of in-place updates shows is
      warned of. Takes twice the memory of the tensors, and several times as long under the lock.

    Subclasses may override every public method. A class that defines a method by which hivemind's averager is changed
    and which nothing calls here (``_aggregate_with_group``, ``rpc_...``, see :mod:`~shoal.compat.overriding`) is an
    InvalidTypeError.

    :raises InvalidValueError: (a ValueError) a value out of range, parameters that contradict each other, or a prefix
      that is in use on this ``dht``
    :raises InvalidTypeError: (a TypeError) tensors that cannot be averaged, or a parameter of the wrong type
    """

    serializer = MSGPackSerializer
    """Encodes what is given to ``step(gather=...)``: anything with ``dumps``, which makes bytes, and ``loads``."""

    def __init__(
        self,
        averaged_tensors: AveragedTensors | SharedBuffers,
        dht: DHT,
        *,
        start: bool,
        prefix: str,
        target_group_size: int | None = None,
        min_group_size: int = 2,
        initial_group_bits: str = "",
        min_matchmaking_time: float = MIN_MATCHMAKING_TIME,
        request_timeout: float = REQUEST_TIMEOUT,
        averaging_alpha: float = 1.0,
        part_size_bytes: int = DEFAULT_PART_SIZE_BYTES,
        allreduce_timeout: float | None = None,
        next_chunk_timeout: float | None = None,
        sender_timeout: float | None = None,
        reducer_timeout: float | None = None,
        adaptive_timeouts: bool = False,
        compression: CompressionBase = NoCompression(),
        state_compression: CompressionBase = NoCompression(),
        tensor_infos: Sequence[CompressionInfo] | None = None,
        bandwidth: float | None = None,
        min_vector_size: int = 0,
        auxiliary: bool = False,
        allow_state_sharing: bool | None = None,
        declare_state_period: float = DEFAULT_DECLARE_STATE_PERIOD,
        max_state_age: float | None = DEFAULT_MAX_STATE_AGE,
        client_mode: bool | None = None,
        daemon: bool = True,
        shutdown_timeout: float = 5,
        apply_when: ApplyWhen = "ready",
        detect_lost_updates: bool = False,
    ) -> None:
        given = locals().copy()  # each configuration takes what is its own
        self.__parts = parts = make_parts(self, averaged_tensors, dht, given)
        super().__init__(dht, parts)
        if parts.own.start:
            self.run_in_background()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        check_overrides(cls, DecentralizedAverager)

    # state

    @property
    def allow_state_sharing(self) -> bool:
        """Whether other peers may download this one's state. Setting it acts at once: when False has been set, new
        requests are refused; downloads under way get the rest of what they began.

        :raises InvalidValueError: on setting True in client mode, where nobody can dial this peer
        """
        allowed = self.__parts.states.allowed
        return self.mode is PeerMode.FULL if allowed is None else allowed

    @allow_state_sharing.setter
    def allow_state_sharing(self, value: bool) -> None:
        self.__parts.link.check_process()
        value = check_flag("allow_state_sharing", value)
        if value and self.client_mode:
            raise InvalidValueError(
                "allow_state_sharing must be False in client mode, got True: others can't dial this averager"
            )
        self.__parts.states.switch(allowed=value)

    @property
    def state_sharing_priority(self) -> float:
        """Others download the state from peers with the highest priority first; 0 at first. Setting it acts at once.

        :raises InvalidValueError: on setting, not finite, or not 0 in client mode
        """
        return self.__parts.states.priority

    @state_sharing_priority.setter
    def state_sharing_priority(self, value: float) -> None:
        self.__parts.link.check_process()
        value = check_number("state_sharing_priority", value)
        if value and self.client_mode:
            raise InvalidValueError(
                f"state_sharing_priority must be 0 in client mode, where no state is shared, got {value}"
            )
        self.__parts.states.switch(priority=float(value))

    def get_current_state(
        self,
    ) -> tuple[Any, Sequence[torch.Tensor]] | tuple[Any, Sequence[torch.Tensor], Any]:
        """What a peer that joins downloads; meant to be overridden.

        Called in the user process, on a thread for this alone (also while ``__init__`` of a subclass still runs after
        ``super().__init__(start=True)``), with the lock of :meth:`get_tensors` held; that is kept until what was
        returned is copied, so that no round writes meanwhile, and nothing needs to be cloned. A large state that takes
        more memory than was made ready for it (as much as the last copy took; before the first one, as much as the
        averaged tensors) is asked for twice. What is not among the averaged tensors is the subclass's to protect. If it
        raises, or returns something else, a warning says so here, and the peer that asked is sent to the next donor.

        :returns: metadata that :attr:`serializer` encodes (None and empty ones are fine; 16 MiB at most), any number of
          dense tensors of any usual dtype, shape and device, and optionally a CompressionInfo for each (or None).
          Floating tensors travel with ``state_compression``, others as they are.
        """
        bits = self.get_group_bits() if self.is_alive() else self.__parts.config.initial_group_bits
        with self.get_tensors() as tensors:
            return {"group_key": group_key(self.prefix, str(bits))}, tensors, self.__parts.infos

    @overload
    def load_state_from_peers(
        self, wait: Literal[True] = True, timeout: float | None = None, *, progress: bool = False
    ) -> DownloadedState | None: ...

    @overload
    def load_state_from_peers(
        self, wait: bool, timeout: float | None = None, *, progress: bool = False
    ) -> DownloadedState | MPFuture[DownloadedState | None] | None: ...

    def load_state_from_peers(
        self, wait: bool = True, timeout: float | None = None, *, progress: bool = False
    ) -> DownloadedState | MPFuture[DownloadedState | None] | None:
        """Download the state of another peer: that with the highest :attr:`state_sharing_priority` which can give it.

        Nothing is written into the averaged tensors: copy what is returned to where it belongs. All of the tensors lie
        in one block of memory, which is freed with the last of them. A round that began before adds
        what it changed to the state that you have copied. Let it end first, and with ``apply_when="called"`` call
        :meth:`apply_average` before you copy.

        :param wait: return the state; otherwise return at once a future of it, that can be awaited and cancelled
        :param timeout: seconds until all of it has come and is verified; None: until then, or until nobody is left to
          ask. The metadata (16 MiB at most) are decoded after that.
        :param progress: show a progress bar on stderr
        :returns: metadata and tensors as the donor's :meth:`get_current_state` returned them, on the CPU, verified by
          a digest; or None, after a warning that says whom was asked and what each answered. It is not older than
          this call, unless others were still downloading it; see :attr:`last_loaded_state`
        :raises InvalidValueError: ``timeout`` out of range
        :raises InvalidStateError: not started, shut down (meanwhile), or ``wait=True`` inside :meth:`get_tensors`
        :raises PeerProcessDied: the background process has ended
        :raises PeerProcessUnresponsive: it is stopped, or gives no sign of life, and ``timeout`` has passed
        """
        wait, progress = check_flag("wait", wait), check_flag("progress", progress)
        if timeout is not None:
            timeout = check_number("timeout", timeout, above=0)
            self.__parts.order.check(LOAD_TIMEOUT, timeout)
        if wait:
            self.__parts.store.check_not_held("load_state_from_peers(wait=True)")
        loading = self.__parts.states.load(self.__parts.link.ready(timeout), timeout, progress=progress)
        if not wait:
            return loading
        try:
            return loading.result()
        except BaseException:
            loading.cancel()  # Ctrl+C: the donor's slot is for others
            raise

    async def rpc_download_state(
        self, _request: Any = None, _context: Any = None
    ) -> AsyncIterator[DownloadData]:
        """What a peer that downloads this one's state is sent: the serialized metadata first, then the tensors' encoded
        parts. Nothing if :attr:`allow_state_sharing` is False. The parameters are those of hivemind's method and mean
        nothing: peers are served in the background process, and not by this method, which is here for a look at it.

        Raises whatever :meth:`get_current_state` raises, and a UsageError if what it returns can't be sent.
        """
        if self.allow_state_sharing:
            async for piece in state_pieces(self.__parts.states.capture):
                yield piece

    # groups

    def get_group_bits(self, wait: bool = True) -> str | MPFuture[str]:
        """The bits under which this peer looks for its next group, without the prefix.

        :param wait: return them; otherwise return at once a future that can be awaited
        :raises InvalidStateError: not started or shut down
        """
        wait = check_flag("wait", wait)
        bits: MPFuture[str] = self.__parts.link.ready().call(GetGroupBits())
        return bits.result() if wait else bits

    def set_group_bits(self, group_bits: str, wait: bool = True) -> MPFuture[None] | None:
        """Look for groups among the peers with these bits from now on, in a search that has no group yet as well;
        while a round runs, from the next one on.

        After each round the bits change, so that peers who start from a full grid of bits meet new ones in every round.
        Without a full grid some may find no partners, in one step after the other: nobody looks under other bits.

        :param group_bits: '0' and '1', at most 64; empty: back to automatic, where the bits follow the number of peers
        :param wait: return when it is done; otherwise return at once a future that can be awaited
        :raises InvalidValueError: other characters, or too many
        :raises InvalidStateError: not started or shut down
        """
        group_bits, wait = check_bits("group_bits", group_bits), check_flag("wait", wait)
        done: MPFuture[None] = self.__parts.link.ready().call(SetGroupBits(group_bits))
        return done.result() if wait else done

    # averaging

    def get_tensors(self) -> TensorsBlock[HeldTensors]:
        """Hold the averager's lock (re-entrant) and yield the averaged tensors: the very objects that were
        given; of a module or a function, those that it has now. Change them in place (``tensors[0] += 1``),
        parameters under :class:`torch.no_grad`.

        While steps run in the background, the trainer's update belongs inside: ``with averager.get_tensors():
        optimizer.step()``. An update outside that meets the writing of an average would undo it, or be undone by it,
        in some elements; with ``apply_when="called"`` none meets it. A storage may be resized or replaced between
        rounds, inside too: a round finds those of all elements, of the same shapes, or fails.

        Waits for a copy that is under way at most, never for the network. While the lock is held no round
        takes or writes the tensors; hold it shortly. Do not call ``step(wait=True)`` inside.
        """
        self.__parts.link.check_process()
        return TensorsBlock(self.__parts.store.hold_for_trainer())

    def step(
        self,
        gather: Any = None,
        scheduled_time: float | None = None,
        weight: float | None = None,
        timeout: float | None = None,
        allow_retries: bool = True,
        require_trigger: bool = False,
        wait: bool = True,
        *,
        when_busy: WhenBusy = "queue",
    ) -> dict[PeerID, Any] | StepControl | None:
        """Find a group and average with it once.

        An average that has come late, of a step that ended in doubt, is written first; see
        :meth:`apply_late_average`. With ``apply_when="called"``, so is one that waits for :meth:`apply_average`. With
        ``wait=True``, that of this step is written before the call returns.

        :param gather: sent to every member of the group; anything that :attr:`serializer` encodes, at most
          512 KiB. The leader sends what all n members gathered to each of them before the round, which fails if
          that (n * n times the size) takes more than some seconds.
        :param scheduled_time: when all-reduce is expected to begin (:func:`~shoal.utils.get_dht_time`
          seconds, at most a day ahead); a group that is not full waits for further peers until then. Default: in
          ``min_matchmaking_time`` seconds, or when four fifths of a shorter ``timeout`` have passed.
        :param weight: of this peer in the average, at most 1e300; 0: contributes nothing, but takes the average;
          default: 1. Of no effect if ``auxiliary``.
        :param timeout: seconds for finding a group, from now on, the wait for earlier steps included; None:
          search until one is found
        :param allow_retries: look for another group within ``timeout`` if the round fails, after a pause that grows
          from 0.1 to 5 seconds, unless this peer's own tensors are the reason (NaN, another shape than before)
        :param require_trigger: let the group wait until :meth:`StepControl.allow_allreduce` is called; needs
          ``wait=False``
        :param wait: return when finished; otherwise return a :class:`StepControl` at once
        :param when_busy: while an earlier step is under way, "queue" runs this one after it, and "current" returns that
          one, or waits for it. The other parameters are of no effect then.
        :returns: with ``wait=True`` what each member gathered, ``{PeerID: data}`` (None where it cannot be
          read, with a warning), or None if the step failed: then the tensors are as they were, a warning says
          why (an error from the fifth failure in a row on), and so does :attr:`last_report`
        :raises InvalidValueError: a parameter out of range
        :raises InvalidTypeError: ``gather`` can't be encoded, or :attr:`serializer` makes no bytes of it
        :raises InvalidStateError: not started, shut down, ``wait=True`` inside :meth:`get_tensors`, or an average that
          waits can't be written, as of :meth:`apply_average`
        :raises PeerProcessDied: the background process has ended
        :raises PeerProcessUnresponsive: it is stopped, or gives no sign of life, and ``timeout`` has passed; once the
          tensors were taken, the step fails instead, with ``in_doubt`` in its report, since the process may have voted
        """
        wait = check_flag("wait", wait)
        if wait and require_trigger:
            raise InvalidValueError(
                "require_trigger=True needs wait=False: with wait=True nobody could trigger it"
            )
        if wait:
            self.__parts.store.check_not_held("step(wait=True)")
        if self.__parts.usage is not None:
            self.__parts.usage.check()
        submit = partial(
            self.__parts.steps.submit,
            self.__parts.link.ready(timeout),
            self.serializer,
            gather=gather,
            scheduled_time=scheduled_time,
            weight=weight,
            timeout=timeout,
            allow_retries=allow_retries,
            require_trigger=require_trigger,
            when_busy=when_busy,
            wait=wait,
        )
        self.__parts.late.write()
        if not wait:
            self.__parts.writer.apply()
            return submit()[0]
        with self.__parts.writer.caller_in_step():
            return self.__parts.steps.wait_for(*submit())

    def apply_average(self) -> bool:
        """Write the average of a round that has committed, if one is there; for ``apply_when="called"``.

        Call it between two training steps: after :meth:`torch.optim.Optimizer.step` and before the next forward pass.
        The average is written on this thread, and what the trainer has changed since the round began is kept. No
        update can get lost, and no forward pass has begun with other values. Where one has all the same, autograd
        raises an error in its backward pass.

        :returns: whether there was one
        :raises InvalidStateError: made with ``apply_when="ready"``; not started, shut down; or the average can't be
          written, since a tensor has another shape now, for instance: it is dropped then
        """
        if not self.__parts.writer.on_call:
            raise InvalidStateError(
                "apply_average() needs an averager that is made with apply_when='called'; this one writes each average "
                "as soon as it is ready"
            )
        self.__parts.link.check_running()
        return self.__parts.writer.apply()
