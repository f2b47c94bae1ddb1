"""Each safeguard of a round is needed: without it, the sweeps over seeds find members that end differently.

Every test replaces one safeguard by a version without it, and looks for the first seed that shows a violation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from tests.averaging.allreduce.swarm import Swarm

from shoal.averaging.allreduce import coordination, core, election
from shoal.averaging.allreduce.coordination import Coordinator
from shoal.averaging.allreduce.core import AllReduce
from shoal.averaging.allreduce.voter import Voter
from shoal.errors import ProtocolViolation
from shoal.testing.allreduce_cores import Violation

Patch = pytest.MonkeyPatch
SEEDS = 3000


def no_quorum(patch: Patch) -> None:
    """One acceptance decides."""
    for module in (coordination, election):
        patch.setattr(module, "is_quorum", lambda members, size: True)


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

    def on_any(self, member, weight, epoch, now):
        if member in self._ready:
            return []
        return on_ready(self, member, weight, self.assignment.epoch, now)

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
    committers = Coordinator._committers
    patch.setattr(Coordinator, "_committers", lambda self: list(self._ready) or committers(self))


ABLATIONS: dict[Callable[[Patch], None], Sequence[str]] = {
    no_quorum: ("halves", "isolate"),
    no_promises: ("freeze", "halves", "isolate"),
    no_adoption: ("kill", "freeze", "isolate"),
    no_epoch_of_ready: ("kill",),
    no_exclusion: ("nan", "kill"),
    no_ready_first: ("kill",),
}
SLOW = (no_epoch_of_ready,)
"""It takes more than a thousand seeds."""


@pytest.mark.parametrize(
    "ablate",
    [
        pytest.param(one, marks=[pytest.mark.sweep] if one in SLOW else [], id=one.__name__)
        for one in ABLATIONS
    ],
)
def test_without_a_safeguard_the_seeds_find_a_violation(ablate: Callable[[Patch], None], monkeypatch: Patch):
    ablate(monkeypatch)
    assert first_violation(ABLATIONS[ablate]) is not None, f"{SEEDS} seeds found nothing wrong without it"


def first_violation(kinds: Sequence[str]) -> int | None:
    """The first seed after which members have ended differently, or one takes another for a liar."""
    for seed in range(SEEDS):
        swarm = Swarm(seed)
        swarm.strike(kinds)
        try:
            swarm.run()
            swarm.check()
            if any(swarm.members[me].is_alive for me in swarm.committed):
                swarm.check_counted()
        except (Violation, ProtocolViolation):
            return seed
    return None
