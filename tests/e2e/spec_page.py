"""A script written against the reference page of hivemind's averager: `python spec_page.py NUMBER [ADDRESS...]`.

Two of these, with the numbers 0 and 1, average with each other through everything that the page names, and check what
they get. Nothing but the import is Shoal's.
"""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import Future

import torch

import shoal as hivemind

NUMBER, ADDRESSES = int(sys.argv[1]), sys.argv[2:]


def report(text: str) -> None:
    print(text, flush=True)


class Averager(hivemind.averaging.DecentralizedAverager):
    """Shares more than the default does, as the page says: meant to be overridden."""

    def get_current_state(self):
        with self.get_tensors() as tensors:
            return {"epoch": 7, "peer": NUMBER}, tensors, self.infos


dht = hivemind.DHT(initial_peers=ADDRESSES, start=True)
report(" ".join(str(address) for address in dht.get_visible_maddrs()))

tensors = [torch.full((1000, 20), float(NUMBER)), torch.full((), 10.0 * NUMBER)]
infos = [
    hivemind.CompressionInfo.from_tensor(tensor, key=key, role=hivemind.TensorRole.PARAMETER)
    for key, tensor in enumerate(tensors)
]
averager = Averager(
    (tensor for tensor in tensors),
    dht,
    start=False,
    prefix="spec_page",
    target_group_size=2,
    min_group_size=2,
    initial_group_bits="0",
    min_matchmaking_time=5.0,
    request_timeout=3.0,
    averaging_alpha=1.0,
    part_size_bytes=4096,
    allreduce_timeout=60.0,
    next_chunk_timeout=20.0,
    sender_timeout=20.0,
    reducer_timeout=40.0,
    compression=hivemind.NoCompression(),
    state_compression=hivemind.Float16Compression(),
    tensor_infos=infos,
    bandwidth=100.0,
    min_vector_size=10,
    auxiliary=False,
    allow_state_sharing=True,
    declare_state_period=30,
    client_mode=False,
    daemon=True,
    shutdown_timeout=5,
)
averager.infos = infos
averager.run_in_background(await_ready=True, timeout=60)
assert averager.get_group_bits() == "0"
assert averager.mode is hivemind.AveragingMode.NODE

# The example of the page, from its first line to its last.
with averager.get_tensors() as tensors:
    # run some code, modify tensors if necessary
    tensors[0] += 1
# do not use tensors after the lock is released
metadata = averager.step(gather=dict(my_batch_size=32))  # noqa: C408 - as the page has it
# run averaging once (in-place), gather metadata from groupmates
with averager.get_tensors() as tensors_after_averaging:
    assert torch.equal(tensors_after_averaging[0], torch.full((1000, 20), 1.5))
    assert tensors_after_averaging[1].item() == 5.0

assert len(metadata) == 2
assert metadata[averager.peer_id] == {"my_batch_size": 32}
assert all(isinstance(peer, hivemind.p2p.PeerID) for peer in metadata)

# Group bits: they change after a round; both peers go on under the same ones.
assert set(averager.get_group_bits()) <= {"0", "1"}
averager.set_group_bits("110")
assert averager.get_group_bits(wait=False).result(20) == "110"
averager.set_group_bits("01", wait=False).result(20)

# In the background, with a trigger, another weight and another time.
with averager.get_tensors() as tensors:
    tensors[1].fill_(NUMBER)
control = averager.step(
    gather=NUMBER,
    scheduled_time=hivemind.get_dht_time() + 10,
    weight=2.0,
    timeout=60.0,
    allow_retries=True,
    require_trigger=True,
    wait=False,
)
assert isinstance(control, hivemind.averaging.control.StepControl)
assert isinstance(control, Future)
assert not control.triggered
assert not control.began_allreduce
control.weight = 1.0 + 2 * NUMBER  # 1 and 3
control.scheduled_time = hivemind.get_dht_time() + 5
assert control.deadline > control.scheduled_time
called = []
control.add_done_callback(called.append)
control.allow_allreduce()
control.allow_allreduce()
gathered = control.result(timeout=60)
assert sorted(gathered.values()) == [0, 1]
assert control.stage is hivemind.averaging.AveragingStage.FINISHED
assert control.done()
assert not control.cancelled()
assert control.exception() is None
assert control.report.weight == 4.0
with averager.get_tensors() as tensors:
    assert tensors[1].item() == 0.75

# Awaited.
averager.set_group_bits("01")


async def average() -> dict:
    return await averager.step(wait=False, timeout=60.0)


assert len(asyncio.run(average())) == 2

# Nobody else is under these bits: None on failure, and an exception from a StepControl that says why.
averager.set_group_bits(f"10{NUMBER}")
assert averager.step(timeout=1.0) is None
failed = averager.step(timeout=1.0, wait=False)
assert isinstance(failed.exception(30), hivemind.averaging.MatchmakingException)
assert isinstance(failed.exception(), hivemind.AllreduceException)
cancelled = averager.step(wait=False)
assert cancelled.cancel()
assert cancelled.cancelled()

# State: the second peer downloads from the first, then both meet once more, so that neither leaves early.
averager.state_sharing_priority = 1.0 - NUMBER
assert averager.state_sharing_priority == 1.0 - NUMBER
averager.allow_state_sharing = NUMBER == 0
assert averager.allow_state_sharing is (NUMBER == 0)


async def download_state() -> list:
    return [piece async for piece in averager.rpc_download_state(None, None)]


pieces = asyncio.run(download_state())
if NUMBER == 0:
    assert averager.serializer.loads(pieces[0].metadata) == {"epoch": 7, "peer": 0}
    assert sum(piece.tensor_part.count for piece in pieces[1:]) == averager.total_size
else:
    assert not pieces

averager.set_group_bits("01")
averager.step(timeout=60.0)
averager.set_group_bits("01")
if NUMBER == 1:
    metadata, state = averager.load_state_from_peers(wait=True, timeout=60)
    assert metadata == {"epoch": 7, "peer": 0}
    with averager.get_tensors() as tensors:
        assert [torch.equal(mine, theirs) for mine, theirs in zip(tensors, state, strict=True)] == [
            True,
            True,
        ]
    metadata, state = averager.load_state_from_peers(wait=False, timeout=60).result(60)
    assert metadata["peer"] == 0
averager.step(timeout=120.0)

averager.shutdown()
assert not averager.is_alive()
dht.shutdown()
report("done")
