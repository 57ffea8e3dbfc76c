"""Weights files and downloads: damaged and hostile ones are refused with one message, and no code in them is run."""

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
from safetensors.torch import save_file
from torch import nn

from pipeline.errors import UserError
from tests.support.training.published_mae import HINTS, small
from trainer.weights import files as weight_files
from trainer.weights.pretrained import read_pretrained


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


def exported_program() -> bytes:
    file = io.BytesIO()
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), file)
    return file.getvalue()


OLD = {"_use_new_zipfile_serialization": False}
FILES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "code": (lambda f: saved({"model": small() | {"a": Code(f / "ran")}}), "no code in it was run: it names posix.mkdir"),
    "code, old torch format": (lambda f: saved(Code(f / "ran"), **OLD), "no code in it was run"),
    "code outside the weights": (lambda f: saved({"model": small(), "args": Code(f / "ran")}), "no code in it was run"),
    "a pickle that asks for 64 GB": (lambda f: saved({"model": small(), "args": Bomb()}), "asks for far more memory"),
    "a model that is too deep": (
        lambda f: saved(small("pretrain") | {"blocks.9999.norm1.bias": torch.ones(24)}),
        "too few for 10000 blocks$",
    ),
    "a scalar head": (lambda f: saved(small("finetuned") | {"head.weight": torch.tensor(1.0)}), "head.weight has shape .* 2 dimensions"),
    "truncated": (lambda f: saved(small())[:-4000], "is damaged or truncated"),
    "truncated to its start": (lambda f: saved(small())[:100], "is damaged or truncated"),
    "truncated, old torch format": (lambda f: saved(small(), **OLD)[:5000], "is damaged or truncated"),
    "truncated safetensors": (lambda f: as_safetensors(small(), f)[:-100], "is damaged or truncated"),
    "truncated header": (lambda f: as_safetensors(small(), f)[:100], "is damaged or truncated"),
    "a 10 GB header": (lambda f: struct.pack("<Q", 10 << 30) + b"{" + bytes(100), "is damaged or truncated"),
    "empty": (lambda f: b"", "is empty"),
    "an image": (lambda f: b"\x89PNG\r\n\x1a\n" + bytes(100), "is not a weight file"),
    "a list": (lambda f: saved([torch.ones(2)]), "contains a list, expected a dictionary of named tensors"),
    "an exported program": (lambda f: exported_program(), "is an exported program, which cannot be imported"),
    "no weights": (lambda f: saved({"model": {}}), "contains no weights"),
    "integers": (lambda f: saved({"cls_token": torch.ones(1, 1, 24).long()}), "wrong type.*must be dense float tensors"),
    "a number": (lambda f: saved({"model": {"cls_token": 3.0}}), "cls_token is a float, not a tensor"),
    "sparse": (lambda f: saved({"cls_token": torch.eye(4).to_sparse()}), "wrong type"),
    "meta tensor": (lambda f: saved({"cls_token": torch.empty(4, device="meta")}), "wrong type"),
    "not finite": (lambda f: as_safetensors(nan(small()), f), r"not finite \(blocks.1.norm2.bias\)"),
    "compressed": (lambda f: compressed(saved(small())), "it is a compressed archive"),
    "larger than it is": (lambda f: saved({"cls_token": torch.ones(1).expand(1, 1, 1 << 40)}), "claims more than 16 GiB"),
    "a missing key": (lambda f: saved(without("blocks.1.attn.proj.bias")), "blocks.1.attn.proj.bias is missing$"),
    "no position embedding": (lambda f: saved(without("pos_embed")), "has no parameter pos_embed"),
    "a wrong shape": (
        lambda f: saved(small("pretrain") | {"blocks.0.norm1.weight": torch.ones(25)}),
        r"blocks.0.norm1.weight has shape \[25\], expected \[24\]$",
    ),
    "an unknown key": (lambda f: saved(small() | {"blocks.0.ls1.gamma": torch.ones(24)}), "ls1.gamma is unknown$"),
    "no square grid": (
        lambda f: saved(small("pretrain") | {"pos_embed": torch.ones(1, 19, 24)}),
        "not a class token and a square grid of patches",
    ),
    "another model": (lambda f: saved({"conv1.weight": torch.ones(3)}), "is not a supported ViT"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_hostile_and_damaged_files_are_refused(name: str, tmp_path: Path) -> None:
    make, message = FILES[name]
    (tmp_path / "w.pth").write_bytes(make(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        read_pretrained(str(tmp_path / "w.pth"), hints=HINTS)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
def test_folders_of_exported_programs_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x08\n\x12\x07pytorch" + bytes(100))
    with pytest.raises(
        UserError, match="is an exported program, which cannot be imported: use a safetensors"
    ):
        read_pretrained(str(tmp_path))
    if name == "model.onnx":
        with pytest.raises(UserError, match="is an exported program"):
            read_pretrained(str(tmp_path / name))


def test_an_unsafe_load_would_run_the_code(tmp_path: Path) -> None:
    """So the files above are indeed hostile."""
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
        (
            '{"model_type": "vit", "num_attention_heads": 3, "image_size": 40}',
            "pos_embed has shape .* expected",
        ),
        ('{"maestream": 2}', "has format version 2; this version of maestream reads 1"),
        ('{"maestream": 1, "kind": "encoder"}', "is damaged"),
        ('{"maestream": 1, "kind": [], "model": {}}', "is damaged"),
        ('{"maestream": 1, "kind": "encoder", "model": {}, "source": ["a"]}', "is damaged"),
        (
            '{"maestream": 1, "kind": "encoder", "model": {"image_size": 8000000, "patch_size": 8}}',
            "pos_embed has shape .* expected",
        ),
        ("[" * 100_000, "is damaged"),
        ('{"model_type": "vit", "num_attention_heads": 3, "hidden_act": "relu"}', "activation relu"),
        ('{"architecture": "vit", "model_args": {"img_size": [[1], [2]], "num_heads": 3}}', "valid integer"),
        ('{"architecture": "vit", "model_args": ["img_size"], "pretrained_cfg": 5, "x": 0}', None),
        ('{"architecture": "vit", "pretrained_cfg": {"mean": 5}}', None),
    ],
)
def test_an_invalid_config_is_refused(config: str, message: str | None, tmp_path: Path) -> None:
    save_file(small("pretrain"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    if message is None:  # the entry is not used
        read_pretrained(str(tmp_path), hints=HINTS)
        return
    with pytest.raises(UserError, match=message) as caught:
        read_pretrained(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_timm_head_without_fc_norm_is_refused_unless_it_reads_the_class_token(tmp_path: Path) -> None:
    """With global_pool "avg" and no fc_norm, timm normalises before the mean, which no maestream model does."""
    head = {"head.weight": torch.ones(7, 24), "head.bias": torch.ones(7)}
    save_file(small("pretrain") | head, tmp_path / "model.safetensors")
    for pool in ("avg", "token"):
        config = {"architecture": "vit", "global_pool": pool, "model_args": {"num_heads": 3}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if pool == "token":
            assert read_pretrained(str(tmp_path)).info.classes == 7
        else:
            with pytest.raises(UserError, match=r"fc_norm.weight is missing"):
                read_pretrained(str(tmp_path))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run, a model folder or a weight file"):
        read_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(UserError, match=r"no model.safetensors or pytorch_model.bin"):
        read_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=r"no such file|is not a run"):
        read_pretrained(str(tmp_path / "nothing.pth"))
    with pytest.raises(UserError, match="is not a run and has no checkpoints"):
        read_pretrained(str(tmp_path), step=3)


# ---- downloads


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Host and port of a web server, and the folder that it serves."""

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


def test_downloads_are_limited_in_size_and_keep_no_secrets(
    web: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, folder = web
    torch.save({"model": small()}, folder / "w.pth")
    found = read_pretrained(f"http://{host}/w.pth", hints=HINTS)
    assert torch.equal(found.weights["norm.bias"], small()["norm.bias"])
    # user, password and query of a URL are not stored
    signed = f"http://me:hush@{host}/w.pth?X-Amz-Signature=hush"
    assert "hush" not in json.dumps(read_pretrained(f"{signed}&auth=hush", hints=HINTS).info.source)
    for url, message in (
        (signed.replace("w.pth", "gone.pth"), "no such file"),
        (signed.replace(host, "127.0.0.1:9"), "cannot read or write"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            read_pretrained(url)
        assert "hush" not in str(caught.value)
    monkeypatch.setattr(weight_files, "MAX_BYTES", 1000)
    with pytest.raises(UserError, match="is refused: it has more than 0 GiB"):
        read_pretrained(f"http://{host}/w.pth")
