from __future__ import annotations

from shoal.averaging.trainer.chunk_size import HELD_UP, MOST_NBYTES, WRITE_NBYTES, ChunkSize


class Clock:
    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


def test_chunks_stay_small_while_they_take_no_time():
    clock = Clock()
    size = ChunkSize(WRITE_NBYTES, clock)
    for _ in range(10):
        assert size.next() == WRITE_NBYTES
        clock.now += HELD_UP / 2


def test_chunks_grow_to_a_limit_while_each_is_held_up():
    clock = Clock()
    size = ChunkSize(WRITE_NBYTES, clock)
    sizes = []
    for _ in range(8):
        sizes.append(size.next())
        clock.now += 2 * HELD_UP
    assert sizes[:3] == [WRITE_NBYTES, 2 * WRITE_NBYTES, 4 * WRITE_NBYTES]
    assert sizes[-1] == MOST_NBYTES


def test_slices_are_all_elements_in_order_and_grow_too():
    clock = Clock()
    size = ChunkSize(WRITE_NBYTES, clock)
    count, covered, lengths = 3 * WRITE_NBYTES, 0, []
    for chunk in size.slices(count, itemsize=4):
        assert chunk.start == covered
        covered = chunk.stop
        lengths.append(chunk.stop - chunk.start)
        clock.now += 2 * HELD_UP
    assert covered == count
    assert lengths[:3] == [WRITE_NBYTES // 4, WRITE_NBYTES // 2, WRITE_NBYTES]
    assert list(ChunkSize(WRITE_NBYTES, clock).slices(0, itemsize=4)) == []
