"""Rounds of averaging in a swarm of matchmaking cores: how fast the values of many peers come to their mean."""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shoal.averaging.group import GroupInfo, PeerMode
from shoal.averaging.lineage import NO_LINEAGE, Lineage, after_round
from shoal.averaging.matchmaking.group_keys import GroupKeys
from shoal.averaging.matchmaking.scout import EXPLORE_AFTER
from shoal.averaging.matchmaking.signposts import Signpost, leaves_signpost
from shoal.averaging.matchmaking.view import NOTHING_KNOWN
from shoal.averaging.matchmaking_config import MatchmakingConfig
from shoal.p2p.identity import PeerID
from shoal.testing.matchmaking_cores import Peer, StallingCore, SwarmOfCores, core_peer_id

__all__ = ["MixingSwarm", "RoundResult"]

DIMENSIONS = 32
LOOKS = 0.25
"""So often a peer with a seat looks in a search whether there is another grid."""


@dataclass(frozen=True)
class RoundResult:
    """What one round of all has brought."""

    variance: float
    """Of the values of the peers that are there, over the peers, as the mean over the dimensions."""
    sizes: tuple[int, ...]
    """Of the groups."""
    alone: int
    """Peers that looked for a group and found none."""
    seconds: float
    """The median time until a peer's group stood."""
    slowest: float
    polls: float
    """Reads of the DHT for each peer."""


class MixingSwarm:
    """Peers with values from N(0, 1) that search for groups, and hold their group's average then."""

    def __init__(
        self,
        seed: int,
        count: int,
        target: int | Sequence[int],
        *,
        modes: Sequence[PeerMode] = (PeerMode.FULL,),
        jitter: float = 0.0,
        wait: float = 5.0,
    ) -> None:
        """
        :param target: sizes of full groups; of several, peers have one in turn, and likewise with ``modes``
        :param jitter: seconds within which the searches of a round begin
        :param wait: ``min_matchmaking_time``
        """
        targets = [target] if isinstance(target, int) else list(target)
        self.configs = [MatchmakingConfig(one, min_matchmaking_time=wait) for one in targets]
        self.modes = modes
        self.jitter = jitter
        self.rng = random.Random(f"mixing {seed}")
        self.draw = np.random.default_rng(seed)
        self.swarm = SwarmOfCores(seed, self.configs[0])
        self.values: dict[int, npt.NDArray[np.float64]] = {}
        self.keys: dict[int, GroupKeys] = {}
        self.lineages: dict[int, Lineage] = {}
        self.made = 0
        for _ in range(count):
            self.join(self.draw.standard_normal(DIMENSIONS))

    def join(self, values: npt.NDArray[np.float64]) -> int:
        """One more peer, with these values; its number."""
        number, self.made = self.made, self.made + 1
        self.values[number] = values
        self.keys[number] = GroupKeys(core_peer_id(number))
        return number

    def leave(self, number: int) -> None:
        """A peer goes, with its values, and is not there in later rounds."""
        del self.values[number], self.keys[number]

    def replace(self, share: float) -> None:
        """So many of the peers leave, and others come with the state of one that stays, as newcomers load it."""
        present = sorted(self.values)
        for number in self.rng.sample(present, round(share * len(present))):
            self.leave(number)
            self.join(self.values[self.rng.choice(sorted(self.values))].copy())

    def round(self, absent: float = 0.0, slow: Sequence[int] = ()) -> RoundResult:
        """Everybody looks for a group, but the ``slow`` ones and a random share of ``absent`` peers."""
        numbers = [one for one in sorted(self.values) if one not in slow and not self.rng.random() < absent]
        began, polls = self.swarm.now, self.swarm.polls
        searches = {number: self._search(number) for number in numbers}
        self.swarm.run()
        alone = sum(peer.formed is None for peer in searches.values())
        groups = {peer.group_id: peer for peer in searches.values() if peer.formed is not None}
        for peer in groups.values():
            self._average(peer)
        for keys in self.keys.values():
            keys.search_ended()
        seconds = sorted(
            peer.finished_at - peer.start_at for peer in searches.values() if peer.formed is not None
        )
        assert self.swarm.now >= began
        return RoundResult(
            self.variance(),
            tuple(sorted(len(peer.formed) for peer in groups.values() if peer.formed is not None)),
            alone,
            seconds[len(seconds) // 2] if seconds else math.inf,
            seconds[-1] if seconds else math.inf,
            (self.swarm.polls - polls) / max(1, len(numbers)),
        )

    def run_free(self, periods: Sequence[float], until: float) -> list[int]:
        """Nobody waits for the others: each peer looks for a group, works for its period of seconds, and looks again.
        The sizes of the groups of peers, one for each search; 1: it found none.
        """
        sizes: list[int] = []
        heard: Counter[int] = Counter()

        def begin(number: int) -> None:
            self._search(number).when_over = lambda peer: end(number, peer)

        def end(number: int, peer: Peer) -> None:
            sizes.append(1 if peer.formed is None else len(peer.formed))
            if peer.formed is None or peer.group_id is None:
                done = [number]
            else:
                heard[peer.group_id] += 1
                if heard[peer.group_id] < len(peer.formed):
                    return  # the round begins when all know of it
                self._average(peer)
                done = [self._numbers[member] for member in peer.formed.peer_ids]
            for one in done:
                self.keys[one].search_ended()
                self.swarm.at(self.swarm.now + periods[one], functools.partial(begin, one))

        for number in sorted(self.values):
            begin(number)
        self.swarm.run_until(until)
        return sizes

    def variance(self) -> float:
        """As :attr:`RoundResult.variance`, now."""
        return float(np.var([self.values[number] for number in sorted(self.values)], axis=0).mean())

    def rounds_until(self, variance: float, most: int, absent: float = 0.0) -> list[RoundResult]:
        """Rounds until the variance is below that, ``most`` of them at most."""
        rounds: list[RoundResult] = []
        while len(rounds) < most and (not rounds or rounds[-1].variance >= variance):
            rounds.append(self.round(absent))
        return rounds

    def mode_of(self, number: int) -> PeerMode:
        """What a peer does in groups."""
        return self.modes[number % len(self.modes)]

    def _search(self, number: int) -> Peer:
        peer_id, keys = core_peer_id(number), self.keys[number]
        before = self.swarm.peers.get(peer_id)
        known = (
            NOTHING_KNOWN if before is None or isinstance(before.core, StallingCore) else before.core.known
        )
        peer = self.swarm.search(
            peer_id,
            self.rng.uniform(0, self.jitter),
            self.mode_of(number),
            lineage=NO_LINEAGE if keys.has_seat else self.lineages.get(number, NO_LINEAGE),
            known=known,
            keys=keys,
            config=self.configs[number % len(self.configs)],
        )
        if not keys.has_seat:
            self.swarm.at(peer.start_at + EXPLORE_AFTER, lambda: self._explore(peer))
            if before is None:
                self.swarm.at(peer.start_at + 2 * peer.poll_time, lambda: self.swarm.arrive(peer))
        elif self.rng.random() < LOOKS:
            self.swarm.at(peer.start_at + 2 * peer.poll_time, lambda: self.swarm.look_for_other_grid(peer))
        return peer

    def _explore(self, peer: Peer) -> None:
        self.swarm.look_for_grid(peer)

    def _average(self, peer: Peer) -> None:
        group = peer.formed
        assert group is not None
        numbers = [self._numbers[member] for member in group.peer_ids]
        contributing = [number for number in numbers if self.mode_of(number).contributes]
        average = np.mean([self.values[number] for number in contributing], axis=0)
        averaged = [
            (member.peer_id, member.lineage)
            for member in group.members
            if member.mode is not PeerMode.AUXILIARY and member.weight > 0
        ]
        lineage = after_round(group.group_id, averaged)
        for number in numbers:
            self.values[number] = average
            self.lineages[number] = lineage
            target = self.configs[number % len(self.configs)].target_group_size
            keys = self.keys[number]
            keys.round_committed(group, target)
            self._tell_news(number, group)

    def _tell_news(self, number: int, group: GroupInfo) -> None:
        keys, peer_id, now = self.keys[number], core_peer_id(number), self.swarm.now
        if keys.news is None:
            return
        if not keys.has_seat:
            self.swarm.left_grid_at[peer_id] = now
        if leaves_signpost(group, peer_id):
            self.swarm.signposts[peer_id] = Signpost(keys.news, now)

    @property
    def _numbers(self) -> dict[PeerID, int]:
        return {core_peer_id(number): number for number in self.values}
