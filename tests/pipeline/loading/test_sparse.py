"""Views read about the bytes of their own samples, in few requests."""

from pathlib import Path

import pytest

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.loading.loader import Loader
from pipeline.storage.store import open_store
from pipeline.views.view import Selection, make_view
from tests.support.data.noise import assert_right, make_order, make_reader, write_noise

pytestmark = pytest.mark.integration


def epoch_of(dataset: Dataset, bound: int = 1 << 24) -> tuple[float, float]:
    """Read an epoch. Returns bytes read for each byte of the samples, and requests for each sample."""
    order = make_order(dataset, block=32)
    reader, ranges, blocks = make_reader(dataset, order, 0, order.steps_per_epoch, bound=bound), 0, set[int]()
    for step in range(order.steps_per_epoch):
        reader._request(step, ahead=step > 0)
        for block, _ in reader.places.values():
            if block.step and id(block) not in blocks:
                blocks.add(id(block))
                ranges += len(block.ranges)
        assert_right(dataset, reader.read(step))
    reader.close()
    indexes = sum(path.stat().st_size for path in Path(dataset.store.root, "index").iterdir())
    read = (reader.fetcher.storage_bytes - indexes) / dataset.manifest.image_bytes
    return read, ranges / dataset.samples


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """2400 samples of about 20 kB."""
    return write_noise(tmp_path_factory.mktemp("noise"), 4, 600, 20_000)


def view(noise: Dataset, to: Path, fraction: float) -> Dataset:
    make_view(noise, open_store(str(to)), Selection(fraction=fraction))
    return open_dataset(str(to))


@pytest.mark.parametrize(
    ("fraction", "most_bytes", "most_requests"),
    [(1.0, 1.15, 0.12), (0.9, 1.3, 0.15), (0.5, 2.1, 0.5), (0.1, 1.35, 1.0)],
)
def test_an_epoch_of_a_view(
    noise: Dataset, tmp_path: Path, fraction: float, most_bytes: float, most_requests: float
) -> None:
    read, requests = epoch_of(view(noise, tmp_path, fraction))
    print(f"{fraction:.0%} of the samples: {read:.2f} × their bytes, {requests:.2f} requests per sample")
    assert read <= most_bytes
    assert requests <= most_requests


def test_memory_is_planned_for_the_bytes_between_the_samples_too(noise: Dataset, tmp_path: Path) -> None:
    sparse = view(noise, tmp_path, 0.1)
    assert noise.mean_read_bytes == noise.mean_sample_bytes
    assert sparse.mean_read_bytes > 1.5 * sparse.mean_sample_bytes
    order = make_order(sparse, block=32)
    bound = Loader(sparse, order, None, 0, 1).lane_bytes * order.lanes  # decodes nothing
    reader = make_reader(sparse, order, 0, order.steps_per_epoch, bound=bound)
    for step in range(order.steps_per_epoch):
        reader.read(step)
        assert reader.held_bytes <= bound
    reader.close()
