"""The programs of docs/frameworks/transformers.md and accelerate.md run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = Path(__file__).parents[2] / "docs" / "frameworks"
PROGRAM = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def programs(page: str) -> list[str]:
    return PROGRAM.findall((PAGES / page).read_text())


def run(program: str, folder: Path, *arguments: str) -> str:
    script = folder / "train.py"
    script.write_text(program)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(script), *arguments]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=150)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout + ended.stderr


@pytest.mark.sweep
@pytest.mark.timeout(360)
def test_the_trainer_of_the_page_trains(tmp_path: Path):
    [program] = programs("transformers.md")
    output = run(program, tmp_path, "1")
    assert "'shoal/epoch': 20" in output
    assert "WARNING" not in re.sub(r".*no state was loaded.*", "", output)


@pytest.mark.sweep
@pytest.mark.timeout(360)
def test_the_optimizer_of_accelerate_s_page_trains(tmp_path: Path):
    with_optimizer, local_steps = programs("accelerate.md")
    run(with_optimizer, tmp_path)
    assert (tmp_path / "checkpoint" / "optimizer.bin").is_file()
    assert "found no group" in run(local_steps, tmp_path)
