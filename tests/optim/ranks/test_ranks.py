"""What ranks of one peer tell each other: frames, pieces, batches, and both roles on a group in memory."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import InvalidStateError, InvalidTypeError, InvalidValueError, RankError
from shoal.optim.ranks import frames
from shoal.optim.ranks.group import find_members
from shoal.optim.ranks.messages import (
    Arrival,
    Batch,
    Failure,
    Outcome,
    check_facts,
    contents,
    prints,
    together,
)
from shoal.optim.ranks.parts import AtRankZero, RankState
from shoal.optim.ranks.pieces import padded, pieces, places
from shoal.optim.ranks.roles import Listener, OneRank, Speaker, join
from shoal.optim.report import EpochReport
from shoal.optim.state.holder import OptimizerHolder


class MemoryGroup:
    """The ranks of one peer as threads. A rank that leaves fails those that wait for it.

    :param posts: a queue from each rank (first index) to each
    """

    def __init__(self, rank: int, posts: list[list[SimpleQueue[bytes | None]]]) -> None:
        self.rank, self.size, self.ended = rank, len(posts), False
        self._posts = posts

    def gather(self, message: Any) -> list[Any]:
        sent = pickle.dumps(message)
        for post in self._posts[self.rank]:
            post.put(sent)
        return [pickle.loads(self._from(rank)) for rank in range(self.size)]

    def tell(self, message: Any = None) -> Any:
        return self.gather(message)[0]

    @torch.no_grad()
    def copy(self, tensors: Sequence[torch.Tensor]) -> None:
        for target, source in zip(tensors, self.gather([t.detach() for t in tensors])[0], strict=True):
            target.copy_(source)

    def leave(self) -> None:
        self.ended = True
        for post in self._posts[self.rank]:
            post.put(None)

    def _from(self, rank: int) -> bytes:
        received = self._posts[rank][self.rank].get(timeout=20)
        if received is None:
            self.ended = True
            raise RankError(f"rank {rank} is gone")
        return received


def pair() -> tuple[Speaker, Listener]:
    posts: list[list[SimpleQueue[bytes | None]]] = [[SimpleQueue() for _ in range(2)] for _ in range(2)]
    return Speaker(MemoryGroup(0, posts)), Listener(MemoryGroup(1, posts))


class Held:
    """As much of a training state as the roles look at."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Linear(2, 1)
        self.holder = OptimizerHolder(torch.optim.SGD(self.model.parameters(), lr=0.5), None, False, False)
        self.scheduler, self.extra_tensors = None, ()
        self.local_epoch = self.rewritten = 0

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.holder.optimizer


def at_both(local_updates: bool, story: Callable[[Any, Any], Any]) -> tuple[list[Any], Any, RankState]:
    """Run ``story(role, state)`` at two ranks; what it returned or raised, and both states."""
    speaking, held = Held(0), Held(1)
    listening = RankState(held.holder, None, (), local_updates, reused_gradients=True)
    roles = pair()
    states = [speaking, listening]

    def run(rank: int) -> Any:
        role, state = roles[rank], states[rank]
        try:
            role.make(lambda: role.share(state, local_updates) or {"rank": 0})
            return story(role, state)
        except Exception as e:  # noqa: BLE001 - the test judges it
            return e

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2))), speaking, listening


def equal(speaking: Held, listening: RankState) -> bool:
    pairs = zip(speaking.holder.parameters, listening.holder.parameters, strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@given(st.integers(0, 3 * frames.FRAME))
def test_a_message_of_any_length_passes_in_frames(size: int):
    message = b"x" * size
    encoded = frames.encode(message)
    first = frames.first_frame(encoded)
    assert len(first) == frames.FRAME
    assert frames.decode(first, encoded[frames.ROOM :] + b"\0" * 5) == message


def test_the_messages_of_an_ordinary_step_fit_into_one_frame():
    batch = Arrival("step() with a closure", Batch(512, 0.123456789, (100.0, -1e-30, 1e30)))
    assert len(frames.encode(batch)) <= frames.ROOM
    assert len(frames.encode(Outcome(True, True))) <= frames.ROOM


@given(st.lists(st.integers(1, 200), max_size=30), st.integers(16, 300))
def test_pieces_have_all_tensors_in_order_and_no_neighbours_that_fit_together(sizes: list[int], limit: int):
    found = pieces(sizes, limit)
    assert [index for piece in found for index in piece] == list(range(len(sizes)))
    filled = [sum(padded(sizes[index]) for index in piece) for piece in found]
    assert all(size <= limit or len(piece) == 1 for size, piece in zip(filled, found, strict=True))
    for before, piece in zip(filled, found[1:], strict=False):
        assert before + padded(sizes[piece[0]]) > limit


def test_tensors_of_all_dtypes_and_shapes_have_places_in_one_piece():
    tensors = [
        torch.ones(3, dtype=torch.bool), torch.tensor(2.5, dtype=torch.float64), torch.ones(2, 3).t(),
        torch.full((5,), 7, dtype=torch.bfloat16),
    ]  # fmt: skip
    piece = torch.empty(sum(padded(tensor.nbytes) for tensor in tensors), dtype=torch.uint8)
    for place, tensor in zip(places(tensors, piece), tensors, strict=True):
        place.copy_(tensor)
    for place, tensor in zip(places(tensors, piece), tensors, strict=True):
        assert torch.equal(place, tensor)


def test_batches_are_one_with_the_samples_and_the_mean_loss_of_all():
    one = together(
        [Batch(1, 5.0, (0.0, 1.0, 1.0)), Batch(3, 1.0, (0.0, 1.0, 1.0)), Batch(4, None, (0.0, 1.0, 1.0))]
    )
    assert (one.samples, one.loss) == (8, 2.0)


@pytest.mark.parametrize(
    "other",
    [(), (1.0, 2.0, 2.0), (0.0, 2.0, 3.0), (0.0, -2.0, 2.0), (0.0, float("nan"), float("nan"))],
    ids=["none", "of another parameter", "another norm", "another sum", "not finite"],
)
def test_other_gradients_at_another_rank_are_an_error(other: tuple[float, ...]):
    with pytest.raises(
        InvalidStateError, match=r"rank 1 has others than rank 0: wrap the model in Distributed"
    ):
        together([Batch(1, None, (0.0, 2.0, 2.0)), Batch(1, None, other)])


def test_gradients_that_differ_by_rounding_or_are_all_nan_are_the_same():
    nan = (0.0, float("nan"), float("nan"))
    assert together([Batch(1, None, nan), Batch(1, None, nan)]).samples == 2
    assert together([Batch(1, None, (0.0, 1e-9, 2.0)), Batch(1, None, (0.0, -1e-9, 2.0001))]).samples == 2


def test_prints_are_of_the_last_gradient_there_is():
    model = torch.nn.Linear(2, 1)
    assert prints(list(model.parameters())) == ()
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert prints(list(model.parameters())) == (0.0, 7.0, 5.0)


def test_ranks_in_different_calls_are_named():
    with pytest.raises(InvalidStateError, match=r"rank 0 is in step\(\), rank 1 in load\(\)"):
        contents([Arrival("step()"), Arrival("load()")], 0)


def test_a_failure_is_an_error_at_other_ranks_alone():
    told = [Failure("step()", "ValueError: no"), Arrival("step()", 1)]
    with pytest.raises(RankError, match=r"rank 0 failed in step\(\): ValueError: no"):
        contents(told, 1)


def test_ranks_that_were_made_otherwise_are_named():
    with pytest.raises(
        InvalidValueError, match="run_id must be the same at all ranks, got a at rank 0 and b at rank 1"
    ):
        check_facts([{"run_id": "a"}, {"run_id": "b"}])


def test_without_several_processes_there_is_one_rank():
    assert isinstance(join(None, 1.0, 1.0), OneRank)
    with pytest.raises(InvalidStateError, match="process_group must be None without"):
        find_members("a group")


@pytest.mark.parametrize("local_updates", [False, True])
def test_listeners_are_as_the_speaker_from_the_start_and_after_each_change(local_updates: bool):
    def story(role: Any, state: Any) -> Any:
        def work() -> str:
            with torch.no_grad():
                state.holder.parameters[0].add_(1.0)
            state.holder.optimizer.param_groups[0]["lr"] = 0.25
            state.rewritten += 1
            state.local_epoch = 7
            return "done"

        started = state.holder.parameters[0].detach().clone()
        return started, role.lead("work", work)

    [(one, first), (other, second)], speaking, listening = at_both(local_updates, story)
    assert torch.equal(one, other)
    assert first == second == "done"
    assert equal(speaking, listening)
    assert listening.local_epoch == 7
    assert listening.param_groups[0]["lr"] == 0.25


def test_with_local_updates_listeners_step_alike_and_reused_gradients_are_cleared():
    report = EpochReport(epoch=1, peers=1, samples=4, local_samples=4)

    def story(role: Any, state: Any) -> Any:
        for parameter in state.holder.parameters:
            parameter.grad = torch.ones_like(parameter)
        kept = state.holder.parameters[0].grad

        def work(batch: Batch) -> Outcome:
            state.holder.optimizer.step()
            return Outcome(updated=True, cleared=True, report=report)

        outcome = role.step(2, torch.tensor(float(role.rank)), state.holder.parameters, work)
        return outcome, kept

    [(one, _), (other, kept)], speaking, listening = at_both(True, story)
    assert one == other == Outcome(True, True, report)
    assert equal(speaking, listening)
    assert listening.holder.parameters[0].grad is kept
    assert not kept.any()


def test_the_error_of_rank_zero_reaches_the_others_and_the_next_call_works():
    def story(role: Any, state: Any) -> Any:
        def work() -> None:
            role.hold()
            role.hold()
            raise ValueError("no group")

        try:
            role.lead("step()", work)
        except (ValueError, RankError) as e:
            return str(e), role.lead("step()", lambda: 3), role.parted
        return None

    told, _, _ = at_both(False, story)
    assert told == [("no group", 3, False), ("rank 0 failed in step(): ValueError: no group", 3, False)]


def test_a_rank_that_leaves_fails_the_others():
    def story(role: Any, state: Any) -> Any:
        if role.rank == 1:
            role.leave()
            return None
        return role.lead("step()", lambda: 3)

    (error, _), _, _ = at_both(False, story)
    assert isinstance(error, RankError)


def test_a_constructor_that_fails_at_one_rank_fails_at_all():
    roles = pair()

    def run(role: Any) -> Any:
        def own() -> dict[str, Any]:
            if role.rank == 1:
                raise InvalidTypeError("no such thing")
            return {}

        try:
            role.make(own)
        except Exception as e:  # noqa: BLE001 - judged below
            return type(e), str(e), role.parted
        return None

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, roles)
    reason = "rank 1 failed in the constructor of shoal.Optimizer: InvalidTypeError: no such thing"
    assert first == (RankError, reason, True)
    assert second == (InvalidTypeError, "no such thing", True)


def test_only_rank_zero_s_saved_state_is_complete():
    _, listener = pair()
    assert listener.mark() == {"rank": 1}
    assert listener.part_of({0: "momentum"}) == {}
    with pytest.raises(InvalidValueError, match="state_dict must be that of rank 0, got that of rank 1"):
        OneRank().part_of({"rank": 1})


def test_what_only_rank_zero_has_says_so():
    with pytest.raises(InvalidStateError, match=r"tracker\.global_epoch must be asked for at rank 0"):
        AtRankZero("tracker", 1).global_epoch  # noqa: B018 - the question is what raises
