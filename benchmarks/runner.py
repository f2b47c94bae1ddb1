"""Has workers do the work of a row: sides in turn, each in fresh processes, with a warm-up before what is measured."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.figures import Answer, of_round
from benchmarks.launches import Launch, launches, observers
from benchmarks.network.controls import controls_of
from benchmarks.network.laboratory import Laboratory, laboratory, why_not
from benchmarks.process import Start, Worker, WorkerFailed
from benchmarks.results import RowResult
from benchmarks.rows import Row, network_of
from benchmarks.work import Averaging, Side, Swarm, Training, Work

STARTED_AFTER = 180.0
PREPARED_AFTER = 240.0
DONE_AFTER = 1500.0
"""Seconds; only what hangs takes longer."""
PAUSE = 3.0
"""Seconds between rounds over long links, in which a trainer would train and congestion windows collapse."""

Tell = Callable[[str], None]


class Runner:
    """Runs rows.

    :param pythons: the interpreter for each library
    :param absent: the libraries that are left out, and why
    :param tell: gets a line on what is being done
    """

    def __init__(
        self, pythons: Mapping[str, str], absent: Mapping[str, str], repeats: int, tell: Tell
    ) -> None:
        self._pythons = pythons
        self._absent = absent
        self._repeats = repeats
        self._tell = tell

    def run(self, result: RowResult) -> None:
        """Fill the result of one row. When it is interrupted, the turns that were ended stay."""
        result.skipped = why_not_row(result.row)
        if result.skipped is not None:
            return
        sides = [side for side in result.row.sides if self._has(side, result)]
        for repeat in range(1, self._repeats + 1):
            for side in sides:
                turn = Turn(result, side, self._pythons[side.library], self._tell)
                try:
                    turn.run(f"{side.name}, turn {repeat} of {self._repeats}")
                except WorkerFailed as error:
                    result.note(f"{side.name} failed: {error}")

    def _has(self, side: Side, result: RowResult) -> bool:
        reason = self._absent.get(side.library)
        if reason is not None:
            result.note(f"{side.library} left out: {reason}")
        return reason is None


class Turn:
    """One side's turn at a row: fresh processes, a round that warms up, and measured ones."""

    def __init__(self, result: RowResult, side: Side, python: str, tell: Tell) -> None:
        self._result = result
        self._work = result.row.work
        self._side = side
        self._python = python
        self._tell = tell

    def run(self, name: str) -> None:
        """Add the figures of the measured rounds to the result."""
        self._tell(f"{name}: starts")
        with contextlib.ExitStack() as stack:
            lab = stack.enter_context(surroundings(self._work))
            group = Group(self._side.name, launches(self._work, self._side), self._python, lab)
            stack.callback(group.close)
            facts = group.start()
            others = Group("foreign", observers(self._work), sys.executable, lab)
            stack.callback(others.close)
            others.start()
            figures = list(self._rounds(name, group, others))
            if lab is not None and not right_controls(self._result, self._side, group.controls()):
                figures = []
            group.stop()
            others.stop()
            if lab is not None:
                self._result.links.setdefault(self._side.name, []).append(lab.finish())
        for one in figures:
            self._result.add(self._side.name, facts | one)

    def _rounds(self, name: str, group: Group, others: Group) -> Iterator[dict[str, float]]:
        """Have all rounds run; the figures of those that count."""
        ahead = warm_ups(self._work)
        total = ahead + self._result.row.rounds
        for index in range(total):
            self._tell(f"{name}: round {index + 1} of {total}")
            if network_of(self._work) is not None:
                time.sleep(PAUSE)
            group.prepare()
            others.prepare()
            answers = group.go()
            noticed = {figure: value for one in others.go() for figure, value in one.extra.items()}
            error = failure(answers)
            if error:
                self._result.note(f"{self._side.name}: a round failed: {error}")
            elif index >= ahead:
                yield noticed | of_round(self._work, answers)


class Group:
    """Workers that know of each other."""

    def __init__(self, name: str, planned: Sequence[Launch], python: str, lab: Laboratory | None) -> None:
        self._name = name
        self._planned = planned
        self._python = python
        self._lab = lab
        self._workers: list[Worker] = []

    def start(self) -> dict[str, float]:
        """Start all; the figures that hold for every round."""
        address: list[str] = []
        for launch in self._planned:
            worker = self._launch(launch)
            self._workers.append(worker)
            if len(self._workers) == 1:
                address = worker.expect("address", STARTED_AFTER)["address"]
            else:
                worker.order(join=address)
        extra: dict[str, float] = {}
        for worker in self._workers:
            extra |= worker.expect("ready", STARTED_AFTER)["extra"]
        return extra

    def prepare(self) -> None:
        """Have all prepare a round at once."""
        self._order("prepare")
        for worker in self._workers:
            worker.expect("prepared", PREPARED_AFTER)

    def go(self) -> list[Answer]:
        """Give all the trigger; what they say when they are done."""
        self._order("go")
        return [answer(worker.expect("done", DONE_AFTER)) for worker in self._workers]

    def controls(self) -> Counter[str]:
        """The congestion controls of all their sockets."""
        return controls_of(process for worker in self._workers for process in worker.processes)

    def stop(self) -> None:
        for worker in self._workers:
            worker.stop()

    def close(self) -> None:
        """End all that is left, by force."""
        for worker in self._workers:
            worker.close()

    def _order(self, what: str) -> None:
        for worker in self._workers:
            worker.order(do=what)

    def _launch(self, launch: Launch) -> Worker:
        command = [self._python, "-m", f"benchmarks.workers.{launch.program}", json.dumps(dict(launch.spec))]
        name = f"{self._name} ({launch.host})"
        if self._lab is None:
            return Worker(name, command)
        limited = [sys.executable, "-m", "benchmarks.network.without_admin", *command]
        start: Start = self._lab.machines[launch.host].start
        return Worker(name, limited, start)


def answer(said: Mapping[str, Any]) -> Answer:
    """What a worker said of a round."""
    fields = {name: said[name] for name in Answer.__dataclass_fields__ if name in said}
    return Answer(**fields)


def failure(answers: Sequence[Answer]) -> str:
    """What went wrong in a round; empty if every result came."""
    return "; ".join(dict.fromkeys(one.error or "a result is missing" for one in answers if one.ok < one.of))


def warm_ups(work: Work) -> int:
    """Rounds that are not counted: the first one finds everything cold. A swarm's time includes that."""
    return 0 if isinstance(work, Swarm | Training) else 1


def why_not_row(row: Row) -> str | None:
    """Why this machine cannot do the work, or None if it can."""
    work = row.work
    if isinstance(work, Averaging) and work.training and (os.cpu_count() or 1) < 2:
        return "it needs two cores: one for the trainer, and one for all others"
    network = network_of(work)
    return None if network is None else why_not(network)


def right_controls(result: RowResult, side: Side, found: Counter[str]) -> bool:
    """Note the congestion controls of a side's sockets; whether all of them had the row's."""
    network = network_of(result.row.work)
    assert network is not None
    result.controls.setdefault(side.name, {}).update(found)
    if set(found) == {network.control}:
        return True
    result.note(f"{side.name} not counted: its sockets used {', '.join(sorted(found)) or 'no TCP'}")
    return False


@contextlib.contextmanager
def surroundings(work: Work) -> Iterator[Laboratory | None]:
    """The machines that the work needs, or other programs that keep this one busy."""
    network = network_of(work)
    with contextlib.ExitStack() as stack:
        if isinstance(work, Averaging) and work.busy:
            for number in range(os.cpu_count() or 1):
                burner = Worker(f"burner {number}", [sys.executable, "-m", "benchmarks.workers.burner"])
                stack.callback(burner.close)
        hosts = work.peers if isinstance(work, Averaging) else 2
        yield stack.enter_context(laboratory(network, hosts)) if network is not None else None
