"""``make chaos``: hundreds of faults of real peers, and what came of each.

A journal remembers what was done, so that a run that was interrupted goes on where it was. Run as
``.venv/bin/python tests/lab/chaos.py --help``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lab_fault_plan import CELLS, Trial, all_trials
from lab_faulty_swarm import Laboratory, NotFired, Verdict
from lab_internet import Internet
from lab_peers import Template

from shoal.testing import namespaces

ROOT = Path(__file__).parents[2]
JOURNAL = ROOT / "build" / "chaos.jsonl"
KINDS = ("kill", "term", "stop", "close", "cut")

Entry = Mapping[str, Any]


class Journal:
    """What came of each fault under one commit, a line of JSON each.

    :param commit: None: the last one that was tried
    """

    def __init__(self, path: Path, commit: str | None) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        entries = [json.loads(line) for line in lines]
        if commit is None:
            commit = entries[-1]["commit"] if entries else ""
        self._commit = commit
        self.entries: dict[str, Entry] = {
            entry["name"]: entry for entry in entries if entry["commit"] == commit
        }

    def add(self, trial: Trial, **found: Any) -> Entry:
        entry = {"commit": self._commit, "name": trial.name, "trial": asdict(trial), **found}
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self.entries[trial.name] = entry
        return entry


class Runs:
    """Laboratories for the faults: one on loopback, one of namespaces. Each is made when it is first needed."""

    def __init__(self, template: Template) -> None:
        self._template = template
        self._current: tuple[bool, Laboratory] | None = None
        self._open = contextlib.ExitStack()

    def laboratory(self, with_links: bool) -> Laboratory:
        if self._current is None or self._current[0] != with_links:
            self.close()
            internet = self._open.enter_context(contextlib.closing(Internet())) if with_links else None
            made = self._open.enter_context(contextlib.closing(Laboratory(self._template, internet)))
            self._current = with_links, made
        return self._current[1]

    def close(self) -> None:
        """Give up the current laboratory: what went wrong in it is not to trouble the next fault."""
        self._current = None
        self._open.close()


def run_one(runs: Runs, trial: Trial) -> tuple[Verdict | None, str]:
    """What came of a fault; None: it did not happen. And all that was said, if it is worth telling."""
    lab, verdict = runs.laboratory(trial.is_cut), None
    with contextlib.suppress(NotFired):
        verdict = lab.run(trial)
    if verdict is not None and not verdict.wrong:
        return verdict, ""
    story = lab.story()
    runs.close()
    return verdict, story


def run_all(trials: Sequence[Trial], journal: Journal, stories: Path) -> None:
    """Run what the journal does not have yet."""
    to_do = [trial for trial in trials if trial.name not in journal.entries]
    why_not = namespaces.why_not()
    print(f"{len(trials)} faults, {len(trials) - len(to_do)} done before")
    with contextlib.closing(Template()) as template, contextlib.closing(Runs(template)) as runs:
        for number, trial in enumerate(to_do, len(trials) - len(to_do) + 1):
            if trial.is_cut and why_not is not None:
                print(f"{number:4}  {trial.name}: left out: {why_not}")
                continue
            entry = note(journal, trial, *run_one(runs, trial), stories)
            print(f"{number:4}  {describe(entry)}", flush=True)


def note(journal: Journal, trial: Trial, verdict: Verdict | None, story: str, stories: Path) -> Entry:
    """Write down what came of a fault, and what was said where it went wrong."""
    if story:
        stories.mkdir(parents=True, exist_ok=True)
        (stories / f"{trial.name.replace(', ', '-').replace(' ', '_')}.txt").write_text(story)
    if verdict is None:
        return journal.add(trial, fired=False, wrong=["no member came to this phase in this role"])
    return journal.add(
        trial,
        fired=True,
        survived=verdict.survived,
        survivors=verdict.survivors,
        averaged=verdict.averaged,
        splits=len(verdict.splits),
        seconds=round(verdict.seconds, 3),
        back=None if verdict.back is None else round(verdict.back, 3),
        wrong=verdict.wrong,
        errors=verdict.errors,
    )


def describe(entry: Entry) -> str:
    """One line on what came of a fault."""
    if not entry["fired"]:
        return f"{entry['name']}: DID NOT HAPPEN"
    back = "" if entry["back"] is None else f", victim back after {entry['back']:.1f} s"
    text = f"{entry['averaged']} of {entry['survivors']} averaged in {entry['seconds']:.1f} s{back}"
    if not entry["survivors"]:
        text = "the joiner itself died, and nothing of it is left"
    return f"{entry['name']}: {text}" + "".join(f"\n      WRONG: {wrong}" for wrong in entry["wrong"])


def table(entries: Sequence[Entry]) -> Iterator[str]:
    """Lines of Markdown: phases down, kinds of faults across."""
    yield "| phase | " + " | ".join(KINDS) + " |"
    yield "| -- |" + " -- |" * len(KINDS)
    for phase in CELLS:
        cells = (cell(entries, phase, kind) for kind in KINDS)
        yield f"| {phase} | " + " | ".join(cells) + " |"


def cell(entries: Sequence[Entry], phase: str, kind: str) -> str:
    own = [
        one
        for one in entries
        if one["fired"]
        and one["survivors"]
        and one["trial"]["phase"] == phase
        and one["trial"]["action"].split()[0] == kind
    ]
    if not own:
        return ""
    survived = sum(one["survived"] for one in own)
    seconds = statistics.median(one["seconds"] for one in own)
    worst = max(one["seconds"] for one in own)
    return f"{survived}/{len(own)}, {seconds:.1f} ({worst:.1f}) s"


def summary(entries: Sequence[Entry]) -> str:
    fired = [one for one in entries if one["fired"]]
    survived, splits = sum(one["survived"] for one in fired), sum(one["splits"] for one in fired)
    wrong = sum(bool(one["wrong"]) for one in entries)
    return (
        f"{len(entries)} faults, {len(fired)} happened, {survived} survived, {splits} splits, "
        f"{wrong} with something wrong"
    )


def commit_of(root: Path) -> str:
    """The commit that is tried, and whether it was changed since; empty if nobody knows."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
    )
    return found.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description="Faults of real peers, and what comes of each.")
    parser.add_argument(
        "--journal", type=Path, default=JOURNAL, help="where it goes on (default: build/chaos.jsonl)"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only faults whose name has this in it")
    parser.add_argument("--count", type=int, help="only so many of them, evenly spread")
    parser.add_argument(
        "--table", action="store_true", help="run nothing, and print the table of the last run"
    )
    options = parser.parse_args()
    trials = [trial for trial in all_trials() if options.only in trial.name]
    if options.count is not None:
        trials = trials[:: max(1, len(trials) // options.count)][: options.count]
    journal = Journal(options.journal, None if options.table else commit_of(ROOT))
    interrupted, began = False, time.monotonic()
    try:
        if not options.table:
            run_all(trials, journal, options.journal.with_suffix(""))
    except KeyboardInterrupt:
        interrupted = True
    entries = [journal.entries[trial.name] for trial in trials if trial.name in journal.entries]
    print("\n" + "\n".join(table(entries)))
    print(f"\nSurvived of all; median (and worst) seconds until the last survivor ended.\n{summary(entries)}")
    print(f"{time.monotonic() - began:.0f} s; journal: {options.journal}")
    if interrupted:
        print("Interrupted: the same command goes on.")
        return 130
    return 1 if any(one["wrong"] for one in entries) else 0


if __name__ == "__main__":
    sys.exit(main())
