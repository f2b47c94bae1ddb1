"""Every error that Shoal raises on purpose; whatever else escapes from it is a bug in Shoal.

::

    ShoalError
    ├── UsageError                      the caller's mistake
    │   ├── InvalidValueError           (also ValueError)  names the parameter, the value and what is allowed
    │   ├── InvalidTypeError            (also TypeError)
    │   └── InvalidStateError           (also RuntimeError)  e.g. used after shutdown, in a forked child, pickled
│       └── IdentityInUse           another running peer has the same identity; names its address
    ├── ProtocolViolation               a remote peer broke the protocol: it is disconnected with this reason
    ├── DeadlineExceeded                (also TimeoutError)
    │   └── PeerProcessUnresponsive     the background process is stopped, or does not answer; names it
    ├── PeerUnreachable                 (also ConnectionError)  no address of a peer could be dialed; with each dial
    ├── ConnectionLost                  (also ConnectionError)  an established connection ended; says why
    ├── RemoteError                     the other side's handler failed; carries its code and message
    ├── RankError                       another rank of this peer failed, or is gone
    ├── BootstrapError                  no initial peer of a DHT answered; lists each address and why
    ├── AllreduceException              a round of averaging failed; its tensors are as they were
    │   ├── InDoubt                     this peer cannot know whether the others committed the round
    │   └── MatchmakingException        no group was found; says what the search saw
    └── PeerProcessDied                 the background process ended; carries exit status and the end of its log
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass


class ShoalError(Exception):
    """Base of every error that Shoal raises on purpose."""


class UsageError(ShoalError):
    """The caller's mistake."""


class InvalidValueError(UsageError, ValueError):
    """A value that is not allowed; the message names the parameter, the value and what is allowed."""


class InvalidTypeError(UsageError, TypeError):
    """An object of the wrong type, or one that cannot be sent to the background process."""


class InvalidStateError(UsageError, RuntimeError):
    """A call that is not possible now: after shutdown, before start, in a forked child, under the lock."""


class IdentityInUse(InvalidStateError):
    """Another running peer holds the same identity, ``peer_id``; ``address`` is where that one is."""

    def __init__(self, peer_id: str, address: str) -> None:
        super().__init__(
            f"another running peer has this identity: {peer_id} is held at {address}. Each peer needs a key file "
            "of its own: give this one another identity_path, or stop the other peer first"
        )
        self.peer_id = peer_id
        self.address = address

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.peer_id, self.address))


class ProtocolViolation(ShoalError):
    """A remote peer broke the protocol; its connection is closed with this reason."""


class DeadlineExceeded(ShoalError, TimeoutError):
    """Something took longer than it was allowed to."""


class PeerProcessUnresponsive(DeadlineExceeded):
    """The background process did not answer in time, because it is stopped or gives no sign of life; the message names
    its pid.
    """


class DialOutcome(enum.Enum):
    """How the dial of one address ended, where it led to no connection."""

    REFUSED = "refused"
    """The machine answers that nobody listens there."""
    UNREACHABLE = "unreachable"
    """No route leads to the machine."""
    TIMED_OUT = "timed out"
    """Nothing answered in time, or not to the end of the handshake."""
    UNRESOLVED = "unresolved"
    """The address has a name that cannot be resolved."""
    UNSUPPORTED = "unsupported"
    """Nobody can dial such an address, or Shoal does not speak its protocols."""
    NOT_SHOAL = "not shoal"
    """Something answers that does not speak Shoal's protocol."""
    OTHER_VERSION = "other version"
    """A Shoal peer answers that has no version of the protocol in common with this one."""
    WRONG_PEER = "wrong peer"
    """Another peer answers than the one that was expected."""
    ITSELF = "itself"
    """The address leads back to the host that dials."""
    SAME_IDENTITY = "same identity"
    """Another peer answers that holds the identity of the host that dials."""
    NO_ROOM = "no room"
    """One side has too many connections."""
    TURNED_AWAY = "turned away"
    """The peer ended the connection before it was open, for another reason."""
    FAILED = "failed"
    """Anything else, e.g. that this machine has no more sockets."""


@dataclass(frozen=True)
class DialFailure:
    """The end of one dial: of which address, in which way, and what was said for people."""

    address: str
    outcome: DialOutcome
    reason: str

    def __str__(self) -> str:
        return f"{self.address}: {self.reason}"


class PeerUnreachable(ShoalError, ConnectionError):
    """No address of a peer could be dialed; ``dials`` says how each dial ended. No dials: no address is known."""

    def __init__(self, message: str, dials: Iterable[DialFailure] = ()) -> None:
        super().__init__(message)
        self.dials = tuple(dials)

    @property
    def failures(self) -> dict[str, str]:
        """Each address that was tried, with the reason in words."""
        return {dial.address: dial.reason for dial in self.dials}

    @property
    def is_refused(self) -> bool:
        """Whether nobody listens at any address that is known of the peer, as after the end of its process."""
        tried = [dial.outcome for dial in self.dials if dial.outcome is not DialOutcome.UNSUPPORTED]
        return all(outcome is DialOutcome.REFUSED for outcome in tried)

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (str(self), self.dials))


class ConnectionLost(ShoalError, ConnectionError):
    """An established connection ended; the message says why, as far as it is known."""


class RemoteError(ShoalError):
    """The handler at the other side failed. ``code`` is a :class:`~shoal.p2p.protocol.codes.ResetCode`, one of the
    application's (:class:`~shoal.averaging.codes.AveragingCode`), or a text that only newer peers know.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{message} [{code}]")
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.code, self.message))


class RankError(ShoalError):
    """Another rank of this peer failed, is gone, or has shut down its optimizer; the message says which, if known."""


class BootstrapError(ShoalError):
    """No initial peer of a DHT answered; ``failures`` maps each address to the reason."""

    def __init__(self, message: str, failures: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.failures = dict(failures or {})


class AllreduceException(ShoalError):
    """A round of averaging failed; the averaged tensors are as they were before it."""


class InDoubt(AllreduceException):
    """This peer had voted on a round, and could not learn how it ended: others may have committed the average.

    Its own tensors are as they were before the round. The step is not tried again.
    """


class MatchmakingException(AllreduceException):
    """No group was found; the message says what the search saw, ``story`` the same as data.

    ``story``: a :class:`~shoal.averaging.matchmaking.story.SearchStory`, or None if the search never began.
    """

    def __init__(self, message: str, story: object = None) -> None:
        super().__init__(message)
        self.story = story

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (str(self), self.story))


class PeerProcessDied(ShoalError):
    """The background process ended; ``exit_status`` as in :mod:`subprocess`, ``log_tail`` its last log lines."""

    def __init__(self, message: str, exit_status: int | None = None, log_tail: str = "") -> None:
        super().__init__(message)
        self.exit_status = exit_status
        self.log_tail = log_tail

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (str(self), self.exit_status, self.log_tail))
