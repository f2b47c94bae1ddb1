"""What the demo shows while it runs: a live table in a terminal, else plain lines."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from shoal.cli.demo.history import Outcome
from shoal.cli.demo.protocol import State, Status

ROUNDS_PER_LINE = 10
"""Without a terminal, a peer gets a line for one round in this many, and one for its end."""

_STYLES = {
    State.TRAINING: "green",
    State.SEARCHING: "yellow",
    State.AVERAGING: "cyan",
    State.CATCHING_UP: "magenta",
    State.FINISHED: "bold green",
    State.KILLED: "bold red",
    State.FAILED: "bold red",
}


class View(Protocol):
    """Shows the peers and tells of events; a context manager, between whose ends alone peers are shown."""

    def __enter__(self) -> View: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def tell(self, text: str) -> None: ...
    def show(self, statuses: Sequence[Status], rounds: int, seconds: float) -> None: ...


def make_view(console: Console) -> View:
    return LiveView(console) if console.is_terminal else PlainView(console)


class LiveView:
    """A table that is drawn over and over; events scroll by above it."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def tell(self, text: str) -> None:
        # A Text, and not markup=False: the table is drawn anew with the same options, and has markup.
        self._live.console.print(Text(text), highlight=False, soft_wrap=True)

    def show(self, statuses: Sequence[Status], rounds: int, seconds: float) -> None:
        table = render_statuses(statuses, rounds, seconds, self._live.console.width)
        self._live.update(table, refresh=True)


class PlainView:
    """One line for each event, and for each peer now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, tuple[int, bool]] = {}

    def __enter__(self) -> PlainView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def tell(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, statuses: Sequence[Status], rounds: int, seconds: float) -> None:
        for status in statuses:
            progress = (status.round // ROUNDS_PER_LINE, status.state.is_final)
            if status.round and self._shown.get(status.name) != progress:
                self._shown[status.name] = progress
                self.tell(f"{seconds:5.1f} s  {describe(status, rounds)}")


def describe(status: Status, rounds: int) -> str:
    """A peer's status in one line."""
    return (
        f"{status.name}: round {status.round}/{rounds}, {status.state.value}, group {status.group}, "
        f"loss {_number(status.loss)}, accuracy {_percent(status.accuracy)}, {_bytes(status.nbytes)}, "
        f"{status.seconds:.2f} s"
    )


COLUMNS = ("peer", "state", "digits", "round", "group", "loss", "accuracy", "bytes", "sec.")
ROOM = {"bytes": 78, "loss": 69, "digits": 62}
"""Columns that are left out of terminals with fewer characters in a line, rather than that any is cut."""


def render_statuses(statuses: Sequence[Status], rounds: int, seconds: float, width: int = 80) -> Table:
    """``seconds``: since the start of the demo; those of each peer: for its last average.

    :param width: of the terminal, in characters
    """
    furthest = max((status.round for status in statuses), default=0)
    table = Table(
        title=f"{seconds:.0f} s, round {furthest} of {rounds}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    shown = [name for name in COLUMNS if width >= ROOM.get(name, 0)]
    for name in shown:
        is_text = name in ("peer", "state", "digits")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    for status in statuses:
        cells = _cells(status)
        table.add_row(*(cells[name] for name in shown))
    return table


def _cells(status: Status) -> dict[str, str]:
    return {
        "peer": status.name,
        "state": f"[{_STYLES.get(status.state, 'dim')}]{status.state.value}[/]",
        "digits": "".join(str(label) for label in status.classes),
        "round": str(status.round),
        "group": str(status.group or "-"),
        "loss": _number(status.loss),
        "accuracy": _percent(status.accuracy),
        "bytes": _bytes(status.nbytes),
        "sec.": f"{status.seconds:.2f}" if status.round else "-",
    }


def render_outcome(outcome: Outcome) -> Table:
    """Accuracies at the end, and the swarm's distance from central training."""
    table = Table(title="Accuracy on held-out images", title_justify="left")
    table.add_column("trained", no_wrap=True)
    table.add_column("accuracy", justify="right", no_wrap=True)
    for name, accuracy in outcome.alone.items():
        table.add_row(name, _percent(accuracy))
    table.add_section()
    for name, accuracy in outcome.swarm.items():
        table.add_row(f"swarm: {name}", _percent(accuracy))
    table.add_row("swarm: mean", _percent(outcome.swarm_mean), style="bold")
    table.add_section()
    table.add_row("central, on all images", _percent(outcome.central), style="bold")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.1f} %"


def _bytes(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    return f"{count / 1e3:.1f} kB" if count < 1_000_000 else f"{count / 1e6:.1f} MB"
