"""What a model can be exported as. Without torch, which takes seconds to import: a command that is refused should be so at
once.

    safetensors    model.safetensors with our names, config.json: what `init`, `reconstruct`, `knn`, … take like a run
    transformers   ViTMAEForPreTraining, of an encoder alone ViTModel, of a classifier ViTForImageClassification
    timm           a vision_transformer's state dict, and its config.json; no decoder
    authors        model.pth, as torch.save writes it: {"model": …}, for the paper's own code
    onnx           model.onnx: images → tokens, or logits; any batch
    torch-export   model.pt2: the same, for torch.export.load
"""

FORMATS = ("safetensors", "transformers", "timm", "authors", "onnx", "torch-export")
ENCODER_ONLY = ("timm", "onnx", "torch-export")  # they have no place for a decoder
