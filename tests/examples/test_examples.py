"""Each example, in processes of its own, in a short form."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import psutil
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def address_in(line: str) -> str:
    found = re.search(r"/ip4/\S+", line)
    assert found is not None, line
    return found[0]


def accuracy_in(line: str) -> float:
    found = re.search(r"reads ([\d.]+)%", line)
    assert found is not None, line
    return float(found[1])


@pytest.mark.sweep
def test_two_machines_that_know_half_of_the_digits_each_know_all_of_them_together(scripts):
    script = EXAMPLES / "two_machines.py"
    first = scripts.start(script, "first", "--rounds", 2)
    address = address_in(first.wait_for_line("two_machines.py second /ip4/"))
    second = scripts.start(script, "second", address, "--rounds", 2)
    assert [first.finish(), second.finish()] == [0, 0]
    for machine in (first, second):
        before, after = re.findall(r"(\d+)%", machine.wait_for_line("round 2"))
        assert int(before) < 55 < 70 < int(after)
        assert "Traceback" not in machine.output


@pytest.mark.sweep
def test_peers_average_every_n_steps_and_a_client_that_nobody_can_dial_takes_part(scripts):
    peer = scripts.start(EXAMPLES / "average_every_n_steps.py", "--seed", 0, "--every", 20)
    address = address_in(peer.wait_for_line("--join"))
    client = scripts.start(EXAMPLES / "client_mode.py", address, "--seed", 1, "--every", 20, "--steps", 40)
    assert client.finish() == 0
    assert client.output.count("averaged by 2 peers") == 2
    peer.wait_for_line("averaged by 2 peers")
    # and whoever is left can be stopped with Ctrl+C: it says so, and ends all that it has started
    peer.process.send_signal(signal.SIGINT)
    assert peer.finish() == 130
    assert peer.output.endswith("stopped\n")
    assert "Traceback" not in peer.output


@pytest.mark.sweep
def test_a_late_joiner_begins_with_the_state_of_another_peer(scripts):
    script = EXAMPLES / "late_joiner.py"
    steps = ("--every", 20, "--pause", 0.01, "--steps", 100_000)  # longer than the test
    first = scripts.start(script, *steps)
    address = address_in(first.wait_for_line("--join"))
    newcomer = scripts.start(script, "--join", address, *steps)
    line = newcomer.wait_for_line("downloaded the state of step")
    step = int(re.findall(r"step (\d+)", line)[0])
    assert step > 20
    assert accuracy_in(line) > 60  # it has not learnt anything by itself yet; ten digits: chance is 10 %
    averaged = newcomer.wait_for_line("averaged by 2 peers")
    assert int(re.findall(r"step (\d+)", averaged)[0]) > step


@pytest.mark.sweep
@pytest.mark.timeout(360)
def test_trainers_of_hugging_face_are_peers_and_a_checkpoint_goes_on(scripts, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script = EXAMPLES / "hugging_face.py"
    first = scripts.start(script, "--folder", "first", "--seed", 1, "--epochs", 1000)
    address = address_in(first.wait_for_line("--join"))
    second = scripts.start(script, "--join", address, "--folder", "second", "--seed", 2, "--epochs", 1000)
    second.wait_for_line("'eval_loss'", 120)
    second.wait_for_line("'epoch': '1.667'", 120)  # after the checkpoint was written
    second.wait_for_line("'shoal/averaged': 2", 120)
    second.process.send_signal(signal.SIGINT)
    assert second.finish() == 130
    assert "Traceback" not in second.output
    resumed = scripts.start(
        script, "--join", address, "--folder", "second", "--seed", 2, "--epochs", 1000, "--resume"
    )
    line = resumed.wait_for_line("'shoal/averaged': 1", 120)
    assert int(re.findall(r"'shoal/epoch': (\d+)", line)[0]) > 2


@pytest.mark.sweep
@pytest.mark.timeout(360)
def test_peers_with_accelerate_average_every_n_steps(scripts):
    script = EXAMPLES / "accelerate_local_sgd.py"
    first = scripts.start(script, "--every", 40, "--steps", 1000)
    address = address_in(first.wait_for_line("--join"))
    second = scripts.start(script, "--join", address, "--seed", 1, "--every", 40, "--steps", 120)
    assert second.finish(120) == 0
    assert second.output.count(": averaged, reads") == 3
    assert accuracy_in(second.wait_for_line("step 120: ")) > 60
    first.process.send_signal(signal.SIGINT)
    assert first.finish() == 130
    assert "Traceback" not in first.output


@pytest.mark.sweep
@pytest.mark.timeout(240)
def test_trainers_of_lightning_are_peers_and_a_checkpoint_of_lightning_goes_on(scripts, tmp_path):
    script = EXAMPLES / "lightning_digits.py"
    first = scripts.start(script, "--folder", "first", "--epochs", 1000)
    address = address_in(first.wait_for_line("SHOAL_INITIAL_PEERS="))
    second = scripts.start(script, address, "--folder", "second", "--epochs", 1000)
    second.wait_for_line("gradients averaged")
    second.wait_for_line("of the test images")  # after the first checkpoint
    [saved] = tmp_path.glob("second/*.ckpt")
    second.process.send_signal(signal.SIGINT)
    assert second.finish() == 1  # as Lightning ends
    assert "Traceback" not in second.output
    resumed = scripts.start(script, address, "--folder", "second", "--epochs", 1000, "--resume", saved)
    line = resumed.wait_for_line("gradients averaged")
    assert int(re.findall(r"epoch (\d+)", line)[0]) > 2
    first.process.send_signal(signal.SIGINT)
    assert first.finish() == 1


@pytest.mark.sweep
@pytest.mark.timeout(300)  # four processes import torch
def test_two_machines_with_two_ranks_each_train_one_model(scripts):
    """Under torchrun. A rank that is killed takes its machine out, and the other one goes on."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    program = (*torchrun, EXAMPLES / "several_ranks.py", "--pause", 0.05, "--target", 512)
    first = scripts.start(*program, "--epochs", 1000)  # longer than the test
    address = address_in(first.wait_for_line("--join", 100))
    second = scripts.start(*program, "--epochs", 1000, "--join", address)
    second.wait_for_line("2 peers", 100)
    ranks = [
        child
        for child in psutil.Process(second.process.pid).children()
        if "several_ranks" in str(child.cmdline())
    ]
    assert len(ranks) == 2
    [last] = [rank for rank in ranks if rank.environ()["LOCAL_RANK"] == "1"]
    last.kill()
    assert second.finish() == 1
    reached = int(re.findall(r"epoch (\d+):", first.output)[-1])
    first.wait_for_line(f"epoch {reached + 2}:", 100)
    first.process.send_signal(signal.SIGINT)
    first.finish()
    assert first.output.count("stopped\n") == 2


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_is_tested_here(script):
    assert f'"{script.name}"' in Path(__file__).read_text()
