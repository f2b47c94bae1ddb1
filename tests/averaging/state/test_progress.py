"""The bar of a download: in a notebook a line of text, since rich's bar shows nothing there without ipywidgets."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.averaging.state.progress import ProgressBar, draw


def test_a_notebook_gets_a_line_that_overwrites_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    bar = ProgressBar("run")
    bar.update("12D3KooWabcdefgh", 12_000_000, 48_000_000)
    bar.complete("12D3KooWabcdefgh", 48_000_000)
    bar.stop()
    bar.update("late", 1, 2)
    printed = capsys.readouterr()
    assert printed.out == ""
    _, first, last = printed.err.split("\r")
    assert first.startswith("state from abcdefgh [#######.......................] 12 MB of 48 MB")
    assert last.startswith("state from abcdefgh [##############################] 48 MB of 48 MB")
    assert last.endswith("\n")
    assert "ipywidgets" not in printed.err


def test_a_file_gets_the_last_state_of_the_bar(capsys: pytest.CaptureFixture[str]):
    bar = ProgressBar("run")
    bar.update("12D3KooWabcdefgh", 12_000_000, 48_000_000)
    bar.complete("12D3KooWabcdefgh", 48_000_000)
    assert "state from abcdefgh" in capsys.readouterr().err


def test_a_bar_of_text_tells_size_and_rate():
    assert (
        draw("state", 5_000_000, 10_000_000, 2.0)
        == "state [###############...............] 5 MB of 10 MB, 2.5 MB/s"
    )
    assert draw("state", 0, 0, 0.0) == "state [##############################] 0 bytes of 0 bytes"


@pytest.mark.filterwarnings("ignore")  # of Jupyter's own packages
def test_a_kernel_without_ipywidgets_shows_the_bar_and_a_table(tmp_path: Path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    bar = "from shoal.averaging.state.progress import ProgressBar; bar = ProgressBar('run')"
    cells = [
        "import sys; sys.modules['ipywidgets'] = None",
        f"{bar}; bar.update('abcdefgh', 5, 10); bar.complete('abcdefgh', 10)",
        "from shoal.averaging.report import Phases, StepReport\nStepReport(0, phases=Phases(search=1 / 3))",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=100, resources={"metadata": {"path": str(tmp_path)}}).execute()
    streamed = "".join(out["text"] for out in notebook.cells[1].outputs)
    assert "state from abcdefgh" in streamed
    assert "10 bytes of 10 bytes" in streamed
    assert "ipywidgets" not in streamed
    (shown,) = notebook.cells[2].outputs
    assert "<th>search</th><td>333 ms</td>" in shown["data"]["text/html"]
