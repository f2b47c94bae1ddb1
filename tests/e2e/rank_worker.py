"""One rank of a peer: ``python rank_worker.py`` with torchrun's environment, and orders from its standard input.

An order is a line of JSON: the name of a function below, and its arguments. Its answer is such a line, too.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shoal
from shoal.optim.ranks.group import GlooGroup

RANK = int(os.environ.get("RANK", 0))  # tests import this module, too
SETTINGS: dict[str, Any] = {
    "target_batch_size": 32,
    "batch_size_per_step": 4,
    "matchmaking_time": 1.0,
    "averaging_timeout": 10.0,
    "load_state_timeout": 10.0,
    "averager_opts": {"request_timeout": 0.5},
    "tracker_opts": {"min_refresh_period": 0.1, "max_refresh_period": 0.5},
}
MODES: dict[str, dict[str, Any]] = {
    "synchronous": {"delay_state_averaging": False},
    "delayed state": {},
    "local": {"use_local_updates": True},
    "local, in place": {"use_local_updates": True, "delay_state_averaging": False},
    "local, offloaded": {"use_local_updates": True, "offload_optimizer": True},
    "offloaded": {"offload_optimizer": True},
    "delayed step": {"delay_optimizer_step": True},
    "both delays": {"delay_grad_averaging": True},
    "reused buffers": {"reuse_grad_buffers": True},
    "wait": {"after_failed_round": "wait"},
}
FACTORIES = {"offloaded", "delayed step", "both delays", "local, offloaded"}
"""Modes whose optimizer must be a callable; the others get an instance."""


class Story:
    """The DHT and the optimizer of one test, at one rank."""

    def __init__(self) -> None:
        self.dht: shoal.DHT | None = None
        self.opt: Any = None
        self.model: Any = None

    def close(self) -> None:
        if self.opt is not None:
            self.opt.shutdown()
        self.opt = None


STORY = Story()


class Net(nn.Module):
    """One weight for each of four inputs, with statistics that are averaged, too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.outer = nn.Linear(3, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.norm(self.inner(x)).relu())


def start(peers: list[str]) -> list[str]:
    """Make a DHT at rank 0."""
    if RANK == 0:
        STORY.dht = shoal.DHT(initial_peers=peers, start=True)
        return [str(address) for address in STORY.dht.get_visible_maddrs()]
    return []


def make(run_id: str, mode: str = "synchronous", kind: str = "linear", **options: Any) -> dict[str, Any]:
    """Make the optimizer of a DDP model."""
    STORY.close()
    torch.manual_seed(RANK)  # DDP and the optimizer make all ranks as rank 0 is
    plain: nn.Module = nn.Linear(4, 1, bias=False) if kind == "linear" else Net()
    bucket_view = mode == "reused buffers"
    STORY.model = DistributedDataParallel(plain, gradient_as_bucket_view=bucket_view)
    settings = {**SETTINGS, **MODES[mode], **options}
    settings.setdefault("extra_tensors", list(plain.buffers()) if kind == "net" else [])
    settings |= optimizer_of(STORY.model, mode)
    STORY.opt = shoal.Optimizer(dht=STORY.dht, run_id=run_id, **settings)
    return {"epoch": STORY.opt.local_epoch, "digest": digest()}


def optimizer_of(model: nn.Module, mode: str) -> dict[str, Any]:
    """The options of an optimizer that say what it works on, and how."""
    if mode in FACTORIES:
        return {
            "optimizer": lambda groups: torch.optim.Adam(groups, lr=0.05),
            "scheduler": lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1, 0.9),
            "params": list(model.parameters()),
        }
    return {"optimizer": torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)}


def digest() -> str:
    """Of all that must be the same at all ranks after a step."""
    sha = hashlib.sha256()
    for tensor in STORY.model.parameters():
        sha.update(tensor.detach().numpy().tobytes())
    group = STORY.opt.param_groups[0]
    return f"{sha.hexdigest()[:12]} lr {group['lr']!r} epoch {STORY.opt.local_epoch}"


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(4, 4, generator=generator)
    return x, x.sum(1, keepdim=True)


def train(
    epochs: int, peers: int = 1, closure: bool = False, scaler: bool = False, pause: float = 0.0
) -> dict[str, Any]:
    """Train for so many epochs of so many peers; the digests after each step, and all reports."""
    opt, model, digests, reports = STORY.opt, STORY.model, [], []
    kind = shoal.GradScaler if opt.options.reuse_grad_buffers else torch.amp.GradScaler
    scale = kind("cpu", init_scale=4.0) if scaler else None
    clock = threading.Event()
    for step in range(400):
        if sum(report["peers"] == peers for report in reports) >= epochs:
            break
        x, y = batch(step, RANK)

        def compute(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            if not opt.options.reuse_grad_buffers:
                opt.zero_grad()
            loss = (model(x) - y).square().mean()
            (scale.scale(loss) if scale is not None else loss).backward()
            return loss

        before = opt.local_epoch
        if closure:
            opt.step(compute, grad_scaler=scale)
        else:
            compute()
            opt.step(grad_scaler=scale)
        if scale is not None:
            scale.update()
        digests.append(digest())
        if opt.local_epoch > before and opt.report is not None:
            reports.append(opt.report.to_dict())
        clock.wait(pause)
    return {"digests": digests, "reports": reports, "weights": weights()}


def weights() -> list[list[float]]:
    return [parameter.detach().flatten().tolist() for parameter in STORY.model.parameters()]


def push(value: float, times: int = 1) -> dict[str, Any]:
    """Steps with a gradient of ``value`` at this rank, whatever the weights are."""
    for _ in range(times):
        STORY.opt.zero_grad()
        (STORY.model(torch.ones(1, 4)) * value).sum().backward()
        STORY.opt.step()
    return told()


def told() -> dict[str, Any]:
    report = STORY.opt.report
    return {
        "digest": digest(),
        "weights": weights(),
        "epoch": STORY.opt.local_epoch,
        "report": None if report is None else report.to_dict(),
    }


def push_until(epoch: int, values: list[float]) -> dict[str, Any]:
    """Steps with the rank's own one of these gradients until the epoch."""
    clock = threading.Event()
    while STORY.opt.local_epoch < epoch:
        push(values[RANK])
        clock.wait(0.05)
    return told()


def step_alone() -> dict[str, Any]:
    """A step to which the other rank never comes."""
    began = time.monotonic()
    try:
        STORY.opt.step()
    except shoal.RankError as e:
        return {"error": str(e), "seconds": time.monotonic() - began, "alive": STORY.opt.is_alive()}
    return {"error": "", "seconds": 0.0, "alive": True}


def make_alone(run_id: str) -> dict[str, Any]:
    """An optimizer for rank 0 alone, which waits for no other rank."""
    own = [dist.new_group([rank]) for rank in range(dist.get_world_size())][RANK]
    if RANK:
        return {}
    STORY.close()
    STORY.model = nn.Linear(4, 1, bias=False)
    STORY.opt = shoal.Optimizer(
        dht=STORY.dht, run_id=run_id, process_group=own,
        **{**SETTINGS, **optimizer_of(STORY.model, "synchronous"), "target_batch_size": 4},
    )  # fmt: skip
    return push(1.0)


def fail(what: str) -> str:
    """Provoke an error, and give its text."""
    opt = STORY.opt
    try:
        match what:
            case "rank 0 fails":
                if RANK == 0:
                    opt.grad_averager.shutdown()
                while True:
                    push(1.0)
            case "other gradients":
                with STORY.model.no_sync():
                    push(1.0 + RANK)
            case "other calls":
                opt.step() if RANK else opt.load_state_from_peers()
            case "closure at one rank":
                x, y = batch(0, RANK)
                (STORY.model(x) - y).square().mean().backward()
                opt.step(None if RANK else lambda: 1.0)
            case "long timeout":
                opt.load_state_from_peers(timeout=3600.0)
            case "tracker":
                opt.tracker.global_progress  # noqa: B018 - what it raises is looked at
        return ""
    except (shoal.errors.ShoalError, ValueError) as e:
        return f"{type(e).__name__}: {e}"


def make_wrong(run_id: str, what: str) -> str:
    """Make an optimizer with an error at one rank."""
    dht, STORY.dht = STORY.dht, (STORY.dht if what != "no dht" else None)
    options: dict[str, Any] = {}
    if what == "two talk":
        STORY.dht = dht or "another DHT"  # type: ignore[assignment]
    if what == "other target":
        options["target_batch_size"] = 32 + RANK
    if what == "auxiliary":
        options |= {"auxiliary": True, "batch_size_per_step": None}
    try:
        make(run_id, **options)
    except (shoal.errors.ShoalError, ValueError) as e:
        return f"{type(e).__name__}: {e}"
    finally:
        STORY.dht = dht
    return ""


def copy_tensors() -> list[bool]:
    """Tensors of many kinds, each by itself and all in one piece, become those of rank 0."""
    group = GlooGroup(None, 60.0)
    generator = torch.Generator().manual_seed(0)
    of_rank_zero = [
        torch.randn(5, 3, generator=generator).t(), torch.tensor(2.5, dtype=torch.float64), torch.tensor([True, False]),
        torch.randn(7, generator=generator).to(torch.bfloat16), torch.empty(0), torch.arange(3),
        torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last),
    ]  # fmt: skip
    equal = []
    for given in [[tensor] for tensor in of_rank_zero] + [of_rank_zero]:
        held = [tensor.clone() if RANK == 0 else torch.zeros_like(tensor) for tensor in given]
        group.copy(held)
        equal.append(all(torch.equal(one, other) for one, other in zip(held, given, strict=True)))
    group.leave()
    return equal


def checkpoint() -> dict[str, Any]:
    """Save at all ranks, train on, and load what rank 0 has saved."""
    opt, model = STORY.opt, STORY.model
    own = copy.deepcopy(opt.state_dict())
    kept = copy.deepcopy(model.state_dict())
    before = digest()
    push(2.0, 4)
    moved = digest()
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, own)
    refused = ""
    try:
        opt.load_state_dict(of_all[1])
    except ValueError as e:
        refused = str(e)
    answers = {}
    for name, saved in (("own", own), ("rank 0's", of_all[0])):
        model.load_state_dict(kept)
        opt.load_state_dict(saved)
        answers[name] = digest()
        after = push(1.0, 4)
        answers[f"after {name}"] = after["digest"]
    return {
        "before": before,
        "moved": moved,
        "refused": refused,
        "keys": sorted(map(str, own["state"])),
        **answers,
    }


def load(timeout: float) -> dict[str, Any]:
    loaded = STORY.opt.load_state_from_peers(timeout=timeout)
    return {"loaded": loaded, "digest": digest()}


def close() -> None:
    STORY.close()


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = {"answer": globals()[order["call"]](**order["options"])}
        except Exception as e:  # noqa: BLE001 - the test judges it
            answer = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(answer), file=answers, flush=True)
    STORY.close()
    if STORY.dht is not None:
        STORY.dht.shutdown()
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
