"""The environment of hivemind: it needs packages that Shoal's does not have, so it gets one of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "hivemind"
PYTHON = FOLDER / "bin" / "python"
COMPLETE = FOLDER / "complete"
"""A file that says what is installed, once all of it is: what was interrupted, or is older, is made anew."""
PACKAGES = ("hivemind==1.1.12", "psutil", "numpy", "scikit-learn")
_CONTENT = "\n".join(PACKAGES)


class CannotInstall(Exception):
    """The environment could not be made; the message says why."""


def existing() -> str | None:
    """The interpreter of the environment that an earlier run has made."""
    return str(PYTHON) if COMPLETE.exists() and COMPLETE.read_text() == _CONTENT else None


def check(python: str) -> str:
    """The same interpreter, if it has what the workers need.

    :raises CannotInstall: it has not
    """
    try:
        found = subprocess.run(
            [python, "-c", "import hivemind, psutil, sklearn, torch"],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
    except OSError as error:
        raise CannotInstall(f"{python} cannot be run: {error.strerror}") from error
    if found.returncode != 0:
        last = found.stderr.strip().splitlines()[-1:]
        raise CannotInstall(f"{python} cannot import hivemind, psutil, sklearn and torch: {''.join(last)}")
    return python


def make(tell: Callable[[str], None]) -> str:
    """Install hivemind into :data:`FOLDER`, which takes minutes, and return its interpreter.

    The same torch as Shoal's comes first, since hivemind's own choice of it would be a matter of luck.

    :param tell: gets lines on how far it is
    :raises CannotInstall: a step failed, as without a package index
    """
    pip = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    steps: list[tuple[str, list[str]]] = [
        ("making the environment", [sys.executable, "-m", "venv", "--clear", str(FOLDER)]),
        ("installing torch", [*pip, "-c", str(ROOT / "constraints.txt"), "torch"]),
        (f"installing {PACKAGES[0]}", [*pip, "-c", str(torch_pin()), *PACKAGES]),
    ]
    for number, (title, command) in enumerate(steps, 1):
        tell(f"hivemind's environment in {FOLDER.relative_to(ROOT)}, {number} of {len(steps)}: {title}")
        run(command, tell)
    check(str(PYTHON))
    COMPLETE.write_text(_CONTENT)
    return str(PYTHON)


def torch_pin() -> Path:
    """Constraints that hold the installed torch only: hivemind needs other versions of the rest."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    path = FOLDER.with_suffix(".constraints.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines if line.startswith("torch==")))
    return path


def run(command: Sequence[str], tell: Callable[[str], None]) -> None:
    """Run one step, and pass on what it says."""
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = line.strip() or last
            if line.startswith(("Collecting", "Downloading", "Building", "Installing", "Successfully")):
                tell(f"  {line.strip()[:100]}")
    if process.returncode != 0:
        raise CannotInstall(f"{' '.join(command[1:4])} failed: {last}")
