"""Export formats. This module does not import torch, so that the command line can refuse a wrong option at once.

safetensors    model.safetensors with maestream's parameter names, and config.json; all commands accept it in place of a run
transformers   ViTMAEForPreTraining; an encoder alone: ViTModel; a classifier: ViTForImageClassification
timm           state dict and config.json of timm's VisionTransformer; encoder or classifier only
authors        model.pth, written by torch.save as {"model": …}, for the MAE authors' code
onnx           model.onnx: images → tokens or logits, for any batch size; encoder or classifier only
torch-export   model.pt2: the same for torch.export.load
"""

FORMATS = ("safetensors", "transformers", "timm", "authors", "onnx", "torch-export")
ENCODER_ONLY = ("timm", "onnx", "torch-export")  # formats that cannot hold an MAE's decoder
