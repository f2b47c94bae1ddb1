"""A Trainer of two processes, as torchrun starts them, is one peer of a swarm."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("trainer_worker.py")
RATE, ROWS = 0.1, 18

pytestmark = [pytest.mark.sweep, pytest.mark.xdist_group("transformers")]


def train(options: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """What both ranks have in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with contextlib.ExitStack() as running:
        processes = []
        for rank in ("0", "1"):
            environment = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(
                [sys.executable, str(WORKER), json.dumps(options), str(folder)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True,
            )  # fmt: skip
            running.enter_context(process)
            running.callback(process.kill)
            processes.append(process)
        ended = [process.communicate(timeout=110) for process in processes]
    for process, (_, errors) in zip(processes, ended, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in ended]


def after(updates: int, weight: list[list[float]], bias: float) -> torch.Tensor:
    """The weights after so many updates of one process by all rows."""
    plain = torch.nn.Linear(3, 1)
    with torch.no_grad():
        plain.weight.copy_(torch.tensor(weight))
        plain.bias.fill_(bias)
    x = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0))
    for _ in range(updates):
        plain.zero_grad()
        (plain(x) - x.sum(1, keepdim=True)).square().mean().backward()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= RATE * parameter.grad
    return plain.weight.detach()


@pytest.mark.parametrize("options", [{}, {"delay_optimizer_step": True}], ids=["plain", "delayed"])
def test_two_processes_train_as_one_with_all_rows(options: dict[str, Any], tmp_path: Path):
    """Both are equal, at each save, too, where delayed work has ended at both; rank 0 logs for both."""
    one, other = train(options, tmp_path)
    assert one["first"] != other["first"]
    assert one["saved"] == other["saved"]
    assert len(one["saved"]) == one["epoch"] == other["epoch"] == 3
    for updates, saved in enumerate(one["saved"], 1):
        assert torch.allclose(torch.tensor(saved), after(updates, one["first"], one["first_bias"]), atol=1e-5)
    assert {entry.get("shoal/local_samples", ROWS) for entry in one["logs"]} == {ROWS}
    assert one["logs"][-1]["shoal/epoch"] == 3
    assert other["logs"] == []


def test_a_model_that_diverges_goes_back_at_both(tmp_path: Path):
    one, other = train({"spoiled_at": 4}, tmp_path)
    assert one["saved"] == other["saved"]
    assert one["saved"][1] == one["saved"][0], "the backup is the one of the first epoch"
    assert one["weights"] == other["weights"] != one["saved"][0]


def test_an_optimizer_of_one_process_is_an_error_that_says_how_to_make_it(tmp_path: Path):
    for said in train({"alone": True}, tmp_path):
        assert (
            "shoal.Optimizer must be made by all 2 processes of the Trainer as one peer, got 1"
            in said["error"]
        )
