"""The machine's list of congestion controls is changed for a while, and put back."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.network import laboratory
from benchmarks.network.laboratory import only_control


@pytest.fixture
def allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the place of the kernel's list."""
    path = tmp_path / "allowed"
    path.write_text("reno bbr\n")
    monkeypatch.setattr(laboratory, "ALLOWED", path)
    monkeypatch.setattr(laboratory, "MEMORY", tmp_path / "memory")
    return path


def test_only_one_control_is_allowed_for_a_while(allowed: Path):
    with only_control("cubic"):
        assert allowed.read_text() == "cubic"
    assert allowed.read_text() == "reno bbr\n"


def test_the_list_is_put_back_when_the_run_is_interrupted(allowed: Path):
    with pytest.raises(KeyboardInterrupt), only_control("cubic"):
        raise KeyboardInterrupt
    assert allowed.read_text() == "reno bbr\n"


def test_the_next_run_puts_back_what_a_killed_one_left(allowed: Path):
    allowed.write_text("bbr")
    laboratory.MEMORY.write_text("reno bbr\n")
    with only_control("cubic"):
        assert allowed.read_text() == "cubic"
    assert allowed.read_text() == "reno bbr\n"
