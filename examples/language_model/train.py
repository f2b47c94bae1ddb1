"""One peer that trains a language model together with others, by DiLoCo: local steps on its own part of the
text, then an outer step on the average of what all peers have learnt.

    python train.py --part 0                            # the first peer: prints its address
    python train.py --part 1 --initial-peers ADDRESS    # the others, here or on other machines
    python train.py --part 2 --initial-peers ADDRESS --join    # later: begins with the state of a peer

On several machines, tell each ``--host`` the address under which the others reach it. `swarm.py` starts a
whole swarm here.

How peers keep together. After H local steps a peer looks for a group. When one stands, which is at once if
everybody is there and after ``MATCHMAKING_TIME`` at the latest if not, its members average their outer
gradients and take the same outer step. Local steps go on all the while: nobody waits for the network, nor for
a peer that is slow or dead. Who was not in the group of a round sees at the next one, by the round that its
groupmates gather, that it is behind, and downloads the state of a peer.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data import load_corpus
from diloco import OuterOptimizer
from record import Record
from training import LocalTrainer, Settings

# The very same script runs with hivemind: only this import changes.
if TYPE_CHECKING or os.environ.get("LIBRARY", "shoal") == "shoal":
    import shoal as hivemind
else:
    import hivemind

PREFIX = "language-model"
MATCHMAKING_TIME = 3.0
"""Seconds that a group that is not full waits for the others."""
REQUEST_TIMEOUT = 1.0
ROLL_CALL_TIMEOUT = 30.0
SEARCH_TIMEOUT = 15.0
ALLREDUCE_TIMEOUT = 30.0
DOWNLOAD_TIMEOUT = 30.0
DOWNLOAD_TRIES = 10
DOWNLOAD_PAUSE = 0.3
PROGRESS_SECONDS = 1.0

State = tuple[dict[str, int], list[torch.Tensor], None]


class Averager(hivemind.DecentralizedAverager):
    """Averages outer gradients, and gives those who join or lag behind the state that `share` returns."""

    def __init__(self, *args: Any, share: Callable[[], State], **options: Any) -> None:
        self._share = share
        super().__init__(*args, **options)

    def get_current_state(self) -> State:
        with self.get_tensors():  # the trainer changes the state under the same lock
            return self._share()


class Peer:
    """:param dht: through which the peer finds the others"""

    def __init__(self, dht: hivemind.DHT, text: torch.Tensor, settings: Settings, part: int) -> None:
        self.trainer = LocalTrainer(text, settings, seed=part)
        self.outer = OuterOptimizer(
            self.trainer.parameters,
            learning_rate=settings.outer_learning_rate,
            momentum=settings.outer_momentum,
        )
        self.round = 0
        self.done = False
        """All steps are done and averaged; or nobody is left to average them with."""
        self._settings = settings
        self._round_began_at = 0  # by the schedule's step
        self._own_steps = 0  # since the base, and not in any average yet
        self._averaging: Any = None  # a StepControl, from the search for a group to the average
        self._search_time = 0.0
        self._given: list[torch.Tensor] = []  # the parameters when their gradient was given into the average
        self._given_at = 0  # at this step of the schedule
        self._steps_given = 0
        self._given_time = 0.0
        self._averager = Averager(
            [torch.zeros_like(tensor) for tensor in self.outer.base],
            dht,
            prefix=PREFIX,
            target_group_size=settings.peers,
            min_group_size=2,
            min_matchmaking_time=MATCHMAKING_TIME,
            request_timeout=REQUEST_TIMEOUT,
            allreduce_timeout=ALLREDUCE_TIMEOUT,
            compression=hivemind.compression.Float16Compression(),
            share=self._share_state,
            start=True,
        )

    def close(self) -> None:
        self._averager.shutdown()

    def wait_for_others(self) -> int:
        """Begin together with the others: average once before anything is learnt, which changes nothing.

        :returns: how many peers are there; 1 if nobody came within ``ROLL_CALL_TIMEOUT``
        """
        begin = hivemind.utils.get_dht_time() + ROLL_CALL_TIMEOUT
        gathered = self._averager.step(
            gather={"round": 0, "step": 0}, scheduled_time=begin, timeout=ROLL_CALL_TIMEOUT + 5
        )
        return len(gathered) if isinstance(gathered, dict) else 1

    # Local steps

    def train_step(self) -> float:
        """One local step; the loss in bits per byte."""
        self._own_steps += 1
        return self.trainer.train_step()

    # The outer step

    def advance(self) -> dict[str, Any] | None:
        """Look for a group when it is time, average when one stands, and take the outer step when the average is there.
        Called after each local step; never waits.

        :returns: what happened, if a round has ended: well (``group``: its size) or not (``error``)
        """
        if self._averaging is None:
            if self.trainer.step - self._round_began_at >= self._settings.local_steps:
                self._begin_search()
            return None
        if not self._given and self._averaging.stage.name == "AWAITING_TRIGGER":
            self._give_gradient()
        if not self._averaging.done():
            return None
        averaging, self._averaging = self._averaging, None
        given, self._given = self._given, []
        error = averaging.exception()
        if error is not None:
            self.done = self.trainer.step >= self._settings.steps
            return {"error": f"{type(error).__name__}: {error}"[:500]}
        event = {
            "group": len(averaging.result()),
            "steps": self._steps_given,
            "search_s": round(self._given_time - self._search_time, 3),
            "exchange_s": round(time.monotonic() - self._given_time, 3),
        }
        self._finish_round(averaging.result(), given)
        event["norm"] = round(self.outer.norm, 4)  # equal at all members, unless something is wrong
        return event

    def _begin_search(self) -> None:
        self._search_time = time.monotonic()
        self._averaging = self._averager.step(
            gather={"round": self.round, "step": self.trainer.step},
            weight=float(self._own_steps),
            timeout=SEARCH_TIMEOUT,
            allow_retries=False,  # if it fails, the next search begins after the next local step
            require_trigger=True,
            wait=False,
        )

    def _give_gradient(self) -> None:
        """The group stands: what has been learnt so far goes into the average. Local steps go on meanwhile."""
        self._given = [parameter.detach().clone() for parameter in self.trainer.parameters]
        self._steps_given, self._given_at = self._own_steps, self.trainer.step
        self._given_time = time.monotonic()
        with self._averager.get_tensors() as gradients:
            self.outer.write_gradient(self._given, gradients)
        self._averaging.allow_allreduce()

    def _finish_round(self, gathered: dict[Any, Any], given: list[torch.Tensor]) -> None:
        # All members read the same: they come to the end in the same round.
        enough = self._settings.steps - self._settings.local_steps // 2
        self.done = max(numbers_of("step", gathered.values()), default=0) >= enough
        latest = max(numbers_of("round", gathered.values()), default=0)
        if latest > self.round:  # the others have taken outer steps that this peer has not
            self.take_over_state(latest + 1)
            return
        with self._averager.get_tensors() as gradients:
            self.outer.step(gradients)
            self.outer.rebase(self.trainer.parameters, given)
            self._begin_round(self.round + 1, self._given_at)

    def _begin_round(self, round_: int, step: int) -> None:
        self.round = round_
        self._round_began_at = step
        self._own_steps -= self._steps_given

    # State: the base, the outer momentum, and how far training has come

    def _share_state(self) -> State:
        metadata = {"round": self.round, "step": self.trainer.step, "round_began_at": self._round_began_at}
        return metadata, [tensor.clone() for tensor in self.outer.state], None

    def take_over_state(self, minimum: int) -> bool:
        """Continue from the state of another peer that has come to the round ``minimum`` at least.

        :returns: False if there is none, and nothing has changed
        """
        for _ in range(DOWNLOAD_TRIES):
            found = self._averager.load_state_from_peers(timeout=DOWNLOAD_TIMEOUT)
            if found is not None and found[0]["round"] >= minimum:
                break
            time.sleep(DOWNLOAD_PAUSE)  # a groupmate is about to take the outer step of this very round
        else:
            return False
        metadata, tensors = found
        with self._averager.get_tensors():
            self.outer.load_state(tensors)
            self.outer.copy_base_to(self.trainer.parameters)
            self.trainer.step = metadata["step"]
            self._own_steps = self._steps_given = 0
            self._begin_round(metadata["round"], metadata["round_began_at"])
        return True


def numbers_of(name: str, gathered: Iterable[Any]) -> list[int]:
    """What groupmates say of themselves under this name; what makes no sense is left out."""
    values = [data.get(name) for data in gathered if isinstance(data, dict)]
    return [value for value in values if isinstance(value, int)]


def run(peer: Peer, record: Record, save_every: int) -> None:
    """Train until all steps are done."""
    trainer = peer.trainer
    losses: list[float] = []
    told_at = time.monotonic()
    while not peer.done:
        losses.append(peer.train_step())
        event = peer.advance()
        if event is None:
            if time.monotonic() - told_at > PROGRESS_SECONDS:  # for readers of the log
                told_at = time.monotonic()
                record.write("progress", step=trainer.step, tokens=trainer.tokens)
            continue
        loss = sum(losses) / len(losses)
        losses.clear()
        record.write(
            "round", round=peer.round, step=trainer.step, tokens=trainer.tokens, loss=round(loss, 4), **event
        )
        what = event.get("error") or f"averaged with {event['group'] - 1} others in {event['exchange_s']} s"
        print(f"round {peer.round:3}, step {trainer.step:5}: {loss:.3f} bits per byte, {what}", flush=True)
        if save_every and peer.round % save_every == 0 and "error" not in event:
            record.save(peer.outer.base, trainer)
    record.save(peer.outer.base, peer.trainer, final=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--part", type=int, required=True, help="which part of the text is this peer's: 0, 1, ..."
    )
    parser.add_argument(
        "--initial-peers", nargs="*", default=[], help="addresses of a peer that runs already"
    )
    parser.add_argument(
        "--join", action="store_true", help="begin with the state of a peer that trains already"
    )
    parser.add_argument("--host", default="127.0.0.1", help="IP address under which others reach this peer")
    parser.add_argument("--folder", type=Path, help="where to keep the record; default: runs/peer-PART")
    parser.add_argument(
        "--save-every", type=int, default=0, help="rounds between copies of the model; 0: none"
    )
    parser.add_argument("--started", type=float, help="when the run began (Unix time); default: now")
    Settings.add_options(parser)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    settings = Settings.from_options(options)
    if not 0 <= options.part < settings.peers:
        raise SystemExit(f"--part must be 0 to {settings.peers - 1}, got {options.part}")
    torch.set_num_threads(1)  # a core for each peer
    text = load_corpus(settings.peers, Path(settings.text) if settings.text else None).parts[options.part]
    record = Record(options.folder or Path(f"runs/peer-{options.part}"), options.started)
    dht = hivemind.DHT(
        initial_peers=options.initial_peers, host_maddrs=[f"/ip4/{options.host}/tcp/0"], start=True
    )
    peer = None
    try:
        peer = Peer(dht, text, settings, options.part)
        addresses = [str(address) for address in dht.get_visible_maddrs()]
        record.write("ready", addresses=addresses)
        print(f"others join with: --initial-peers {' '.join(addresses)}", flush=True)
        if options.join:
            loaded = peer.take_over_state(0)
            record.write("began", loaded=loaded, round=peer.round, step=peer.trainer.step)
            print(
                f"took over the state of round {peer.round}" if loaded else "found no state to take over",
                flush=True,
            )
        else:
            print(f"waiting for {settings.peers - 1} others, {ROLL_CALL_TIMEOUT:g} s at most", flush=True)
            record.write("began", group=peer.wait_for_others())
            if options.save_every:
                record.save(peer.outer.base, peer.trainer)
        run(peer, record, options.save_every)
        record.write("finished", round=peer.round, step=peer.trainer.step, tokens=peer.trainer.tokens)
    finally:
        if peer is not None:
            peer.close()
        dht.shutdown()
        record.close()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
