"""Groups of pure cores that seeds make and strike: what may happen to one round, and what must hold after it."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from shoal.averaging.allreduce.events import Phase
from shoal.testing.allreduce_cores import Cores, Violation

SUSPENSIONS = (1.0, 3.0, 12.0, 28.0, 30.0, 40.0, 60.0)
"""Seconds, about, for which a member is frozen or cut off."""
PATIENCE = 12.0
"""Seconds within which a member that lost the leader has asked everybody it can reach: two questions that time out."""


class Swarm(Cores):
    """One group of a seed, and notes of what befell whom."""

    def __init__(self, seed: int, *, sizes: Sequence[int] = range(2, 9), **options: object) -> None:
        self.seed = seed
        rng = random.Random(seed)
        super().__init__(rng, rng.choice(sizes), min_size=rng.choice((1, 1, 2)), **options)  # type: ignore[arg-type]
        self.awake_from: dict[int, float] = {}
        """When a member that is frozen runs again."""
        self.hears_from: dict[frozenset[int], float] = {}
        """When a pair that is cut off can talk again."""
        self.ended_at: dict[int, float] = {}

    def _leave(self, me: int) -> None:
        self.ended_at.setdefault(me, self.now)
        super()._leave(me)

    # faults

    def strike(self, kinds: Sequence[str]) -> None:
        """Have one to three faults of these kinds happen, at moments that favour the first half second."""
        for _ in range(self.rng.randint(1, 3)):
            FAULTS[self.rng.choice(kinds)](self)

    def moment(self) -> float:
        """Most rounds last 0.4 s: scattering, reducing, gathering, voting and announcing all lie within."""
        return self.rng.random() * self.rng.choice((0.6, 0.6, 8.0))

    def someone(self) -> int:
        return self.rng.randrange(self.size)

    def pair(self) -> tuple[int, int]:
        one, other = self.rng.sample(range(self.size), 2)
        return one, other

    def a_while(self) -> float:
        return self.rng.choice(SUSPENSIONS) * self.rng.uniform(0.8, 1.2)

    def part(self, pairs: Iterable[tuple[int, int]], seconds: float | None, *, one_way: bool = False) -> None:
        """Let nothing arrive between the members of each pair."""
        until = math.inf if seconds is None else self.now + seconds
        for one, other in pairs:
            self.note_apart(one, other, until)
            self.cut_off(one, other, seconds, one_way=one_way)

    def wall(self, pairs: Iterable[tuple[int, int]], seconds: float | None, *, one_way: bool) -> None:
        """Have a firewall between the members of each pair."""
        until = math.inf if seconds is None else self.now + seconds
        for one, other in pairs:
            self.note_apart(one, other, until)
            self.refuse(one, other, seconds, one_way=one_way)

    def drag(self, pair: tuple[int, int], longer: float, seconds: float) -> None:
        """Have a direction take longer for a while."""
        self.note_apart(*pair, self.now + seconds)
        self.slow_down(*pair, longer, seconds)

    def note_apart(self, one: int, other: int, until: float) -> None:
        key = frozenset((one, other))
        self.hears_from[key] = max(until, self.hears_from.get(key, 0.0))

    def suspend(self, member: int, seconds: float) -> None:
        self.awake_from[member] = max(self.now + seconds, self.awake_from.get(member, 0.0))
        self.freeze(member, seconds)

    # what must hold

    def finish(self) -> str:
        """Run to the end, and check everything that holds whatever happens; return how the round ended."""
        self.run()
        ending = self.check()
        if self.committed:
            self.check_quorum()
            self.check_all_that_hear_each_other()
        return ending

    def check_quorum(self) -> None:
        """More than half of the group as it was formed has accepted the decision, or half with the founder."""
        outcome = self.members[self.committed[0]].core.outcome
        voters = [
            me
            for me, one in enumerate(self.members)
            if (vote := one.core.election.voter.accepted) is not None and vote[1] == outcome
        ]
        holder = next((me for me, one in enumerate(self.members) if one.core.election.voter.casts), 0)
        if 2 * len(voters) < self.size or (2 * len(voters) == self.size and holder not in voters):
            raise Violation(f"committed, though only {voters} accepted: {self.describe()}")

    def check_all_that_hear_each_other(self) -> None:
        """A member that had the time to ask one that committed does not end otherwise, unless it is excluded."""
        outcome = self.members[self.committed[0]].core.outcome
        assert outcome is not None
        excluded = {one.member for one in outcome.excluded}
        for me, one in enumerate(self.members):
            waits = one.core.roles.contributes[me] and me not in excluded and one.is_alive
            hears = [other for other in self.committed if waits and self.could_ask(me, other)]
            if hears and one.core.phase is not Phase.COMMITTED:
                raise Violation(f"{me} hears {hears}, which committed: {self.describe()}")

    def could_ask(self, me: int, other: int) -> bool:
        """Whether ``other`` had ended its round, and could be asked, long enough before this one ended."""
        if not self.members[other].is_alive or not (self.serves[me] or self.serves[other]):
            return False
        if self.members[other].has_forgotten:
            return False
        pair = frozenset((me, other))
        free = max(
            self.ended_at[other],
            self.hears_from.get(pair, 0.0),
            self.awake_from.get(me, 0.0),
            self.awake_from.get(other, 0.0),
        )
        return free + PATIENCE < self.ended_at[me]

    def check_survival(self) -> None:
        """Where processes were killed and nothing else happened, the round commits for all others, if it can."""
        living = [me for me, one in enumerate(self.members) if one.is_alive]
        contributors = [me for me in living if self.members[me].core.roles.contributes[me]]
        can_decide = 2 * len(living) > self.size or (2 * len(living) == self.size and 0 in living)
        can_average = any(self.members[me].weight for me in contributors) and any(
            self.serves[me] for me in living
        )
        is_enough = len(living) >= self.members[0].core.roles.min_size
        if not (can_decide and can_average and is_enough):
            return
        failed = [me for me in contributors if self.members[me].core.phase is not Phase.COMMITTED]
        if failed:
            raise Violation(f"{failed} did not commit: {self.describe()}")


def kill(swarm: Swarm) -> None:
    member, machine = swarm.someone(), swarm.rng.random() < 0.3
    swarm.at(swarm.moment(), lambda: swarm.kill(member, machine=machine))


def freeze(swarm: Swarm) -> None:
    member, seconds = swarm.someone(), swarm.a_while()
    swarm.at(swarm.moment(), lambda: swarm.suspend(member, seconds))


def separate(swarm: Swarm) -> None:
    """One pair, in one direction or both, for a while or for good."""
    pair, one_way = swarm.pair(), swarm.rng.random() < 0.3
    seconds = swarm.rng.choice((None, swarm.a_while()))
    swarm.at(swarm.moment(), lambda: swarm.part([pair], seconds, one_way=one_way))


def isolate(swarm: Swarm) -> None:
    member, seconds = swarm.someone(), swarm.a_while()
    pairs = [(member, other) for other in range(swarm.size) if other != member]
    swarm.at(swarm.moment(), lambda: swarm.part(pairs, seconds))


def halve(swarm: Swarm) -> None:
    side = {member for member in range(swarm.size) if swarm.rng.random() < 0.5}
    pairs = [(one, other) for one in side for other in range(swarm.size) if other not in side]
    seconds = swarm.a_while()
    swarm.at(swarm.moment(), lambda: swarm.part(pairs, seconds))


def flap(swarm: Swarm) -> None:
    """A link that comes and goes."""
    pair, when = swarm.pair(), swarm.moment()
    for _ in range(4):
        swarm.at(when, lambda: swarm.part([pair], 6.0))
        when += swarm.rng.uniform(6.5, 9.0)


def reset(swarm: Swarm) -> None:
    pair = swarm.pair()
    swarm.at(swarm.moment(), lambda: swarm.reset(*pair))


def withdraw(swarm: Swarm) -> None:
    member = swarm.someone()
    swarm.at(swarm.moment(), lambda: swarm.withdraw(member))


def lag(swarm: Swarm) -> None:
    """A link that takes seconds, in one direction or both."""
    one, other = swarm.pair()
    seconds, when = swarm.a_while(), swarm.moment()
    for pair in ((one, other), (other, one))[: swarm.rng.randint(1, 2)]:
        longer = swarm.rng.uniform(0.2, 4.0)
        swarm.at(when, lambda pair=pair, longer=longer: swarm.drag(pair, longer, seconds))  # type: ignore[misc]


def firewall(swarm: Swarm) -> None:
    """Between one member and some others, or all."""
    member, seconds = swarm.someone(), swarm.rng.choice((None, swarm.a_while()))
    others = [other for other in range(swarm.size) if other != member]
    some = others if swarm.rng.random() < 0.5 else swarm.rng.sample(others, swarm.rng.randint(1, len(others)))
    one_way = swarm.rng.random() < 0.3
    swarm.at(
        swarm.moment(), lambda: swarm.wall([(member, other) for other in some], seconds, one_way=one_way)
    )


def be_late(swarm: Swarm) -> None:
    """A member learns of its group when others have long begun."""
    swarm.come_late(
        swarm.someone(), swarm.rng.choice((0.5, 2.0, 8.0, 14.0, 30.0)) * swarm.rng.uniform(0.5, 1.5)
    )


def forget(swarm: Swarm) -> None:
    member = swarm.someone()
    swarm.at(swarm.moment(), lambda: swarm.forget(member))


def restart(swarm: Swarm) -> None:
    member = swarm.someone()
    swarm.at(swarm.moment(), lambda: swarm.restart(member))


def quit_(swarm: Swarm) -> None:
    member = swarm.someone()
    swarm.at(swarm.moment(), lambda: swarm.quit(member))


def send_nan(swarm: Swarm) -> None:
    member = swarm.someone()
    swarm.members[member].bad_part = swarm.rng.randrange(4)
    swarm.log.append(f"{member} sends NaN")


def lose_snapshot(swarm: Swarm) -> None:
    member = swarm.someone()
    swarm.log.append(f"{member} has no snapshot")
    swarm.at(0.0, lambda: swarm.fail_snapshot(member))


FAULTS: dict[str, Callable[[Swarm], None]] = {
    "kill": kill,
    "freeze": freeze,
    "cut": separate,
    "isolate": isolate,
    "halves": halve,
    "flap": flap,
    "reset": reset,
    "withdraw": withdraw,
    "lag": lag,
    "firewall": firewall,
    "late": be_late,
    "forget": forget,
    "restart": restart,
    "quit": quit_,
    "nan": send_nan,
    "no snapshot": lose_snapshot,
}
MIXTURE = tuple(FAULTS)


def run_seed(
    seed: int, kinds: Sequence[str], check: Callable[[Swarm], None] = lambda _: None, **options: object
) -> str:
    """One round; a violation names the seed, and says what happened."""
    swarm = Swarm(seed, **options)
    try:
        if kinds:
            swarm.strike(kinds)
        ending = swarm.finish()
        check(swarm)
    except Exception as e:
        raise Violation(f"seed {seed} of {kinds}: {type(e).__name__}: {e}; {swarm.log}") from e
    return ending


def sweep(seeds: range, kinds: Sequence[str], **options: object) -> Counter[str]:
    """All these seeds; how often a round ended in which way."""
    return Counter(run_seed(seed, kinds, **options) for seed in seeds)  # type: ignore[arg-type]
