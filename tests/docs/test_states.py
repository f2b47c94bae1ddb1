"""docs/states.md is drawn from the tables of the code."""

from __future__ import annotations

from pathlib import Path

from shoal.averaging.allreduce.events import TRANSITIONS as ALLREDUCE
from shoal.averaging.matchmaking.states import TRANSITIONS as MATCHMAKING
from shoal.averaging.trainer.life import TRANSITIONS as LIFE
from shoal.sansio.machine import mermaid

PAGE = Path(__file__).resolve().parents[2] / "docs" / "states.md"
TABLES = {
    "A search for a group (`averaging/matchmaking/states.py`)": MATCHMAKING,
    "A member in a round (`averaging/allreduce/events.py`)": ALLREDUCE,
    "The life of an averager (`averaging/trainer/life.py`)": LIFE,
}
HEAD = """# States of the cores

The diagrams are drawn from the tables of transitions in the code, and a test holds this
page to them. What each state means is said beside its table.
"""


def page() -> str:
    parts = [HEAD]
    for title, table in TABLES.items():
        parts.append(f"## {title}\n\n```mermaid\n{mermaid(table)}\n```\n")
    return "\n".join(parts)


def test_the_diagrams_are_those_of_the_tables():
    assert PAGE.read_text() == page(), "write what page() returns into docs/states.md"
