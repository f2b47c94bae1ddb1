"""Each safeguard of a round is needed: without it, the sweeps over seeds find members that end differently.

Every test replaces one safeguard by a version without it, and looks for the first seed that shows a violation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from tests.averaging.allreduce.aimed import (
    adopt_what_was_dropped,
    speak_after_the_election,
    split_after_the_election,
)
from tests.averaging.allreduce.swarm import Swarm

from shoal.averaging.allreduce import coordination, core, election
from shoal.averaging.allreduce.coordination import Coordinator
from shoal.averaging.allreduce.core import AllReduce
from shoal.averaging.allreduce.decision import Decision
from shoal.averaging.allreduce.election import Election
from shoal.averaging.allreduce.events import Lead
from shoal.averaging.allreduce.evidence import Evidence
from shoal.averaging.allreduce.roll import Roll
from shoal.averaging.allreduce.voter import Voter
from shoal.errors import ProtocolViolation
from shoal.testing.allreduce_cores import Violation

Patch = pytest.MonkeyPatch
SEEDS = 3000


def no_quorum(patch: Patch) -> None:
    """One acceptance decides."""
    for module in (coordination, election):
        patch.setattr(module, "is_quorum", lambda members, size, caster=0: True)


def no_promises(patch: Patch) -> None:
    """A member follows a new leader, and accepts what the old one proposes all the same."""

    def promise(voter: Voter, term: int) -> bool:
        voter.promised = max(voter.promised, term)
        return True

    patch.setattr(Voter, "promise", promise)


def no_adoption(patch: Patch) -> None:
    """A new leader proposes what it likes."""
    patch.setattr(election, "to_adopt", lambda votes: None)


def no_epoch_of_ready(patch: Patch) -> None:
    """A report of readiness counts for averages that were dropped since."""
    on_ready = Coordinator._on_ready

    def on_any(self, member, weight, epoch):
        if member in self._roll.ready:
            return []
        return on_ready(self, member, weight, self.assignment.epoch)

    patch.setattr(Coordinator, "_on_ready", on_any)


def no_exclusion(patch: Patch) -> None:
    """An excluded member takes itself for one that commits."""
    conclude = AllReduce._conclude

    def as_any(self, outcome):
        effects = conclude(self, outcome)
        if outcome.reason is None and self.phase is core.Phase.FAILED:
            self._machine.state = core.Phase.COMMITTED
        return effects

    patch.setattr(AllReduce, "_conclude", as_any)


def no_ready_first(patch: Patch) -> None:
    """The leader proposes to commit without those that are not ready, and does not exclude them."""
    committers = Roll.committers.fget
    patch.setattr(Roll, "committers", property(lambda self: list(self.ready) or committers(self)))


def no_doubt(patch: Patch) -> None:
    """A member that was ready fails plainly when all others seem to be dead."""
    patch.setattr(Evidence, "may_be_counted", lambda self: False)


def any_goodbye(patch: Patch) -> None:
    """A member that has left counts as one that accepted nothing, whenever it left."""
    patch.setattr(
        Evidence, "_left_before", property(lambda self: self.left, lambda self, _: None), raising=False
    )


def no_closing(patch: Patch) -> None:
    """A founder that has handed on its casting vote goes on to vote."""
    patch.setattr(Voter, "hand_on", lambda self: True)


def no_floor(patch: Patch) -> None:
    """A later leader begins before a quorum knows that nothing was decided, and nobody keeps that in mind."""
    patch.setattr(Election, "_is_free", property(lambda self: True))
    patch.setattr(Voter, "raise_floor", lambda self, term: None)


def no_quorum_for_the_floor(patch: Patch) -> None:
    """A later leader begins before a quorum knows that nothing was decided."""
    patch.setattr(Election, "_is_free", property(lambda self: True))


def no_terms(patch: Patch) -> None:
    """A member that follows a leader hears every other one, too."""
    patch.setattr(Decision, "hears", lambda self, term: self.election.lead is Lead.FOLLOWING)


def no_epoch_of_outcome(patch: Patch) -> None:
    """A ready member applies what it holds, whatever was committed."""
    patch.setattr(AllReduce, "_holds", lambda self, outcome: self.phase is core.Phase.READY)


ABLATIONS: dict[Callable[[Patch], None], Sequence[str]] = {
    no_quorum: ("halves", "isolate"),
    no_promises: ("halves",),
    no_adoption: ("kill", "freeze", "isolate"),
    no_epoch_of_ready: ("kill",),
    no_exclusion: ("nan", "kill"),
    no_ready_first: ("kill",),
    no_doubt: ("firewall",),
    any_goodbye: ("firewall", "quit"),
    no_closing: ("quit",),
}
AIMED: dict[Callable[[Patch], None], Callable[[int], Swarm]] = {
    no_floor: adopt_what_was_dropped,
    no_quorum_for_the_floor: split_after_the_election,
    no_terms: speak_after_the_election,
}
"""Safeguards that matter where rare things meet: their faults are aimed."""
FIRST_SEEDS = {no_adoption: 650, any_goodbye: 3300, no_terms: 90}
"""Where to begin, to save time: without these, hundreds of seeds in a row, or dozens, show nothing."""
STORIES = [pytest.param(one, id=one.__name__) for one in dict.fromkeys(AIMED.values())]
SLOW = (no_epoch_of_ready, any_goodbye)
"""They take hundreds of seeds."""


@pytest.mark.parametrize(
    "ablate",
    [
        pytest.param(one, marks=[pytest.mark.sweep] if one in SLOW else [], id=one.__name__)
        for one in ABLATIONS
    ],
)
def test_without_a_safeguard_the_seeds_find_a_violation(ablate: Callable[[Patch], None], monkeypatch: Patch):
    ablate(monkeypatch)
    assert first_violation(struck_by(ABLATIONS[ablate]), first=FIRST_SEEDS.get(ablate, 0)) is not None, (
        f"{SEEDS} seeds found nothing wrong without it"
    )


@pytest.mark.parametrize("ablate", [pytest.param(one, id=one.__name__) for one in AIMED])
def test_without_a_safeguard_aimed_faults_find_a_violation(
    ablate: Callable[[Patch], None], monkeypatch: Patch
):
    ablate(monkeypatch)
    assert first_violation(AIMED[ablate], 100, first=FIRST_SEEDS.get(ablate, 0)) is not None


def test_behind_the_floor_stands_the_epoch_of_the_outcome(monkeypatch: Patch):
    """Without a floor, a member that averaged anew fails, though it counts. It never applies what was not decided."""
    no_quorum_for_the_floor(monkeypatch)
    seed = first_violation(split_after_the_election, 100)
    assert seed is not None
    assert "failed, though it counts" in describe_violation(split_after_the_election(seed))
    no_epoch_of_outcome(monkeypatch)
    assert "and should be" in describe_violation(split_after_the_election(seed))


@pytest.mark.parametrize("script", STORIES)
def test_aimed_faults_let_no_two_members_end_differently(script: Callable[[int], Swarm]):
    assert first_violation(script, 15) is None


@pytest.mark.soak
@pytest.mark.parametrize("script", STORIES)
def test_aimed_faults_let_no_two_members_end_differently_soak(script: Callable[[int], Swarm]):
    assert first_violation(script, 1000) is None


def struck_by(kinds: Sequence[str]) -> Callable[[int], Swarm]:
    """Groups with faults of these kinds."""

    def make(seed: int) -> Swarm:
        swarm = Swarm(seed)
        swarm.strike(kinds)
        return swarm

    return make


def first_violation(make: Callable[[int], Swarm], seeds: int = SEEDS, *, first: int = 0) -> int | None:
    """The first seed after which members have ended differently, or one takes another for a liar."""
    return next((seed for seed in range(first, first + seeds) if describe_violation(make(seed))), None)


def describe_violation(swarm: Swarm) -> str:
    """What does not hold after a round; empty if all does."""
    try:
        swarm.run()
        swarm.check()
    except (Violation, ProtocolViolation) as e:
        return str(e)
    return ""
