"""docs/states.md is drawn from the tables of the code."""

from __future__ import annotations

from pathlib import Path

from shoal.averaging.allreduce.events import LEAD_TRANSITIONS as LEAD
from shoal.averaging.allreduce.events import TRANSITIONS as ALLREDUCE
from shoal.averaging.matchmaking.states import TRANSITIONS as MATCHMAKING
from shoal.averaging.state.choice import TRANSITIONS as DOWNLOAD
from shoal.averaging.state.queue import TRANSITIONS as UPLOADS
from shoal.averaging.trainer.life import TRANSITIONS as LIFE
from shoal.dht.bootstrap_core import TRANSITIONS as BOOTSTRAP
from shoal.dht.lookup_core import TRANSITIONS as LOOKUP
from shoal.sansio.machine import mermaid

PAGE = Path(__file__).resolve().parents[2] / "docs" / "states.md"
TABLES = {
    "A search for a group (`averaging/matchmaking/states.py`)": MATCHMAKING,
    "A member in a round (`averaging/allreduce/events.py`)": ALLREDUCE,
    "A member and its leader (`averaging/allreduce/events.py`)": LEAD,
    "A donor's copy of its state (`averaging/state/queue.py`)": UPLOADS,
    "A joiner's download (`averaging/state/choice.py`)": DOWNLOAD,
    "A lookup in the DHT (`dht/lookup_core.py`)": LOOKUP,
    "A node's search for its initial peers (`dht/bootstrap_core.py`)": BOOTSTRAP,
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
