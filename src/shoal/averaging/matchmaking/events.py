"""What happens to a search for a group (events, past tense) and what it asks its shell to do (effects,
imperative).

``ask`` numbers this peer's requests to leaders, ``token`` the requests of others to it: a late event of a
request that is no longer of interest is recognised by its number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from shoal.averaging.grid import NO_GRID, Grid
from shoal.averaging.group import GroupInfo, MemberInfo, PeerMode
from shoal.averaging.lineage import NO_LINEAGE, Lineage
from shoal.averaging.matchmaking.memory import Fault
from shoal.averaging.matchmaking.messages import (
    Accepted,
    Declaration,
    DeclaredState,
    Dismissed,
    Redirect,
    Rejected,
    SearchId,
)
from shoal.averaging.matchmaking.missed import Missed
from shoal.p2p.identity import PeerID
from shoal.sansio.core import TimePassed

PEERS_IN_HISTORY = 16


@dataclass(frozen=True)
class Place:
    """Where a peer looks for a group, and when."""

    key: str
    start_time: float
    """When to begin if the group is not full, in DHT time."""
    order_time: float
    """Its place in the order: ``start_time``, but later than that of every earlier search of this peer."""
    grid_round: int = 0
    lineage: Lineage = NO_LINEAGE
    lost: tuple[bytes, ...] = ()
    """Ids of peers that it could not reach lately."""
    grid: Grid = NO_GRID
    expects: int = 0
    """How many peers are expected there, this one included; 0: that is not known."""
    may_spread: bool = False
    """Whether it is the meeting place of peers that know of no grid: if they are many, they make one."""


@dataclass(frozen=True)
class SearchStarted:
    pass


@dataclass(frozen=True)
class Restarted:
    """Another start time, other group bits or another mode are wanted: the search begins anew."""

    place: Place
    mode: PeerMode


@dataclass(frozen=True)
class Declared:
    """A :class:`Declare` is done."""

    seconds: float


@dataclass(frozen=True)
class DeclareFailed:
    reason: str


@dataclass(frozen=True)
class Polled:
    """A :class:`Poll` that began at ``began_at`` found these records under the group key."""

    began_at: float
    peers: tuple[tuple[PeerID, Declaration], ...]
    seconds: float | None = None
    """That the DHT took to answer, without those in which it gave what one node lacked; None: that is not known."""


@dataclass(frozen=True)
class PollFailed:
    reason: str


@dataclass(frozen=True)
class SchemaCompared:
    """An :class:`AskSchema` is done: in what that peer differs, for people."""

    peer: PeerID
    difference: str


@dataclass(frozen=True)
class JoinRequested:
    """Another peer asks this one to lead it; its info is verified."""

    token: int
    info: MemberInfo


@dataclass(frozen=True)
class FollowerLost:
    token: int
    reason: str


@dataclass(frozen=True)
class LeaderAccepted:
    ask: int
    begins_in: float


@dataclass(frozen=True)
class LeaderRedirected:
    ask: int
    leader: PeerID
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class LeaderRejected:
    ask: int
    answer: Rejected


@dataclass(frozen=True)
class LeaderPostponed:
    ask: int
    begins_in: float
    is_beginning: bool = False
    """The leader has begun the group, and names its members."""


@dataclass(frozen=True)
class LeaderDismissed:
    ask: int
    answer: Dismissed


@dataclass(frozen=True)
class LeaderBegan:
    """The leader began a group; it is verified."""

    ask: int
    group: GroupInfo


@dataclass(frozen=True)
class LeaderLost:
    """No answer can come any more: unreachable, connection lost, protocol broken."""

    ask: int
    reason: str


@dataclass(frozen=True)
class PeerGone:
    """The last connection to a peer ended."""

    peer_id: PeerID


@dataclass(frozen=True)
class Cancelled:
    pass


Event = (
    SearchStarted
    | Restarted
    | Declared
    | DeclareFailed
    | Polled
    | PollFailed
    | SchemaCompared
    | JoinRequested
    | FollowerLost
    | LeaderAccepted
    | LeaderRedirected
    | LeaderRejected
    | LeaderPostponed
    | LeaderDismissed
    | LeaderBegan
    | LeaderLost
    | PeerGone
    | TimePassed
    | Cancelled
)


@dataclass(frozen=True)
class Declare:
    """Store this peer's record under the group key; the newest one counts, an older one in progress may be dropped."""

    state: DeclaredState
    group: tuple[SearchId, ...] = ()


@dataclass(frozen=True)
class MoveTo:
    """From now on this search is at another place; polls that are under way are void."""

    place: Place


@dataclass(frozen=True)
class Poll:
    """Read all records under the group key, the latest ones; answer with :class:`Polled` or :class:`PollFailed`."""


@dataclass(frozen=True)
class AskToJoin:
    ask: int
    leader: PeerID
    addresses: tuple[str, ...]
    is_hearsay: bool = False
    """Another peer has named these addresses, not the leader itself."""


@dataclass(frozen=True)
class LeaveLeader:
    """End the request ``ask``, whether it was answered or not."""

    ask: int


@dataclass(frozen=True)
class DistrustLeader:
    """Remember that a leader failed this peer; one that has held it is planned apart from now on."""

    leader: PeerID
    fault: Fault


@dataclass(frozen=True)
class AnswerRequest:
    """The first answer to a request; unless it is :class:`Accepted`, the request is over."""

    token: int
    answer: Accepted | Redirect | Rejected


@dataclass(frozen=True)
class PostponeFollower:
    token: int
    begins_in: float


@dataclass(frozen=True)
class DismissFollower:
    token: int
    message: Dismissed


@dataclass(frozen=True)
class BeginGroup:
    """Begin a group of this peer and these followers."""

    tokens: tuple[int, ...]
    seen: int = 0
    before: int = 0
    """As in :class:`~shoal.averaging.group.GroupInfo`."""


@dataclass(frozen=True)
class TooFew:
    """The start time came without enough members; ``seen`` peers have looked for a group here, this one included."""

    seen: int


@dataclass(frozen=True)
class TooMany:
    """So many peers that they make a grid, ``seen`` of them, look for a group where nobody knows of one. This one has
    that ``rank`` in their order.
    """

    seen: int
    rank: int


@dataclass(frozen=True)
class MissedRounds:
    """The others that were dealt to this peer's key have gone on without it."""

    missed: Missed


@dataclass(frozen=True)
class Log:
    """A line for humans about the search that goes on."""

    text: str
    is_warning: bool = False
    tells_how_to_join: bool = False
    """Add by which address others join this peer's DHT."""


@dataclass(frozen=True)
class AskSchema:
    """Find out in what this peer, which averages something else under the same prefix, differs."""

    peer: PeerID
    addresses: tuple[str, ...]
    schema_hash: bytes


@dataclass(frozen=True)
class FinishWithGroup:
    """The search of a follower is over: it is in this group. (A leader's ends with :class:`BeginGroup`.)"""

    group: GroupInfo


@dataclass(frozen=True)
class FinishWithout:
    """The search is over without a group."""

    explanation: str


Effect = (
    Declare
    | MoveTo
    | TooFew
    | TooMany
    | MissedRounds
    | Poll
    | AskSchema
    | AskToJoin
    | LeaveLeader
    | DistrustLeader
    | AnswerRequest
    | PostponeFollower
    | DismissFollower
    | BeginGroup
    | Log
    | FinishWithGroup
    | FinishWithout
)


def brief(event: Event) -> Event:
    """For the history: without most of what a poll has found in a large swarm."""
    return replace(event, peers=event.peers[:PEERS_IN_HISTORY]) if isinstance(event, Polled) else event
