"""Promise 6, and no wrong pixel: memory of a batch is used again only when no tensor uses it any more."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.decode.batch_memory import SPARE, BatchMemory

DTYPES = {torch.uint8: 1, torch.uint16: 2, torch.float32: 4}
shapes = st.tuples(st.integers(0, 5), st.sampled_from([1, 3, 12]), st.integers(1, 9), st.integers(1, 9))


@given(st.data())
def test_no_tensor_in_use_is_written_to(data: st.DataObject) -> None:
    memory = BatchMemory()
    held: list[tuple[torch.Tensor, int]] = []
    for number in range(data.draw(st.integers(1, 40))):
        if held and data.draw(st.booleans()):
            tensor, value = held.pop(data.draw(st.integers(0, len(held) - 1)))
            part = tensor[:1].flatten()
            before = len(memory.free)
            del tensor
            assert not part.numel() or len(memory.free) == before  # a part of it is enough
            assert (part == value).all()
            del part
        else:
            shape, dtype = data.draw(shapes), data.draw(st.sampled_from(list(DTYPES)))
            tensor = memory.empty(shape, dtype)
            assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
            held.append((tensor.fill_(number), number))
        assert all((tensor == value).all() for tensor, value in held)
        assert len(memory.free) <= SPARE


def test_memory_is_used_again_by_batches_of_about_its_size() -> None:
    memory = BatchMemory()
    batch = memory.empty((64, 3, 32, 32), torch.uint8)
    place = batch.data_ptr()
    del batch
    smaller = memory.empty((48, 3, 32, 32), torch.uint8)
    assert smaller.data_ptr() == place
    del smaller
    tiny = memory.empty((1, 3, 32, 32), torch.uint8)
    assert tiny.data_ptr() != place  # that memory would be far more than it needs
    del tiny
    assert [len(buffer) for buffer in memory.free] == [3 * 32 * 32]
