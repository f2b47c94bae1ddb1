"""A report as Markdown. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from benchmarks.figures import FIGURES
from benchmarks.requirements import Requirement, Verdict
from benchmarks.results import Report, RowResult

QUICK: Final = (
    "**A quick run**: small work, few repetitions. It shows that things work, not how fast they are."
)
LEGEND: Final = (
    "Rates are sizes of one peer's tensors by the time from the trigger to the last result. CPU counts all processes "
    "of a peer, for each GB of its tensors. Figures are medians, with the least and the most in brackets; raw is the "
    "best number of connections."
)


def number(value: float, digits: int) -> str:
    """A number with so many significant digits, written out, with commas in thousands."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    decimals = max(0, digits - len(str(int(abs(rounded)))) + (abs(rounded) < 1))
    return f"{rounded:,.{decimals}f}"


def quantity(figure: str, value: float) -> str:
    """A figure with its unit."""
    one = FIGURES[figure]
    return f"{number(value, one.digits)} {one.unit}".rstrip()


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table in Markdown."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + " -- |" * len(header)
    for line in lines:
        yield "| " + " | ".join(line) + " |"


def markdown(report: Report, pictures: Sequence[str] = ()) -> str:
    """The whole report.

    :param pictures: names of files that stand beside it
    """
    parts = ["# Benchmarks"]
    if report.quick:
        parts.append(QUICK)
    if report.interrupted:
        parts.append("**Interrupted**: some rows are missing, or have few samples.")
    parts += ["\n".join(table(("", "machine"), list(report.machine.items()))), LEGEND]
    measured = [one for one in report.rows if one.samples]
    if measured:
        header = ("work", "figure", "Shoal", "hivemind", "others", "required")
        parts.append("\n".join(table(header, [line for one in measured for line in row_lines(one)])))
    parts += [f"![{name.rsplit('.', 1)[0]}]({name})" for name in pictures]
    proofs = [[one.row.title, sockets(one)] for one in report.rows if one.controls]
    if proofs:
        told = "sockets by congestion control, as getsockopt told at the end of a turn"
        parts.append("\n".join(table(("work", told), proofs)))
    left_out = list(remarks(report))
    if left_out:
        parts += ["## Left out, and what went wrong", "\n".join(left_out)]
    return "\n\n".join(parts) + "\n"


def row_lines(result: RowResult) -> Iterator[list[str]]:
    """A line for each figure, with the requirements that it has to meet."""
    first = True
    for figure in result.row.figures:
        shoal, hivemind = (cell(result, side, figure) for side in ("shoal", "hivemind"))
        others = "; ".join(
            f"{side} {cell(result, side, figure)}"
            for side in other_sides(result)
            if cell(result, side, figure)
        )
        if not (shoal or hivemind or others):
            continue
        required = "; ".join(
            judged(requirement, verdict)
            for requirement, verdict in zip(result.row.required, result.verdicts, strict=True)
            if requirement.figure == figure
        )
        yield [
            result.row.title if first else "",
            FIGURES[figure].title,
            shoal,
            with_ratio(result, hivemind, figure),
            others,
            required,
        ]
        first = False


def other_sides(result: RowResult) -> list[str]:
    """Those that are neither Shoal nor hivemind; the best raw one is marked by its place."""
    others = [side for side in result.samples if side not in ("shoal", "hivemind")]
    return sorted(others, key=lambda side: side != result.best_raw)


def cell(result: RowResult, side: str, figure: str) -> str:
    """The median of a side, and how far its samples lie apart; empty if it has none."""
    one = result.spreads.get(side, {}).get(figure)
    if one is None:
        return ""
    if one.count == 1:
        return quantity(figure, one.median)
    digits = FIGURES[figure].digits
    return f"{quantity(figure, one.median)} ({number(one.least, digits)} to {number(one.most, digits)})"


def with_ratio(result: RowResult, text: str, figure: str) -> str:
    """Hivemind's figure, and how many times it Shoal's is."""
    own, other = (result.medians.get(side, {}).get(figure) for side in ("shoal", "hivemind"))
    if own is None or not other:
        return text
    return f"{text}: {number(own / other, 3)} x"


def judged(requirement: Requirement, verdict: Verdict) -> str:
    """A requirement, and whether it is met."""
    if verdict.met is None or verdict.value is None:
        return f"{requirement.text}: not measured"
    has = "met" if verdict.met else "**missed**"
    if verdict.aim_met:
        has = "met, and the aim"
    return f"{requirement.text}: {number(verdict.value, 3)}, {has}"


def sockets(result: RowResult) -> str:
    """How many sockets of each side had which congestion control."""
    return "; ".join(
        f"{side}: " + ", ".join(f"{count} {control}" for control, count in sorted(found.items()))
        for side, found in result.controls.items()
    )


def remarks(report: Report) -> Iterator[str]:
    """What was left out, and what failed."""
    for one in report.rows:
        if one.skipped is not None:
            yield f"- {one.row.title}: left out: {one.skipped}"
        for note in one.notes:
            yield f"- {one.row.title}: {note}"
