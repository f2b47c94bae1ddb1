"""README.md and the pages of docs: what they point to is there, and they stay as wide as they should be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from benchmarks.command import app

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
COLUMNS = 88
LINES_OF_README = 100
BYTES_OF_PICTURE = 120_000
FENCE = re.compile(r"^( *)```.*?^\1```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return FENCE.sub("", page.read_text())


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """The files in the repository that a page points to, each with the heading in it ("" for none)."""
    for target in LINK.findall(prose(page)):
        if "://" not in target:
            path, _, heading = target.partition("#")
            yield (page.parent / path).resolve() if path else page, heading


def anchors(page: Path) -> set[str]:
    """The headings of a page, as GitHub names them in links."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path):
    for target, heading in links(page):
        assert target.exists(), target
        assert not heading or heading in anchors(target), f"{name(target)} has no heading #{heading}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_break_at_88_columns(page: Path):
    """Tables, programs and output aside, and addresses of links, which cannot be broken."""
    lines = [line for line in prose(page).splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(re.sub(r"\(https?://\S+\)", "", line)) > COLUMNS] == []


def test_every_page_is_found_from_the_front_page():
    found, ahead = {README}, [README]
    while ahead:
        for target, _ in links(ahead.pop()):
            if target.suffix == ".md" and target not in found:
                found.add(target)
                ahead.append(target)
    assert {page.name for page in PAGES if page not in found} == set()


def test_the_front_page_stays_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= LINES_OF_README
    assert [line for line in lines if len(line) > COLUMNS] == []


def test_the_front_page_has_a_small_picture_that_can_be_drawn_again():
    [picture] = [target for target, _ in links(README) if target.suffix == ".png"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size < BYTES_OF_PICTURE
    [script] = re.findall(r"`python (docs/\S+)`", README.read_text())
    assert (ROOT / script).with_suffix(".png") == picture
    assert (ROOT / script).is_file()


def test_the_commands_of_the_front_page_are_targets_of_make():
    commands = re.findall(r"^make (\w+)", README.read_text(), flags=re.MULTILINE)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert commands == ["demo", "test"]
    assert set(commands) <= set(targets)


def figures(page: Path) -> set[str]:
    """Every figure with a unit."""
    return set(re.findall(r"[\d,.]*\d (?:MB/s|MB|s|ms)\b", page.read_text()))


def test_the_figures_of_the_front_page_are_those_of_the_page_on_performance():
    shown = figures(README)
    assert len(shown) >= 8
    assert shown <= figures(ROOT / "docs" / "performance.md")


def test_the_commands_that_measure_are_targets_of_make_and_have_these_options():
    page = (ROOT / "docs" / "performance.md").read_text()
    commands = re.findall(r"^make (\S+)$", page, flags=re.MULTILINE)
    targets = re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert commands == ["bench-quick", "bench"]
    assert set(commands) <= set(targets)
    told = set(re.findall(r"^\| `(--[\w-]+)", page, flags=re.MULTILINE))
    options = {option for parameter in typer.main.get_command(app).params for option in parameter.opts}
    assert told == options - {"--quick"}
