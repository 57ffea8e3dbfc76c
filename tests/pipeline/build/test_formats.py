"""Images of every format through build, index and verify, and the type of pixels that the dataset gets."""

import io
import json
import tarfile
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from pipeline.build.build import BuildResult, build
from pipeline.build.shard_writer import BuildOptions
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.image_check import Conversion, check_image
from pipeline.dataset.index import IndexResult, find_shards, index_shards
from pipeline.dataset.verify import verify
from pipeline.decode.factory import make_decoder
from pipeline.errors import UserError
from pipeline.images.formats import EXTENSIONS, read_pixels
from pipeline.images.pixels import RGB, Pixels
from pipeline.loading.crops import CENTRE, centre_crops
from pipeline.loading.loader import centred_batch
from pipeline.storage.store import open_store
from tests.support.data.formats import deep, files, npy, rgb8, tiff
from tests.support.data.odd_images import picture, png, saved
from tests.support.datasets import IMAGENET_SAMPLE

EXTENSION = {format: extension for extension, format in EXTENSIONS.items()}
TWELVE = deep(rgb8()) >> 4


def write_folder(folder: Path, images: dict[str, bytes]) -> str:
    """Class folders with these files."""
    for name, data in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return str(folder)


def write_tar(folder: Path, images: dict[str, bytes]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, data in images.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return str(folder)


def built(tmp_path: Path, images: dict[str, bytes], **conversion: object) -> tuple[Dataset, BuildResult]:
    folder = write_folder(tmp_path / "images", {f"c/{name}": data for name, data in images.items()})
    store = open_store(str(tmp_path / "built"))
    result = build(folder, store, BuildOptions(conversion=Conversion(**conversion)))
    return open_dataset(store.url), result


def indexed(tmp_path: Path, images: dict[str, bytes], bits: int | None = None) -> tuple[Dataset, IndexResult]:
    store = open_store(write_tar(tmp_path / "tars", images))
    result = index_shards(store, find_shards(store), store, bits=bits)
    return open_dataset(store.url), result


def notes_of(result: BuildResult | IndexResult) -> list[str]:
    return result.notes if isinstance(result, IndexResult) else [result.bits_note or ""]


def decoded(dataset: Dataset, name: str = "cpu") -> dict[str, np.ndarray]:
    """Key without its folder → centre crop, of the dataset's pixels."""
    decoder = make_decoder(name, 32, 1, pixels=dataset.manifest.pixels)
    ids = np.arange(dataset.samples)
    batch = centred_batch(dataset, decoder, ids)
    assert not batch.bad
    keys = [key.rpartition("/")[2] for key in dataset.keys(ids)]
    return dict(zip(keys, batch.images.double().numpy(), strict=True))


def named(kinds: dict[tuple[str, str], bytes]) -> dict[str, bytes]:
    return {f"{i:03d}.{EXTENSION[format]}": data for i, ((format, _), data) in enumerate(kinds.items())}


@pytest.mark.parametrize("decoder", ["cpu", "dali"])
def test_every_format_through_build_index_and_verify_gives_the_same_crops(
    tmp_path: Path, decoder: str
) -> None:
    """Both datasets mix 8 and 16 bits, grey and RGB, with and without alpha, so batches are 8-bit RGB."""
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    images = named(files())
    by_build, result = built(tmp_path, images)
    by_index, _ = indexed(tmp_path, images)
    assert not result.skipped
    for dataset in (by_build, by_index):
        assert dataset.samples == len(images)
        assert dataset.manifest.pixels == RGB
        assert verify(dataset) == []
    reference = make_decoder("cpu", 32, 1)
    known = list(files())
    crops = [decoded(dataset, decoder) for dataset in (by_build, by_index)]
    picture_crop = {
        grey: reference(
            [png(rgb8()) if not grey else saved(picture().convert("L"), "PNG")],
            np.array([centre_box()]),
            np.array([False]),
        )
        .images[0]
        .double()
        .numpy()
        for grey in (False, True)
    }
    for i, (format, kind) in enumerate(known):
        expected = picture_crop[kind.startswith("grey")]
        for crop in crops:
            assert abs(crop[f"{i:03d}"] - expected).mean() < (8 if format == "GIF" else 3.5), (format, kind)
        assert (crops[0][f"{i:03d}"] == crops[1][f"{i:03d}"]).all()
    assert result.odd["TIFF without its alpha"] == 3


def centre_box() -> tuple[int, int, int, int]:
    return tuple(centre_crops(np.array([203]), np.array([301]), CENTRE, 1.0)[0].tolist())


def twelve_bands(dtype: str, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).random((40, 50, 12))
    return (values if dtype == "float32" else values * np.iinfo(dtype).max).astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_a_dataset_has_the_type_of_its_images(tmp_path: Path, dtype: str) -> None:
    images = {f"{i}.npy": npy(twelve_bands(dtype, i)) for i in range(2)}
    images |= {
        f"{i}.tif": tiff(twelve_bands(dtype, i), photometric="minisblack", planarconfig="contig")
        for i in (2, 3)
    }
    for dataset, _ in (built(tmp_path, images), indexed(tmp_path, images)):
        assert dataset.manifest.pixels == Pixels(channels=12, dtype=dtype)
        assert dataset.manifest.format_version == 2
        assert verify(dataset) == []
        assert decoded(dataset)["3"].shape == (12, 32, 32)


@pytest.mark.parametrize(
    ("images", "pixels"),
    [
        (
            {"a.png": png(deep(rgb8())), "b.tif": tiff(deep(rgb8()), photometric="rgb")},
            Pixels(dtype="uint16"),
        ),
        ({"a.png": png(deep(rgb8())[..., :1])}, Pixels(channels=1, dtype="uint16")),
        ({"a.png": png(deep(rgb8())[..., :1]), "b.png": png(deep(rgb8()))}, Pixels(dtype="uint16")),
        ({"a.png": png(rgb8()[..., :1])}, RGB),
        ({"a.png": png(deep(rgb8())), "b.png": png(rgb8())}, RGB),
        (
            {"a.tif": tiff(rgb8()[..., :2], photometric="minisblack", planarconfig="contig")},
            Pixels(channels=2),
        ),
    ],
)
def test_mixtures_have_the_type_that_holds_for_all(tmp_path: Path, images: dict, pixels: Pixels) -> None:
    for dataset, _ in (built(tmp_path, images), indexed(tmp_path, images)):
        assert dataset.manifest.pixels == pixels
        decoded(dataset)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            {"a.png": png(rgb8()), "b.npy": npy(twelve_bands("uint8"))},
            r"b\S* .*has 12 channels, .*a\S* .*has 3 channels",
        ),
        (
            {"a.png": png(rgb8()), "b.npy": npy(np.ones((40, 40, 3), "f4"))},
            r"b.* has float32 values, .*a.* has uint8 values",
        ),
    ],
)
def test_images_that_do_not_fit_each_other_are_refused_by_name(
    tmp_path: Path, images: dict, message: str
) -> None:
    for make in (built, indexed):
        with pytest.raises(UserError, match=message):
            make(tmp_path, images)
    assert not (tmp_path / "tars" / "manifest.json").exists()


@pytest.mark.parametrize("make", [built, indexed])
def test_12_bits_in_16_bit_files_are_found_and_told(tmp_path: Path, make) -> None:
    mixed = {"a.png": png(TWELVE), "b.png": png(rgb8())}
    dataset, result = make(tmp_path / "mixed", mixed)
    assert dataset.manifest.pixels == Pixels(bits=12)
    assert any("--bits 16" in note for note in notes_of(result))
    crops = decoded(dataset)
    assert abs(crops["a"] - crops["b"]).mean() < 1
    dataset, _ = make(tmp_path / "all", {"a.png": png(TWELVE)})
    assert dataset.manifest.pixels == Pixels(dtype="uint16", bits=12)


@pytest.mark.parametrize("make", [built, indexed])
def test_the_user_may_say_how_many_bits_are_used(tmp_path: Path, make) -> None:
    mixed = {"a.png": png(TWELVE), "b.png": png(rgb8())}
    dataset, result = make(tmp_path, mixed, bits=16)
    assert dataset.manifest.pixels == RGB
    assert not any("bits" in note for note in notes_of(result))
    assert decoded(dataset)["a"].max() < 16


def test_16_bit_images_are_not_made_black_jpegs(tmp_path: Path) -> None:
    images = {"a.png": png(TWELVE)}
    with pytest.raises(UserError, match=r"use only 12 bits.*--bits 12"):
        built(tmp_path / "a", images, rgb_jpeg=True)
    dataset, _ = built(tmp_path / "b", images, rgb_jpeg=True, bits=12)
    reference, _ = built(tmp_path / "c", {"a.png": png(rgb8())}, rgb_jpeg=True)
    assert abs(decoded(dataset)["a"] - decoded(reference)["a"]).mean() < 1
    dataset, _ = built(tmp_path / "d", {"a.tif": tiff(TWELVE << 4, photometric="rgb")}, rgb_jpeg=True)
    assert abs(decoded(dataset)["a"] - decoded(reference)["a"]).mean() < 1


def test_shrunk_images_keep_bands_bits_and_floats(tmp_path: Path) -> None:
    for dtype in ("uint8", "uint16", "float32"):
        checked = check_image(npy(twelve_bands(dtype)), conversion=Conversion(shorter_side=20))
        assert (checked.extension, checked.width, checked.height) == ("tif", 25, 20)
        assert (checked.channels, checked.dtype) == (12, dtype)
        small = read_pixels(checked.data)
        assert (small.shape, small.dtype) == ((20, 25, 12), dtype)
        assert abs(small.mean() / twelve_bands(dtype).mean() - 1) < 0.02
    checked = check_image(npy(TWELVE), conversion=Conversion(shorter_side=20, bits=12))
    dataset, _ = built(tmp_path, {"a.tif": checked.data})
    assert dataset.manifest.pixels.bits == 12
    for format in ("WebP", "BMP", "GIF", "TIFF", "JPEG 2000", "AVIF", "JPEG XL"):
        checked = check_image(files()[format, "RGB"], conversion=Conversion(longer_side=64))
        assert (checked.extension, checked.width, checked.changed) == ("jpg", 64, True)


def test_any_page_of_a_tiff_may_be_taken(tmp_path: Path) -> None:
    pages = np.stack([rgb8(), 255 - rgb8()])
    images = {"a.tif": tiff(pages, photometric="rgb"), "b.tif": tiff(deep(pages), photometric="rgb")}
    first, result = built(tmp_path / "1", images)
    assert result.odd == {"TIFF without its other pages": 2}
    second, result = built(tmp_path / "2", images, page=2)
    assert (result.odd, result.changed) == ({"TIFF, page 2": 2}, 2)
    for key in ("a", "b"):
        assert abs(decoded(first)[key] + decoded(second)[key] - 255).mean() < 1.5
    with pytest.raises(UserError, match=r"no page 3: the TIFF has 2 pages"):
        built(tmp_path / "3", images, page=3)


def test_images_above_the_limit_are_read_if_they_are_made_smaller() -> None:
    wide = Image.new("RGB", (18_000, 10_000), (200, 100, 50))
    jpeg = saved(wide, "JPEG")
    with pytest.raises(ValueError, match=r"180 megapixels, more than 179.*--shorter-side"):
        check_image(jpeg)
    checked = check_image(jpeg, conversion=Conversion(shorter_side=100))
    assert (checked.width, checked.height) == (180, 100)
    assert abs(read_pixels(checked.data).astype(int) - [200, 100, 50]).max() <= 2


def cut(data: bytes, missing: int) -> bytes:
    return data[:-missing]


@pytest.mark.parametrize("missing", [1, 2, 3, 40, 2000])
@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "PNG 16-bit"])
def test_images_without_their_end_are_kept_on_request(tmp_path: Path, kind: str, missing: int) -> None:
    whole = {
        "JPEG": saved(picture(), "JPEG", quality=95),
        "progressive": saved(picture(), "JPEG", quality=95, progressive=True),
        "PNG": saved(picture(), "PNG"),
        "PNG 16-bit": png(deep(rgb8())),
    }[kind]
    data = cut(whole, missing)
    checked = check_image(data, conversion=Conversion(allow_truncated=True))
    if checked.changed:
        assert (checked.width, checked.height, checked.odd) == (301, 203, "truncated")
        check_image(checked.data)
        with pytest.raises(ValueError, match="--allow-truncated"):
            check_image(data)
    else:  # Pillow reads it as it is
        assert missing <= 3
        assert check_image(data).data == checked.data == data
    crops = []
    for name in ("cpu", "dali"):
        decoder = make_decoder(name, 64, 1)
        made = decoder([checked.data, whole], np.array([(0, 0, 203, 301)] * 2), np.zeros(2, bool))
        assert not made.bad
        crops.append(made.images.double())
    assert abs(crops[0] - crops[1])[0].mean() < 1
    top = slice(0, 32)
    assert abs(crops[0][0] - crops[0][1])[:, top].mean() < 3


def test_a_png_without_its_pixels_is_skipped(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r".+"):
        check_image(png(rgb8())[:40], conversion=Conversion(allow_truncated=True))


def test_a_file_beside_the_image_that_is_none_is_ignored(tmp_path: Path) -> None:
    """An embedding as .npy beside a .jpg; but a sample with nothing else is named."""
    images = {"a.jpg": saved(picture(), "JPEG"), "a.npy": npy(np.zeros(768))}
    dataset, _ = indexed(tmp_path, images)
    assert dataset.samples == 1
    with pytest.raises(UserError, match=r"b\.npy: the array's shape is 768"):
        indexed(tmp_path / "b", images | {"b.npy": npy(np.zeros(768))})


@pytest.mark.skipif(not IMAGENET_SAMPLE, reason="needs photographs: MAESTREAM_IMAGENET_SAMPLE")
def test_photographs_as_webp_in_img2datasets_layout_are_read(tmp_path: Path) -> None:
    """00000.tar with 000000000.webp, .json and .txt: no bad sample, and crops close to those of the JPEGs."""
    photographs = [path.read_bytes() for path in sorted(Path(IMAGENET_SAMPLE or "").rglob("*.JPEG"))[:200:10]]
    pixels = [read_pixels(data) for data in photographs]
    files: dict[str, bytes] = {}
    for i, image in enumerate(pixels):
        rgb = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
        description = {
            "caption": "a photograph",
            "key": f"{i:09d}",
            "status": "success",
            "width": image.shape[1],
        }
        files |= {
            f"{i:09d}.webp": imagecodecs.webp_encode(rgb, level=90, lossless=False),
            f"{i:09d}.json": json.dumps(description).encode(),
            f"{i:09d}.txt": b"a photograph",
        }
    dataset, _ = indexed(tmp_path, files)
    assert (dataset.samples, dataset.manifest.pixels) == (len(photographs), RGB)
    assert verify(dataset) == []
    for name in ("cpu", "dali"):
        crops = decoded(dataset, name)
        for i, (data, image) in enumerate(zip(photographs, pixels, strict=True)):
            box = centre_crops(np.array(image.shape[:1]), np.array(image.shape[1:2]), CENTRE, 1.0)
            jpeg = make_decoder("cpu", 32, 1)([data], box, np.zeros(1, bool)).images[0].double().numpy()
            assert abs(crops[f"{i:09d}"] - jpeg).mean() < 3
