"""One machine with several ranks is one peer: DDP models on real processes, and a plain peer beside them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import rank_worker
import torch
from rank_processes import RankProcesses
from real_swarm import Swarm, wait_until

import shoal

pytestmark = pytest.mark.xdist_group("averaging")


class Started:
    """Two processes that the tests share, in the swarm of this process; new ones after a test that has killed one."""

    def __init__(self, shared_dhts: list[shoal.DHT], log: Path) -> None:
        self._dht = Swarm(shared_dhts, "ranks").dht()
        self._log = log
        self._pair: RankProcesses | None = None

    def pair(self) -> RankProcesses:
        if self._pair is None or not self._pair.are_alive():
            self.close()
            self._pair = RankProcesses(2, self._log)
            self._pair.call("start", peers=[str(address) for address in self._dht.get_visible_maddrs()])
        return self._pair

    def close(self) -> None:
        if self._pair is not None:
            self._pair.close()


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, shared_dhts: list[shoal.DHT]) -> Iterator[Started]:
    with contextlib.closing(Started(shared_dhts, tmp_path_factory.mktemp("ranks") / "log.txt")) as made:
        yield made


@pytest.fixture
def ranks(started: Started) -> RankProcesses:
    return started.pair()


def plain_peer(dht: shoal.DHT, run_id: str, model: torch.nn.Module, mode: str, **options: Any) -> Any:
    """A peer of one process, made as the ranks make theirs."""
    settings = {**rank_worker.SETTINGS, **rank_worker.MODES[mode], **options}
    settings |= rank_worker.optimizer_of(model, mode)
    return shoal.Optimizer(dht=dht, run_id=run_id, extra_tensors=list(model.buffers()), **settings)


def test_two_ranks_are_as_one_process_with_both_batches(ranks: RankProcesses, swarm: Swarm):
    """Each step counts the samples of both, and all ranks are equal after each."""
    [one, other] = ranks.call("make", run_id=swarm.prefix)
    assert one == other, "the ranks began with models of their own, and were not made alike"
    [one, other] = ranks.call("train", epochs=3)
    assert one["digests"] == other["digests"]
    assert len(one["digests"]) == 3 * 32 // (2 * 4)
    assert one["reports"] == other["reports"]
    assert [report["local_samples"] for report in one["reports"]] == [32, 32, 32]

    model = torch.nn.Linear(4, 1, bias=False)
    torch.manual_seed(0)
    model.reset_parameters()
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(3):
        batches = [
            rank_worker.batch(step, rank) for step in range(4 * epoch, 4 * epoch + 4) for rank in (0, 1)
        ]
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        inner.zero_grad()
        (model(x) - y).square().mean().backward()
        inner.step()
    assert torch.allclose(torch.tensor(one["weights"][0]), model.weight.detach().flatten(), atol=1e-6)


def test_tensors_of_all_kinds_are_copied_from_rank_zero(ranks: RankProcesses):
    for equal in ranks.call("copy_tensors"):
        assert equal == [True] * 8


@pytest.mark.sweep
def test_errors_reach_all_ranks_and_leave_the_optimizer_usable(ranks: RankProcesses, swarm: Swarm):
    ranks.call("make", run_id=swarm.prefix)
    calls = "all ranks of a peer must make the same calls: rank 0 is in"
    for what, both in (
        (
            "other gradients",
            "gradients must be the same at all ranks of a peer, and rank 1 has others than rank 0",
        ),
        ("other calls", f"{calls} load_state_from_peers(), rank 1 in step()"),
        ("closure at one rank", f"{calls} step() with a closure, rank 1 in step()"),
        ("long timeout", "timeout must be at most load_state_timeout (10 s) with several ranks"),
    ):
        assert [both in said for said in ranks.call("fail", what=what)] == [True, True], what
    nothing, said = ranks.call("fail", what="tracker")
    assert nothing == ""
    assert "tracker.global_progress must be asked for at rank 0" in said
    [one, other] = ranks.call("push", value=1.0)
    assert one["digest"] == other["digest"]
    first, second = ranks.call("fail", what="rank 0 fails")
    assert first == "InvalidStateError: the averager of gradients has ended: make another optimizer"
    assert second == f"RankError: rank 0 failed in step(): {first}"


@pytest.mark.parametrize(
    ("what", "rank", "message"),
    [
        ("no dht", 0, "InvalidTypeError: dht must be a shoal.DHT at rank 0 of 2"),
        ("two talk", 1, "InvalidValueError: dht must be None at rank 1 of 2"),
    ],
)
def test_an_error_in_one_constructor_is_one_in_all(
    ranks: RankProcesses, swarm: Swarm, what: str, rank: int, message: str
):
    said = ranks.call("make_wrong", run_id=swarm.prefix, what=what)
    assert said[rank].startswith(message)
    assert said[1 - rank].startswith(
        f"RankError: rank {rank} failed in the constructor of shoal.Optimizer: {message}"
    )


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "other target",
            "target_batch_size must be the same at all ranks, got 32 at rank 0 and 33 at rank 1",
        ),
        ("auxiliary", "auxiliary must be False with several ranks"),
    ],
)
def test_what_makes_no_sense_for_ranks_is_named(ranks: RankProcesses, swarm: Swarm, what: str, message: str):
    assert all(message in said for said in ranks.call("make_wrong", run_id=swarm.prefix, what=what))


@pytest.mark.sweep
def test_a_checkpoint_of_all_ranks_and_one_of_rank_zero_are_loaded(ranks: RankProcesses, swarm: Swarm):
    """Rank 0's state has the momentum; another rank's says that it has none."""
    ranks.call("make", run_id=swarm.prefix)
    one, other = ranks.call("checkpoint")
    assert one["keys"] == ["0", "local_epoch"]
    assert other["keys"] == ["local_epoch", "rank"]
    assert "state_dict must be that of rank 0, got that of rank 1" in one["refused"]
    for how in ("own", "rank 0's"):
        assert one[how] == other[how] == one["before"] != one["moved"]
        assert one[f"after {how}"] == other[f"after {how}"]
    assert one["after own"] == one["after rank 0's"] != one["before"]


@pytest.mark.parametrize(
    ("mode", "closure", "scaler"),
    [
        ("both delays", True, False),
        *(
            pytest.param(mode, closure, scaler, marks=pytest.mark.sweep)
            for mode, closure, scaler in (
                ("synchronous", True, False),
                ("delayed state", False, True),
                ("local", False, False),
                ("local", True, True),
                ("local, in place", False, False),
                ("local, offloaded", True, False),
                ("offloaded", False, False),
                ("delayed step", False, False),
                ("both delays", False, False),
                ("reused buffers", False, True),
                ("wait", False, False),
            )
        ),
    ],
)
def test_ranks_stay_equal_in_a_swarm(
    ranks: RankProcesses, swarm: Swarm, mode: str, closure: bool, scaler: bool
):
    """A plain peer trains with them; after each step both ranks have the same weights, rates and epoch."""
    made = ranks.call("make", run_id=swarm.prefix, mode=mode, kind="net")
    assert made[0] == made[1]
    model = rank_worker.Net()
    # The ranks end first, and a plain peer that waits for a group would wait for ever then.
    opt = plain_peer(swarm.dht(), swarm.prefix, model, mode, after_failed_round="local")
    try:
        assert opt.load_state_from_peers()
        ranks.begin("train", epochs=2, peers=2, closure=closure, scaler=scaler, pause=0.05)
        with ThreadPoolExecutor(1) as pool:
            trained = pool.submit(ranks.end)
            while not trained.done():
                x, y = rank_worker.batch(opt.local_epoch, 2)  # of no rank
                if not opt.options.reuse_grad_buffers:
                    opt.zero_grad()
                (model(x) - y).square().mean().backward()
                opt.step()
                threading.Event().wait(0.05)
            one, other = trained.result()
    finally:
        opt.shutdown()
    assert one["digests"] == other["digests"]
    assert one["reports"] == other["reports"]
    assert [report["peers"] for report in one["reports"]].count(2) == 2


@pytest.mark.sweep
def test_ranks_and_a_plain_peer_take_the_mean_over_all_their_samples(ranks: RankProcesses, swarm: Swarm):
    """Gradients of 1 and 3 at the ranks and of 5 at the other peer weigh by samples; all update alike."""
    options: dict[str, Any] = {"after_failed_round": "wait", "average_state_every": 100}
    ranks.call("make", run_id=swarm.prefix, **options)
    model = torch.nn.Linear(4, 1, bias=False)
    opt = plain_peer(swarm.dht(), swarm.prefix, model, "synchronous", **options)
    try:
        assert opt.load_state_from_peers()
        before = model.weight.detach().clone()
        ranks.begin("push_until", epoch=1, values=[1.0, 3.0])
        while opt.local_epoch < 1:
            model.weight.grad = torch.full((1, 4), 5.0)
            opt.step()
            threading.Event().wait(0.05)
        one, other = ranks.end()
    finally:
        opt.shutdown()
    assert one["digest"] == other["digest"]
    assert torch.equal(torch.tensor(one["weights"][0]), model.weight.detach().flatten())
    assert opt.report.gradients == one["report"]["gradients"] == "averaged"
    theirs, own = one["report"]["local_samples"], opt.report.local_samples
    mean = (2.0 * theirs + 5.0 * own) / (theirs + own)
    assert torch.allclose(model.weight.detach(), before - 0.05 * mean, atol=1e-5)


@pytest.mark.sweep
def test_each_rank_can_be_a_peer_of_its_own(swarm: Swarm, ranks: RankProcesses):
    """With a process group of itself alone."""
    told, _ = ranks.call("make_alone", run_id=swarm.prefix)
    assert told["epoch"] == 1
    assert told["report"]["local_samples"] == 4


@pytest.mark.sweep
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_takes_its_peer_out_and_not_the_swarm(
    ranks: RankProcesses, swarm: Swarm, killed: int
):
    """The other rank says so at once; the plain peer trains on by itself."""
    ranks.call("make", run_id=swarm.prefix)
    ranks.call("push_until", epoch=1, values=[1.0, 3.0])
    model = torch.nn.Linear(4, 1, bias=False)
    opt = plain_peer(swarm.dht(), swarm.prefix, model, "synchronous", averaging_timeout=3.0)
    try:
        assert opt.load_state_from_peers()
        survivor = 1 - killed
        ranks.begin("step_alone", ranks=[survivor])
        ranks.kill(killed)
        [said] = ranks.end(ranks=[survivor])
        assert said["error"].startswith("another rank of this peer is gone, has shut down its optimizer")
        assert said["seconds"] < 15
        assert not said["alive"]
        while opt.local_epoch < 3:
            model.weight.grad = torch.ones(1, 4)
            opt.step()
        wait_until(lambda: opt.tracker.global_progress.num_peers == 1)
    finally:
        opt.shutdown()
