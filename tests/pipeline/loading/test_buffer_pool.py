"""Promise 6, and no wrong byte: memory is filled again only when nobody holds what lies in it, and never is there
more of it than stated."""

import mmap

from hypothesis import given
from hypothesis import strategies as st

from pipeline.loading.buffer_pool import Buffer, BufferPool

SPARE = 3000


def total(held: list[tuple[Buffer, memoryview]], buffers: BufferPool) -> int:
    return sum(b.capacity for b in [*(b for b, _ in held), *buffers.free, *buffers.returned])


@given(st.data())
def test_nothing_that_is_held_is_filled_again_and_the_total_is_bounded(data: st.DataObject) -> None:
    buffers, held, most = BufferPool(SPARE), [], 0
    for number in range(data.draw(st.integers(1, 60))):
        if held and data.draw(st.booleans()):
            buffer, view = held.pop(data.draw(st.integers(0, len(held) - 1)))
            part = view[1:]
            del view
            assert buffer not in buffers.returned  # a part of it is enough
            del part
            assert buffer in buffers.returned
            continue
        size = data.draw(st.integers(1, 2000))
        buffer, to_free = buffers.take(size)
        assert all(buffer is not b for b, _ in held)
        assert not {b.number for b, _ in held} & set(to_free)
        assert size <= buffer.capacity <= size + size // 4
        if buffer.mapping is None:
            buffer.mapping = mmap.mmap(-1, buffer.capacity)
        buffer.mapping[:size] = bytes([number]) * size
        view = buffers.lend(buffer, size)
        held.append((buffer, view))
        assert all(len(set(other)) == 1 for _, other in held)  # nobody wrote into them
        most = max(most, sum(b.capacity for b, _ in held))
        assert total(held, buffers) <= most + SPARE


def test_memory_that_has_been_let_go_is_used_again() -> None:
    buffers = BufferPool(0)
    first, _ = buffers.take(1000)
    buffers.give_back(first)
    assert buffers.take(1050) == (first, [])
    buffers.give_back(first)
    second, to_free = buffers.take(2000)
    assert second is not first
    assert to_free == [first.number]
