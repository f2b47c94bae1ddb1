"""A swarm of real peers that faults happen to, one after the other: members that died are replaced.

Each peer is a user's process with its background process, on loopback or each on a machine of its own. The members are
full peers and one client.
"""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab_fault_checks import Ending, find_late, find_splits, find_wrong_tensors
from lab_fault_plan import CELLS, Trial
from lab_faulty_peer import FaultyPeer, Line, is_running
from lab_internet import Internet
from lab_peers import Template

FULL_PEERS = 3
STEP_TIMEOUT = 20.0
FAREWELL = 0.2
PROMPT = 0.3
"""Seconds in which a step ends that has nothing left to do."""
GRACE = 6.0
"""Seconds after the timeout of a step within which a member that hears nothing at all ends it."""
FIRE_LIMIT = 15.0
ALONE_AFTER = 4.0
"""Seconds after a fault from which on a member that still steps may be alone: the others step again."""
AGAIN_TIMEOUT = 6.0
GROUPED = frozenset(CELLS) - {"searching", "forming", "sharing", "loading"}
"""Phases of a group that is formed: the fault cannot have kept others from it."""
BACK_LIMIT = 30.0
"""Seconds within which a member that was stopped or cut off averages again."""
END_LIMIT = 20.0
"""Seconds in which the rest of a peer ends after one of its processes was killed."""
AVERAGER: dict[str, Any] = {
    "prefix": "faults",
    "target_group_size": FULL_PEERS + 1,
    "min_group_size": 2,
    "min_matchmaking_time": 2.0,
    "request_timeout": 1.0,
    "part_size_bytes": 2048,
}


class NotFired(AssertionError):
    """No member came to the phase in its role."""


class KeptApart(NotFired):
    """The members were not in one group when the fault happened, and one of them found no other group."""


@dataclass
class Verdict:
    """What came of one fault. ``wrong`` is empty if all that must hold does."""

    trial: Trial
    survivors: int
    averaged: int
    """Survivors that committed."""
    seconds: float
    """From the fault until the last survivor ended."""
    back: float | None = None
    """Seconds until the victim averaged again, since it could; None: it was killed."""
    splits: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def survived(self) -> bool:
        """Everybody who was left has an average."""
        return self.averaged == self.survivors


class Laboratory:
    """The swarm, its spares, and the line on which processes ask for what happens outside of them."""

    def __init__(self, template: Template, internet: Internet | None = None) -> None:
        self._template = template
        self._internet = internet
        self._folder = Path(tempfile.mkdtemp(prefix="shoal-faults-"))
        self._line = Line(self._folder / "line", self._on_asked)
        self._numbers = itertools.count(1)
        self._asked: Callable[[FaultyPeer], None] = lambda peer: None
        self._ended: list[FaultyPeer] = []
        self._cast: list[FaultyPeer] = []
        """The members of the latest fault, before any was replaced."""
        self._timers: list[threading.Timer] = []
        self._root = self._start("root", averager=None)
        self._root.wait_until_joined()
        self.members = [self._start(f"member{number}") for number in range(FULL_PEERS)]
        self.members.append(self._start("client", client_mode=True))
        for member in self.members:
            member.enlist()
        self._spare = self._start("spare")

    def run(self, trial: Trial) -> Verdict:
        """Have the fault happen, and judge what comes of it.

        Members that remember each other's failures may form two groups, in which nobody has the role, or leave one of
        them alone. Fresh ones do not: then the fault is planted anew in these.

        :raises NotFired: no fresh member came to the phase in its role either, or one was left alone again
        """
        try:
            return self._try(trial)
        except NotFired:
            for member in self.members:
                member.is_estranged = True
            self._replace_the_lost()
            return self._try(trial)

    def _try(self, trial: Trial) -> Verdict:
        self._asked = lambda peer: self._cut(peer, trial)
        for number, member in enumerate(self.members):
            member.value, member.weight = float(2**number), 1.0 + number
            member.forget()
        self._cast = list(self.members)
        self._fill(self.members)
        number = next(self._numbers)
        record = self._folder / f"fired{number}"
        try:
            return self._run(trial, f"step{number}", record)
        finally:
            record.touch()  # what has not happened will not happen any more
            self._wait_for_timers()
            self._replace_the_lost()

    def _run(self, trial: Trial, tag: str, record: Path) -> Verdict:
        for member in self._candidates(trial):
            self._plant(member, trial, record)
        began = time.monotonic()
        if trial.expects_state:
            self.members[-1].do("load", tag=tag, timeout=STEP_TIMEOUT)
        else:
            self._step(self.members, tag, STEP_TIMEOUT, require_trigger=trial.phase == "waiting")
        fired_at, victim = self._wait_until_fired(record, tag)
        victim.is_broken = trial.is_fatal
        if trial.action == "stop":
            self._later(trial.seconds, lambda: victim.signal(signal.SIGCONT))
        if trial.phase == "waiting":
            for member in self.members:
                member.do("trigger", tag=tag)
        if trial.expects_state:
            return self._judge_loading(trial, victim, tag, began, fired_at)
        return self._judge_step(trial, victim, tag, began, fired_at)

    def story(self) -> str:
        """All that the members said during the latest fault, in the order of time, with names in place of PeerIDs."""
        said = sorted((when, one.title, line) for one in self._cast for when, line in list(one.lines))
        text = "\n".join(f"{when:.3f} {title:8} {line}" for when, title, line in said)
        for one in self._cast:
            text = text.replace(one.peer_id, one.title)
        return text

    def _fill(self, members: Sequence[FaultyPeer]) -> None:
        for member in members:
            member.mark()
            member.do("fill", value=member.value)
        for member in members:
            member.digest = member.expect("filled", time.monotonic() + END_LIMIT, new=True)["digest"]

    def _step(self, members: Sequence[FaultyPeer], tag: str, timeout: float, **options: Any) -> None:
        for member in members:
            member.do("step", tag=tag, weight=member.weight, timeout=timeout, **options)

    def _candidates(self, trial: Trial) -> list[FaultyPeer]:
        """Those to which the fault may happen. Which full peer leads is not known before."""
        return [member for member in self.members if member.is_client == (trial.role == "client")]

    def _plant(self, member: FaultyPeer, trial: Trial, record: Path) -> None:
        roles = {"leader": "leader", "owner": "follower"}
        has_role = not trial.expects_state and trial.phase != "searching"
        member.do(
            "plant",
            phase=trial.phase,
            action="ask" if trial.is_cut else trial.action,
            whom=trial.whom,
            count=trial.count,
            after=trial.phase == "announcing" and trial.role == "leader",
            role=roles.get(trial.role) if has_role else None,
            record=str(record),
        )
        member.expect("planted", time.monotonic() + END_LIMIT)

    def _wait_until_fired(self, record: Path, tag: str) -> tuple[float, FaultyPeer]:
        deadline = time.monotonic() + FIRE_LIMIT
        while not record.exists():
            is_over = all(member.hear("done", 0.0, tag=tag) for member in self.members)
            if (is_over and not record.exists()) or time.monotonic() > deadline:
                raise NotFired("no member came to this phase in this role")
            threading.Event().wait(0.003)
        told = json.loads(record.read_text())
        victim = next(one for one in self.members if one.background == told["background"])
        return told["time"], victim

    # what was said, and what to make of it

    def _judge_step(
        self, trial: Trial, victim: FaultyPeer, tag: str, began: float, fired_at: float
    ) -> Verdict:
        deadline = began + STEP_TIMEOUT + GRACE
        others = [member for member in self.members if member is not victim]
        for member in others:
            member.hear("done", fired_at + ALONE_AFTER, tag=tag)
        later = self._keep_company(others, tag, deadline)
        endings = [self._ending(member, tag, deadline) for member in others]
        were_apart = trial.phase in GROUPED and any(one.was_apart_from(victim.peer_id) for one in endings)
        ends = [one.said["time"] for one in endings if one.said is not None]
        averaged = sum(one.committed for one in endings)
        verdict = Verdict(trial, len(others), averaged, max([fired_at, *ends]) - fired_at)
        verdict.wrong += find_late(endings, deadline)
        if trial.is_fatal:
            # A user's process that is gone, or about to go, says nothing.
            until = deadline if trial.whom == "background" else time.monotonic() + FAREWELL
            endings.append(self._ending(victim, tag, until))
            verdict.wrong += self._find_left(victim, trial)
        else:
            self._wait_for_timers()
            later += self._come_back(victim, tag, verdict)
            endings.append(self._ending(victim, tag, deadline + trial.seconds))
            verdict.wrong += find_late(endings[-1:], deadline + trial.seconds)
        verdict.splits = find_splits([*endings, *later])
        verdict.wrong += [*verdict.splits, *find_wrong_tensors([*endings, *later])]
        verdict.errors = sorted(
            {f"{one.said['kind']}: {one.said['error']}" for one in endings if one.said and one.said["error"]}
        )
        if were_apart and not verdict.survived and not verdict.wrong:
            raise KeptApart("the members were not in one group, and one of them found no other")
        return verdict

    def _keep_company(self, waited_for: Sequence[FaultyPeer], tag: str, until: float) -> list[Ending]:
        """All others step again, so that none of these is alone, until each has ended its step."""
        endings: list[Ending] = []
        for number in itertools.count(1):
            waiting = [one for one in waited_for if one.hear("done", 0.0, tag=tag) is None]
            if all(one.has_ended for one in waiting) or time.monotonic() > until:
                break
            free = [one for one in waited_for if one not in waiting]
            if free:
                endings += self._step_again(free, f"{tag}, company {number}")
            else:
                waiting[0].hear("done", until, tag=tag)
        return endings

    def _come_back(self, victim: FaultyPeer, tag: str, verdict: Verdict) -> list[Ending]:
        """All that have ended step again, until the victim has averaged. How these steps ended."""
        began = time.monotonic()
        victim.hear("done", began + PROMPT, tag=tag)
        endings: list[Ending] = []
        for number in itertools.count(1):
            is_free = victim.hear("done", 0.0, tag=tag) is not None
            stepping = [member for member in self.members if is_free or member is not victim]
            later = self._step_again(stepping, f"{tag}, again {number}")
            endings += later
            own = (one for one in later if one.peer == victim.peer_id)
            last = next(own, None) or self._ending(victim, tag, time.monotonic() + PROMPT)
            if last.committed or time.monotonic() > began + BACK_LIMIT:
                break
        victim.is_estranged = len({one.group for one in [*later, last]}) > 1
        if last.committed:
            verdict.back = max(0.0, last.said["time"] - began)
        else:
            verdict.wrong.append(f"the victim was not back within {BACK_LIMIT:g} s")
        return endings

    def _step_again(self, members: Sequence[FaultyPeer], tag: str) -> list[Ending]:
        self._fill(members)
        self._step(members, tag, AGAIN_TIMEOUT)
        until = time.monotonic() + AGAIN_TIMEOUT + GRACE
        return [self._ending(member, tag, until) for member in members]

    def _ending(self, member: FaultyPeer, tag: str, until: float) -> Ending:
        said = member.hear("done", until, tag=tag)
        return Ending(member.peer_id, member.value, member.weight, member.digest, said, member.is_broken)

    def _judge_loading(
        self, trial: Trial, victim: FaultyPeer, tag: str, began: float, fired_at: float
    ) -> Verdict:
        """A joiner that lives has the whole state of a donor, or an error, by its deadline."""
        joiner = self.members[-1]
        wrong: list[str] = []
        ends = time.monotonic()
        averaged, survivors, errors = 0, int(not joiner.is_broken), []
        if not joiner.is_broken:
            said = joiner.hear("loaded", began + STEP_TIMEOUT + GRACE + trial.seconds, tag=tag)
            if said is None:
                wrong.append("the joiner waits beyond its deadline")
            else:
                ends, averaged = said["time"], int(said["error"] is None)
                errors = [] if said["error"] is None else [said["error"]]
                donors = [[member.value] for member in self.members if not member.is_client]
                if averaged and said["values"] not in donors:
                    wrong.append(f"the joiner loaded {said['values']}, which no donor holds")
        wrong += self._find_left(victim, trial)
        return Verdict(trial, survivors, averaged, ends - fired_at, wrong=wrong, errors=errors)

    def _find_left(self, victim: FaultyPeer, trial: Trial) -> list[str]:
        """What a signal should have ended, and did not. A user's process outlives its background process."""
        if not trial.is_fatal:
            return []
        gone = {"background"} if trial.whom == "background" else {"user", "background"}
        deadline = time.monotonic() + END_LIMIT
        while gone & set(victim.alive()):
            if time.monotonic() > deadline:
                left = ", ".join(sorted(gone & set(victim.alive())))
                return [f"left of the victim after {END_LIMIT:g} s: the {left} process"]
            threading.Event().wait(0.01)
        return []

    # what happens outside of the peers

    def _on_asked(self, background: int) -> None:
        self._asked(next(one for one in self.members if one.background == background))

    def _cut(self, peer: FaultyPeer, trial: Trial) -> None:
        assert peer.machine is not None
        incoming, outgoing = trial.action != "cut outgoing", trial.action != "cut incoming"
        peer.machine.cut_link(incoming=incoming, outgoing=outgoing)
        self._later(trial.seconds, peer.machine.mend_link)

    def _wait_for_timers(self) -> None:
        """Until what was stopped goes on, and what was cut is mended."""
        for timer in self._timers:
            timer.join()
        self._timers.clear()

    def _later(self, seconds: float, do: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, do)
        self._timers.append(timer)
        timer.start()

    # the peers

    def _start(self, name: str, averager: dict[str, Any] | None = AVERAGER, **dht: Any) -> FaultyPeer:
        machine = None if self._internet is None else self._internet.machine(name)
        ip = "127.0.0.1" if machine is None else machine.ip
        root = None if name == "root" else self._root.joined["addresses"]
        program = {
            "program": "faults",
            "dht": {"host_maddrs": [f"/ip4/{ip}/tcp/0"], "initial_peers": root, **dht},
            "averager": averager,
            "laboratory": str(self._line.path),
        }
        return FaultyPeer(name, self._template, program, machine)

    def _replace_the_lost(self) -> None:
        """Members that are dead, or estranged from the others, make room for new ones."""
        for place, member in enumerate(self.members):
            if len(member.alive()) == 2 and not (member.is_broken or member.is_estranged):
                continue
            member.end()
            self._ended.append(member)
            if member.is_client:
                self.members[place] = self._start("client", client_mode=True)
            else:
                self.members[place], self._spare = self._spare, self._start("spare")
            self.members[place].enlist()

    def processes_left(self) -> list[int]:
        """Processes of peers that were ended, and that run on; there should be none."""
        pids = [pid for peer in self._ended for pid in (peer.user, peer.background)]
        deadline = time.monotonic() + END_LIMIT
        while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
            threading.Event().wait(0.01)  # SIGKILL takes a moment
        return [pid for pid in pids if is_running(pid)]

    def close(self) -> None:
        peers = [*self.members, self._spare, self._root]
        for peer in peers:
            peer.wait_until_joined()
            peer.end()
            self._ended.append(peer)
        self._line.close()
        shutil.rmtree(self._folder)
