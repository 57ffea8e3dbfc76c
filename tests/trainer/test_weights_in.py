"""Weights come in, by their keys: the authors' files, whatever they are called, and nothing that is hostile."""

import argparse
import http.server
import io
import json
import os
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from authors import SIZES, decoded, encoded, normed, random_weights, shapes
from safetensors.torch import save_file

from pipeline.errors import UserError
from trainer import weight_files
from trainer.classifier import Classifier, Encoder
from trainer.config import ClassifierConfig, EncoderConfig, InitConfig, ModelConfig
from trainer.initial import load_encoder, load_mae
from trainer.mae import MAE
from trainer.pretrained import About, encoder_of, interpolated, read_pretrained, resized, stated
from trainer.vit import sincos_positions

KINDS: dict[str, type[EncoderConfig]] = {
    "pretrain": EncoderConfig,
    "visualize": ModelConfig,
    "finetuned": ClassifierConfig,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_the_authors_files_are_known_by_their_keys(kind: str, size: str, tmp_path: Path) -> None:
    """All keys and shapes of the real ones; every tensor is one number that is said to be many."""
    width, depth, heads, patch = SIZES[size]
    table = shapes(kind, width, depth, patch)
    torch.save(
        {"model": {name: torch.ones(1).expand(shape) for name, shape in table.items()}}, tmp_path / "x"
    )
    found = read_pretrained(str(tmp_path / "x"))
    assert type(found.model) is KINDS[kind]
    expected = {"image_size": 224, "patch_size": patch, "width": width, "depth": depth, "heads": heads}
    if kind == "visualize":
        expected |= {"decoder_width": 512, "decoder_depth": 8, "decoder_heads": 16, "norm_pix": False}
    if kind == "finetuned":
        expected |= {"pool": "mean"}
    assert found.model == KINDS[kind](**expected)
    assert found.weights.keys() == table.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_an_import_gives_the_features_of_its_layout(kind: str, size: str, tmp_path: Path) -> None:
    """Of the real width, heads and patches, in one block and four patches."""
    width, _, heads, patch = SIZES[size]
    weights = random_weights(shapes(kind, width, 1, patch, 2 * patch, d_depth=1))
    torch.save({"model": weights}, tmp_path / "weights.pth")
    found = read_pretrained(str(tmp_path / "weights.pth"))
    images = torch.randn(2, 3, 2 * patch, 2 * patch)
    tokens = encoded(weights, images, heads)
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    if kind == "finetuned":
        model = Classifier(found.model, 1000).eval()
        model.load_state_dict(found.weights)
        features = normed(weights, "fc_norm", tokens[:, 1:].mean(dim=1))
        close(model.features(images), features)
        close(model(images), features @ weights["head.weight"].T + weights["head.bias"])
        return
    pixels = torch.randint(0, 256, (2, 3, 2 * patch, 2 * patch), dtype=torch.uint8)
    encoder = encoder_of(str(tmp_path / "weights.pth"))
    latent = normed(weights, "norm", encoded(weights, encoder.normalise(pixels), heads))
    close(encoder(pixels), latent)
    if kind == "visualize":
        mae = MAE(found.model)
        mae.kept = 4
        mae.load_state_dict(found.weights)
        in_order = torch.arange(4.0).expand(2, 4)
        close(mae.predict(encoder.normalise(pixels), in_order)[0], decoded(weights, latent, 16))


def small(kind: str = "visualize", image: int = 32, patch: int = 8) -> dict[str, torch.Tensor]:
    return random_weights(shapes(kind, 24, 2, patch, image, d=16, d_depth=1))


TOLD = {"heads": 3, "decoder_heads": 2}


def test_a_training_checkpoint_tells_its_targets(tmp_path: Path) -> None:
    args = argparse.Namespace(norm_pix_loss=True, mask_ratio=0.5, model="mae_vit_large_patch16")
    torch.save(
        {"model": small(), "optimizer": {"state": {}}, "epoch": 3, "args": args},
        tmp_path / "checkpoint-3.pth",
    )
    model = read_pretrained(str(tmp_path / "checkpoint-3.pth"), told=TOLD).model
    assert isinstance(model, ModelConfig)
    assert (model.norm_pix, model.mask_ratio) == (True, 0.5)


def test_heads_that_nothing_tells_are_asked_for(tmp_path: Path) -> None:
    save_file(small("pretrain"), tmp_path / "w")
    with pytest.raises(UserError, match=r"how many heads a width of 24 has.*--heads N"):
        read_pretrained(str(tmp_path / "w"))
    assert read_pretrained(str(tmp_path / "w"), told=TOLD).model.heads == 3


# ---- another image, another patch


def test_positions_are_interpolated_for_another_image(tmp_path: Path) -> None:
    weights = small()
    weights["pos_embed"] = sincos_positions(24, (4, 4))
    save_file(weights, tmp_path / "w")
    found = read_pretrained(str(tmp_path / "w"), told=TOLD)
    larger = resized(found, (48, 64))
    assert larger.model.grid == (6, 8)
    assert torch.equal(larger.weights["pos_embed"], interpolated(weights["pos_embed"], (4, 4), (6, 8)))
    assert larger.weights["decoder_pos_embed"].shape == (1, 49, 16)
    mae = MAE(larger.model)
    mae.load_state_dict(larger.weights)
    assert mae(torch.zeros(1, 3, 48, 64, dtype=torch.uint8), torch.rand(1, 48)).isfinite()
    # it is the same picture of positions: what lies in the corner stays nearest to the corner
    likeness = larger.weights["pos_embed"][0, 1:] @ weights["pos_embed"][0, 1]
    assert int(likeness.argmax()) == 0
    with pytest.raises(UserError, match=r"--image-size: .*not divisible by patch_size 8"):
        resized(found, (48, 60))


def test_another_patch_size_is_refused_with_the_reason(tmp_path: Path) -> None:
    save_file(small("pretrain"), tmp_path / "w")
    encoder = Encoder(EncoderConfig(image_size=32, patch_size=16, width=24, depth=2, heads=3))
    with pytest.raises(
        UserError, match="its patches are 8 pixels wide, not 16: positions can be interpolated"
    ):
        load_encoder(InitConfig(run=str(tmp_path / "w")), encoder, "norm")


def test_a_run_begins_with_any_of_them(tmp_path: Path) -> None:
    weights = small()
    save_file(weights, tmp_path / "w")
    init = InitConfig(run=str(tmp_path / "w"))
    shape = {"image_size": 48, "patch_size": 8, "width": 24, "depth": 2, "heads": 3}
    encoder = Encoder(EncoderConfig(**shape))
    load_encoder(init, encoder, "norm")
    assert torch.equal(encoder.blocks[1].mlp.fc2.weight, weights["blocks.1.mlp.fc2.weight"])
    assert torch.equal(encoder.pos_embed, interpolated(weights["pos_embed"], (4, 4), (6, 6)))
    mae = MAE(ModelConfig(**shape, decoder_width=16, decoder_depth=1, decoder_heads=2))
    load_mae(init, mae)
    assert torch.equal(mae.decoder_pred.bias, weights["decoder_pred.bias"])
    other = MAE(ModelConfig(**shape, decoder_width=32, decoder_depth=1, decoder_heads=2))
    with pytest.raises(UserError, match=r"decoder_.* is \[.*not \["):
        load_mae(init, other)
    other_heads = Encoder(EncoderConfig(**{**shape, "heads": 6}))
    torch.save(
        {"model": weights, "maestream": stated(About("", mae.config.model_copy(update={"image_size": 32})))},
        tmp_path / "told",
    )
    with pytest.raises(UserError, match="it has 3 heads, not 6"):
        load_encoder(InitConfig(run=str(tmp_path / "told")), other_heads, "norm")
    # an encoder alone leaves the decoder as it was
    save_file(small("pretrain"), tmp_path / "encoder")
    before = other.decoder_pred.weight.clone()
    load_mae(InitConfig(run=str(tmp_path / "encoder")), other)
    assert torch.equal(other.decoder_pred.weight, before)
    assert torch.equal(other.norm.bias, small("pretrain")["norm.bias"])
    save_file(small("finetuned"), tmp_path / "finetuned")
    with pytest.raises(UserError, match=r"norm\.bias is missing"):
        load_encoder(InitConfig(run=str(tmp_path / "finetuned")), encoder, "norm")


# ---- hostile and damaged files: one clear message, nothing is run


class Code:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


class Bomb:
    def __reduce__(self) -> Any:
        return bytearray, (64 << 30,)


def saved(tree: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree, buffer, **how)
    return buffer.getvalue()


def compressed(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return buffer.getvalue()


def as_safetensors(weights: dict[str, torch.Tensor], folder: Path) -> bytes:
    save_file(weights, folder / "temporary")
    return (folder / "temporary").read_bytes()


def nan(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights["blocks.1.norm2.bias"][3] = float("nan")
    return weights


def without(name: str) -> dict[str, torch.Tensor]:
    weights = small("pretrain")
    del weights[name]
    return weights


OLD = {"_use_new_zipfile_serialization": False}
FILES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "code": (lambda f: saved({"model": small() | {"a": Code(f / "ran")}}), "nothing in it was run: it names posix.mkdir"),
    "code, as torch once saved": (lambda f: saved(Code(f / "ran"), **OLD), "nothing in it was run"),
    "code beside": (lambda f: saved({"model": small(), "args": Code(f / "ran")}), "nothing in it was run"),
    "a pickle that asks for 64 GB": (lambda f: saved({"model": small(), "args": Bomb()}), "asks for far more memory"),
    "a model that is too deep": (
        lambda f: saved(small("pretrain") | {"blocks.9999.norm1.bias": torch.ones(24)}),
        "too few for 10000 blocks$",
    ),
    "an odd head": (lambda f: saved(small("finetuned") | {"head.weight": torch.tensor(1.0)}), "head.weight is .* axes"),
    "truncated": (lambda f: saved(small())[:-4000], "is damaged or cut short"),
    "truncated in front": (lambda f: saved(small())[:100], "is damaged or cut short"),
    "truncated, as torch once saved": (lambda f: saved(small(), **OLD)[:5000], "is damaged or cut short"),
    "truncated safetensors": (lambda f: as_safetensors(small(), f)[:-100], "is damaged or cut short"),
    "truncated header": (lambda f: as_safetensors(small(), f)[:100], "is damaged or cut short"),
    "a 10 GB header": (lambda f: struct.pack("<Q", 10 << 30) + b"{" + bytes(100), "is damaged or cut short"),
    "empty": (lambda f: b"", "is empty"),
    "a picture": (lambda f: b"\x89PNG\r\n\x1a\n" + bytes(100), "is no file of weights"),
    "a list": (lambda f: saved([torch.ones(2)]), "no weights by their names in it, it is a list"),
    "nothing": (lambda f: saved({"model": {}}), "has no weights in it"),
    "whole numbers": (lambda f: saved({"cls_token": torch.ones(1, 1, 24).long()}), "wrong type.*weights are floats"),
    "a number": (lambda f: saved({"model": {"cls_token": 3.0}}), "cls_token is a float, not a tensor"),
    "sparse": (lambda f: saved({"cls_token": torch.eye(4).to_sparse()}), "wrong type"),
    "nowhere": (lambda f: saved({"cls_token": torch.empty(4, device="meta")}), "wrong type"),
    "not finite": (lambda f: as_safetensors(nan(small()), f), r"not finite \(blocks.1.norm2.bias\)"),
    "compressed": (lambda f: compressed(saved(small())), "is a compressed archive"),
    "claims": (lambda f: saved({"cls_token": torch.ones(1).expand(1, 1, 1 << 40)}), "claims more than 16 GiB"),
    "a missing key": (lambda f: saved(without("blocks.1.attn.proj.bias")), "blocks.1.attn.proj.bias is missing$"),
    "no positions": (lambda f: saved(without("pos_embed")), "has no pos_embed"),
    "an odd key": (
        lambda f: saved(small("pretrain") | {"blocks.0.norm1.weight": torch.ones(25)}),
        r"blocks.0.norm1.weight is \[25\], not \[24\]$",
    ),
    "an unknown key": (lambda f: saved(small() | {"blocks.0.ls1.gamma": torch.ones(24)}), "ls1.gamma is not known$"),
    "no square": (
        lambda f: saved(small("pretrain") | {"pos_embed": torch.ones(1, 19, 24)}),
        "no square of patches and a class token",
    ),
    "another model": (lambda f: saved({"conv1.weight": torch.ones(3)}), "no ViT of a layout that is known"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_hostile_and_damaged_files_are_refused(name: str, tmp_path: Path) -> None:
    make, message = FILES[name]
    (tmp_path / "w.pth").write_bytes(make(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        read_pretrained(str(tmp_path / "w.pth"), told=TOLD)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not (tmp_path / "ran").exists()


def test_torch_without_its_guard_would_have_run_the_code(tmp_path: Path) -> None:
    """So the files above are hostile indeed."""
    torch.load(io.BytesIO(FILES["code"][0](tmp_path)), weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"model_type": "beit"}', "has a model of type beit"),
        ('{"model_type": "vit", "num_attention_heads": 5}', "width 24 is not divisible by heads 5"),
        ('{"model_type": "vit", "num_attention_heads": "many"}', "heads|valid integer"),
        ('{"model_type": "vit", "num_attention_heads": 3, "image_size": 40}', "pos_embed is .* not"),
        ('{"maestream": 2}', "has version 2 of the format, this reads 1"),
        ('{"maestream": 1, "kind": "encoder"}', "is damaged"),
        ('{"maestream": 1, "kind": [], "model": {}}', "is damaged"),
        ('{"maestream": 1, "kind": "encoder", "model": {}, "source": ["a"]}', "is damaged"),
        (
            '{"maestream": 1, "kind": "encoder", "model": {"image_size": 8000000, "patch_size": 8}}',
            "pos_embed is .* not",
        ),
        ("[" * 100_000, "is damaged"),
        ('{"model_type": "vit", "num_attention_heads": 3, "hidden_act": "relu"}', "relu between the layers"),
        ('{"architecture": "vit", "model_args": {"img_size": [[1], [2]], "num_heads": 3}}', "valid integer"),
        ('{"architecture": "vit", "model_args": ["img_size"], "pretrained_cfg": 5, "x": 0}', None),
        ('{"architecture": "vit", "pretrained_cfg": {"mean": 5}}', None),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config: str, message: str | None, tmp_path: Path) -> None:
    save_file(small("pretrain"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    if message is None:  # of no account
        read_pretrained(str(tmp_path), told=TOLD)
        return
    with pytest.raises(UserError, match=message) as caught:
        read_pretrained(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_head_of_timms_that_reads_the_mean_of_normed_patches_is_refused(tmp_path: Path) -> None:
    """Such as there are with global_pool "avg" and no fc_norm: not to be taken for one that reads the class token."""
    head = {"head.weight": torch.ones(7, 24), "head.bias": torch.ones(7)}
    save_file(small("pretrain") | head, tmp_path / "model.safetensors")
    for pool in ("avg", "token"):
        config = {"architecture": "vit", "global_pool": pool, "model_args": {"num_heads": 3}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if pool == "token":
            assert read_pretrained(str(tmp_path)).about.classes == 7
        else:
            with pytest.raises(UserError, match=r"fc_norm.weight is missing"):
                read_pretrained(str(tmp_path))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run, not a folder of a model"):
        read_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match=r"no model.safetensors or pytorch_model.bin"):
        read_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=r"there is no such file|is not a run"):
        read_pretrained(str(tmp_path / "nothing.pth"))
    with pytest.raises(UserError, match="it has no steps"):
        read_pretrained(str(tmp_path), step=3)


# ---- the web


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server's URL, and the folder that it serves."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    folder = tmp_path / "web"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}", folder
    server.shutdown()
    server.server_close()


def test_weights_come_from_the_web_within_bounds(
    web: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, folder = web
    torch.save({"model": small()}, folder / "w.pth")
    found = read_pretrained(f"http://{host}/w.pth", told=TOLD)
    assert torch.equal(found.weights["norm.bias"], small()["norm.bias"])
    # what a URL tells besides is kept nowhere
    signed = f"http://me:hush@{host}/w.pth?X-Amz-Signature=hush"
    assert "hush" not in json.dumps(read_pretrained(f"{signed}&auth=hush", told=TOLD).about.source)
    for url, message in (
        (signed.replace("w.pth", "gone.pth"), "there is no such file"),
        (signed.replace(host, "127.0.0.1:9"), "cannot be read"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_pretrained(url)
        assert "hush" not in str(caught.value)
    monkeypatch.setattr(weight_files, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match="more than 0 GiB: refused"):
        read_pretrained(f"http://{host}/w.pth")
