"""What the language model's scripts are made of: text, outer optimizer, model, settings, curves."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from pathlib import Path, PurePosixPath

import pytest
import torch

from data import even_windows, load_corpus, random_batch, split_of, unit_of
from diloco import OuterOptimizer
from evaluate import Point, reach, read_curve, tokens_at, write_curve
from model import ByteModel, bits_per_byte
from record import Record, read_log
from train import numbers_of
from training import LocalTrainer, Settings

PATHS = {
    "json/decoder.py": "json",
    "test/test_json/test_decode.py": "json",
    "test/test_json.py": "json",
    "test/json_tests.py": "json",
    "_json.py": "json",
    "argparse.py": "argparse",
    "test/__init__.py": "",
    "test.py": "test",
}


@pytest.mark.parametrize("path", PATHS)
def test_a_module_and_its_tests_are_one_unit(path: str):
    assert unit_of(PurePosixPath(path)) == (PATHS[path] or "init__")


@pytest.mark.parametrize("peers", [1, 2, 4, 7])
def test_units_are_dealt_by_their_names_alone_and_evenly(peers: int):
    units = [f"unit{index}" for index in range(5000)]
    splits = [split_of(unit, peers) for unit in units]
    assert splits == [split_of(unit, peers) for unit in units]
    held_out = splits.count(None)
    assert 0.03 < held_out / len(units) < 0.07
    for part in range(peers):
        assert splits.count(part) == pytest.approx((len(units) - held_out) / peers, rel=0.15)


def test_what_is_held_out_does_not_depend_on_the_number_of_peers():
    units = [f"unit{index}" for index in range(1000)]
    held_out = [{unit for unit in units if split_of(unit, peers) is None} for peers in (1, 4, 5)]
    assert held_out[0] == held_out[1] == held_out[2]


def make_library(folder: Path, modules: int = 60) -> dict[str, bytes]:
    """A folder like that of the standard library: a module in four is a package with tests."""
    texts = {}
    for index in range(modules):
        name = f"module{index}"
        paths = [f"{name}/__init__.py", f"test/test_{name}.py"] if index % 4 == 0 else [f"{name}.py"]
        for path in paths:
            texts[path] = hashlib.sha256(path.encode()).hexdigest().encode() * 20
    texts["site-packages/other.py"] = b"not of the library"
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(text)
    return texts


def test_every_file_is_in_one_split_with_all_of_its_unit(tmp_path: Path):
    texts = make_library(tmp_path)
    corpus = load_corpus(3, tmp_path)
    splits = {None: corpus.held_out, **dict(enumerate(corpus.parts))}
    contents = {split: bytes(text.tolist()) for split, text in splits.items()}
    for path, text in texts.items():
        found = [split for split, content in contents.items() if text in content]
        expected = [] if path.startswith("site-packages") else [split_of(unit_of(PurePosixPath(path)), 3)]
        assert found == expected
    assert sum(map(len, splits.values())) >= sum(map(len, texts.values())) - 18


def test_a_folder_with_too_little_text_is_an_error_that_names_what_is_missing(tmp_path: Path):
    (tmp_path / "one.py").write_text("pass\n")
    with pytest.raises(FileNotFoundError, match=r"too few Python files: there is none for"):
        load_corpus(4, tmp_path)


def test_batches_hold_each_byte_and_the_one_that_follows_it():
    text = torch.arange(200, dtype=torch.uint8)
    for inputs, following in (
        random_batch(text, 50, 16, torch.Generator().manual_seed(0)),
        even_windows(text, 50, 16),
    ):
        assert inputs.shape == following.shape == (50, 16)
        assert inputs.dtype == torch.int64
        assert torch.equal(following, inputs + 1)
        assert torch.equal(inputs[:, 1:], following[:, :-1])
    assert inputs[0, 0] == 0  # even windows begin with the text
    assert following[-1, -1] == 199  # and end with it


# The outer optimizer


def random_tensors(seed: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng) for shape in ((3, 4), (5,), ())]


def test_the_outer_step_is_that_of_torchs_sgd_with_nesterov_momentum():
    reference = [torch.nn.Parameter(tensor) for tensor in random_tensors(0)]
    sgd = torch.optim.SGD(reference, lr=0.7, momentum=0.9, nesterov=True)
    outer = OuterOptimizer(random_tensors(0), learning_rate=0.7, momentum=0.9)
    for seed in range(1, 6):
        gradients = random_tensors(seed)
        for parameter, gradient in zip(reference, gradients, strict=True):
            parameter.grad = gradient.clone()
        sgd.step()
        outer.step(gradients)
        assert all(torch.equal(a, b) for a, b in zip(gradients, random_tensors(seed), strict=True))
        for base, parameter in zip(outer.base, reference, strict=True):
            torch.testing.assert_close(base, parameter.detach())


def test_without_momentum_and_with_rate_one_the_base_becomes_the_mean_of_the_peers():
    outer = OuterOptimizer(random_tensors(0), learning_rate=1.0, momentum=0.0)
    peers = [random_tensors(1), random_tensors(2)]
    gradients = [[torch.empty_like(tensor) for tensor in outer.base] for _ in peers]
    for parameters, own in zip(peers, gradients, strict=True):
        outer.write_gradient(parameters, own)
    outer.step([(a + b) / 2 for a, b in zip(*gradients, strict=True)])
    for base, a, b in zip(outer.base, *peers, strict=True):
        torch.testing.assert_close(base, (a + b) / 2)


def test_a_peer_that_took_over_the_state_stays_equal():
    first = OuterOptimizer(random_tensors(0))
    first.step(random_tensors(1))
    second = OuterOptimizer(random_tensors(7))
    second.load_state([tensor.clone() for tensor in first.state])
    for outer in (first, second):
        outer.step(random_tensors(2))
    assert all(torch.equal(a, b) for a, b in zip(first.state, second.state, strict=True))
    parameters = random_tensors(9)
    second.copy_base_to(parameters)
    assert all(torch.equal(a, b) for a, b in zip(parameters, first.base, strict=True))


def test_local_steps_that_were_taken_while_gradients_were_averaged_are_kept():
    outer = OuterOptimizer(random_tensors(0))
    given, later = random_tensors(1), random_tensors(2)
    parameters = [a + b for a, b in zip(given, later, strict=True)]
    outer.step(random_tensors(3))
    outer.rebase(parameters, given)
    for parameter, base, change in zip(parameters, outer.base, later, strict=True):
        torch.testing.assert_close(parameter, base + change)


@pytest.mark.parametrize("state", [[], random_tensors(0), [*random_tensors(0), *random_tensors(0)[::-1]]])
def test_a_state_of_another_model_is_refused_and_changes_nothing(state: list[torch.Tensor]):
    outer = OuterOptimizer(random_tensors(0))
    with pytest.raises(ValueError, match="another model"):
        outer.load_state(state)
    assert all(torch.equal(a, b) for a, b in zip(outer.base, random_tensors(0), strict=True))


def test_the_base_is_a_copy_and_has_a_norm():
    parameters = random_tensors(0)
    outer = OuterOptimizer(parameters)
    parameters[0] += 1
    assert torch.equal(outer.base[0], random_tensors(0)[0])
    expected = torch.cat([tensor.flatten() for tensor in random_tensors(0)]).norm()
    assert outer.norm == pytest.approx(float(expected))


def test_what_groupmates_gather_is_read_with_care():
    gathered = [{"round": 3, "step": 9}, None, {"round": "7"}, {}, [5], {"round": 5}]
    assert numbers_of("round", gathered) == [3, 5]
    assert numbers_of("step", gathered) == [9]


# Model and training


def test_the_model_has_about_a_million_parameters():
    assert 0.8e6 < sum(parameter.numel() for parameter in ByteModel().parameters()) < 1.2e6


def test_the_model_sees_no_byte_before_its_time():
    model = ByteModel(hidden=8, embedding=8, table=64)
    text = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
    changed = text.clone()
    changed[:, 12] ^= 1
    before, after = model(text), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.equal(before[:, 12], after[:, 12])


def test_a_model_that_knows_nothing_needs_eight_bits_per_byte():
    model = ByteModel(hidden=8, embedding=8, table=64)
    torch.nn.init.zeros_(model.logits.weight)
    torch.nn.init.zeros_(model.logits.bias)
    text = torch.randint(256, (2000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert bits_per_byte(model, text, windows=100, length=32) == pytest.approx(8.0, abs=1e-5)


SMALL = Settings(steps=100, hidden=8, batch=4, length=16)


def test_training_learns_and_is_the_same_for_the_same_seed():
    text = torch.tensor(list(b"def f(x):\n    return x\n" * 40), dtype=torch.uint8)
    losses = []
    for seed in (1, 1, 2):
        trainer = LocalTrainer(text, SMALL, seed=seed)
        losses.append([trainer.train_step() for _ in range(40)])
    assert losses[0] == losses[1] != losses[2]
    assert losses[0][-1] < losses[0][0] / 2
    assert trainer.tokens == 40 * 4 * 16


def test_the_learning_rate_warms_up_with_the_peers_own_steps_and_decays_with_those_of_the_run():
    text = torch.zeros(100, dtype=torch.uint8)
    trainer = LocalTrainer(text, SMALL, seed=0)
    trainer.step = 50  # as a late joiner, whose AdamW is new
    rates = []
    for _ in range(50):
        trainer.train_step()
        rates.append(trainer._optimizer.param_groups[0]["lr"])
    assert rates[0] < SMALL.learning_rate / 40
    assert max(rates) < SMALL.learning_rate * 0.55
    assert rates[-1] == pytest.approx(SMALL.learning_rate * 0.05, rel=0.1)


def test_settings_travel_on_the_command_line():
    settings = Settings(peers=3, learning_rate=0.25, text="/some folder")
    parser = argparse.ArgumentParser()
    Settings.add_options(parser)
    assert Settings.from_options(parser.parse_args(settings.to_arguments())) == settings
    assert Settings.from_options(parser.parse_args([])) == Settings()
    with pytest.raises(ValueError, match="local_steps must be at least 1, got 0"):
        Settings(local_steps=0)


# Records and curves


def test_a_log_is_read_while_it_is_written(tmp_path: Path):
    assert list(read_log(tmp_path)) == []
    record = Record(tmp_path, started=0)
    record.write("ready", addresses=["a"])
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"event": "half a li')
    events = list(read_log(tmp_path))
    record.close()
    assert [event["event"] for event in events] == ["ready"]
    assert events[0]["seconds"] > 1e9


def test_tokens_are_those_of_all_peers_until_then():
    logs = [
        [{"seconds": 1.0, "tokens": 10}, {"seconds": 3.0, "tokens": 30}],
        [{"seconds": 0.5}, {"seconds": 2.0, "tokens": 5}],
        [{"seconds": 9.0, "tokens": 1000}],
    ]
    assert [tokens_at(logs, seconds) for seconds in (0.0, 1.0, 2.5, 3.0)] == [0, 10, 15, 35]


def test_when_a_curve_reaches_a_target_is_interpolated_and_the_first_peers():
    points = [
        Point("peer-0", 0, 0, 0.0, 8.0),
        Point("peer-1", 10, 5, 1.0, 1.0),
        Point("peer-0", 100, 10, 10.0, 4.0),
        Point("peer-0", 200, 20, 30.0, 2.0),
    ]
    assert reach(points, 5.0, "seconds") == pytest.approx(7.5)
    assert reach(points, 3.0, "step") == pytest.approx(150)
    assert reach(points, 2.0, "tokens") == pytest.approx(20)
    assert reach(points, 1.9, "seconds") is None


def test_a_curve_is_written_and_read(tmp_path: Path):
    points = [Point("peer-0", 1, 2, 3.5, 4.25), Point("peer-1", 5, 6, 7.5, 8.125)]
    write_curve(points, tmp_path / "curve.csv")
    assert read_curve(tmp_path / "curve.csv") == points


def test_curves_become_a_picture(tmp_path: Path):
    from plot import draw

    for name, scale in (("one", 1.0), ("two", 0.9)):
        (tmp_path / name).mkdir()
        points = [
            Point("peer-0", step, step, step / 10, scale * (2 + math.exp(-step / 100)))
            for step in range(0, 500, 50)
        ]
        write_curve(points, tmp_path / name / "curve.csv")
        events = [{"event": "killed", "step": 200}]
        (tmp_path / name / "run.json").write_text(json.dumps({"events": events}))
    for axis in ("step", "tokens", "seconds"):
        output = tmp_path / f"{axis}.png"
        draw([("one", tmp_path / "one"), ("two", tmp_path / "two")], axis, 3.0, "title", output)
        assert output.read_bytes().startswith(b"\x89PNG")
