"""timm loads our exports and computes the same outputs.

timm needs torchvision, which has no build for the CPU version of torch here, so this runs on machines with a GPU, whose images
have both. It is skipped if timm cannot be imported.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.storage.store import open_store
from trainer.config.model_schema import ClassifierConfig, EncoderConfig
from trainer.models.vit import ViT
from trainer.weights.export import export
from trainer.weights.pretrained import ModelInfo, PretrainedModel, read_pretrained
from trainer.weights.state_dicts import build_model

try:
    import timm
except Exception as error:  # torchvision's registration of operators raises RuntimeError
    pytest.skip(f"timm cannot be imported: {error}", allow_module_level=True)

SMALL = {"image_size": (32, 48), "patch_size": 8, "width": 24, "depth": 2, "heads": 3}
MODELS = [
    EncoderConfig(**SMALL),
    ClassifierConfig(**SMALL, pool="class"),
    ClassifierConfig(**SMALL, pool="mean"),
    EncoderConfig(image_size=32, patch_size=16, depth=1),  # a ViT-B's width
]


def make_pretrained(model: EncoderConfig) -> tuple[PretrainedModel, ViT]:
    torch.manual_seed(0)
    ours = build_model(model, classes=5).eval()
    weights = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in ours.state_dict().items()}
    ours.load_state_dict(weights)
    return PretrainedModel(ModelInfo("test", model, classes=5), weights), ours


def outputs(theirs: torch.nn.Module, ours: ViT) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randint(0, 256, (3, 3, *(p * ours.patch_size for p in ours.grid)), dtype=torch.uint8)
    with torch.no_grad():
        asked = theirs if hasattr(ours, "head") else theirs.forward_features
        return asked(ours.normalise(images)), ours(images)


@pytest.mark.parametrize(
    "model", MODELS, ids=["encoder", "class token", "mean of patches", "width of a ViT-B"]
)
def test_timm_computes_the_same(model: EncoderConfig, tmp_path: Path) -> None:
    found, ours = make_pretrained(model)
    export(found, "timm", open_store(str(tmp_path)))
    stated = json.loads((tmp_path / "config.json").read_text())
    classes = stated["num_classes"]
    theirs = timm.create_model(stated["architecture"], num_classes=classes, **stated["model_args"]).eval()
    theirs.load_state_dict(load_file(tmp_path / "model.safetensors"))
    torch.testing.assert_close(*outputs(theirs, ours), rtol=1e-5, atol=1e-5)
    # directly from the folder
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(*outputs(loaded, ours), rtol=1e-5, atol=1e-5)
    # weights saved by timm are imported again, bit for bit
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    back = read_pretrained(
        str(tmp_path / "timm.pth"), hints={"heads": model.heads, "image_size": model.image_size}
    )
    assert all(torch.equal(back.weights[name], tensor) for name, tensor in found.weights.items())
