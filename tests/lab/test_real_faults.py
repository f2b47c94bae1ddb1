"""Real peers are killed, stopped and cut off at named phases: what must hold does, and the others average."""

from __future__ import annotations

import contextlib
import datetime
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab_fault_plan import FAST, Trial, all_trials, rotating
from lab_faulty_swarm import Laboratory, NotFired
from lab_internet import Internet
from lab_peers import Template
from tests.swept import rest_swept

pytestmark = pytest.mark.xdist_group("lab")

Run = Callable[[Trial], None]


def seed_of_today() -> str:
    """The commit that is tested; the day where there is none."""
    found = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return found.stdout.strip() or datetime.datetime.now(datetime.UTC).date().isoformat()


CUTS = [
    Trial("cut both", "background", "scattering", "owner", seconds=3.0),
    Trial("cut incoming", "background", "voting", "owner", seconds=3.0),
    Trial("cut outgoing", "background", "deciding", "leader", seconds=12.0),
]


class Faults:
    """One laboratory for many faults. It is made anew when one went wrong, so that the next one is not troubled."""

    def __init__(self, make: Callable[[], Laboratory]) -> None:
        self._make = make
        self._laboratory: Laboratory | None = None

    def run(self, trial: Trial) -> None:
        if self._laboratory is None:
            self._laboratory = self._make()
        lab = self._laboratory
        is_fine = False
        try:
            verdict = lab.run(trial)
            assert not verdict.wrong, lab.story()
            assert verdict.survived, "\n".join([*verdict.errors, lab.story()])
            is_fine = True
        except NotFired as error:
            pytest.fail(f"{error}\n{lab.story()}")
        finally:
            if not is_fine:
                self.close()

    def close(self) -> None:
        if self._laboratory is not None:
            lab, self._laboratory = self._laboratory, None
            lab.close()
            assert lab.processes_left() == []


@pytest.fixture(scope="module")
def fault_template() -> Iterator[Template]:
    with contextlib.closing(Template()) as made:
        yield made


@pytest.fixture(scope="module")
def faults(fault_template: Template) -> Iterator[Faults]:
    """On loopback."""
    with contextlib.closing(Faults(lambda: Laboratory(fault_template))) as made:
        yield made


@pytest.fixture(scope="module")
def link_faults(fault_template: Template, namespaces: None) -> Iterator[Faults]:
    """Each peer on a machine of its own."""
    with (
        contextlib.closing(Internet()) as internet,
        contextlib.closing(Faults(lambda: Laboratory(fault_template, internet))) as made,
    ):
        yield made


@pytest.mark.parametrize("trial", rest_swept(FAST, kept=8), ids=lambda trial: trial.name)
def test_the_others_average_after_a_fault(faults: Faults, trial: Trial):
    faults.run(trial)


@pytest.mark.sweep
@pytest.mark.parametrize("trial", rotating(all_trials(), 60, seed_of_today()), ids=lambda trial: trial.name)
def test_the_others_average_after_one_of_many_faults(faults: Faults, trial: Trial):
    """Other ones for each commit."""
    faults.run(trial)


@pytest.mark.sweep
@pytest.mark.parametrize("trial", CUTS, ids=lambda trial: trial.name)
def test_the_others_average_after_a_link_is_cut(link_faults: Faults, trial: Trial):
    link_faults.run(trial)
