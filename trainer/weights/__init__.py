"""Model weights: read checkpoints of maestream and of other projects, initialise models from them, export them.

api           load_encoder, load_classifier, load_mae: the functions that `maestream` exports
pretrained    read a model from a run, a model folder, a file or a URL
state_dicts   parameter names of the MAE authors, timm and transformers; architecture from shapes
files         read a weight file safely: size limits, no code execution
resize        adapt a model to another image size
init          initialise a model from other weights; freeze blocks
export        write a model in one of the formats of `formats`
model_card    the README.md of an export
"""
