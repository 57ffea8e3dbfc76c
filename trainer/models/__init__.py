"""The networks and the masks they are trained with.

vit              ViT blocks, patch and position embedding, shared by all models
mae              the masked autoencoder
classifier       encoder, and encoder with a classification head
probe            frozen encoder with a linear classifier
masking          which patches are masked
pixels           which images a model takes, and how they are normalised
device_hashing   counter-based random numbers on the device

Parity: given the same weights and noise, the MAE gives the numbers of the authors' code, and parameter names are the
authors', so their checkpoints load. Masks are a pure function of (seed, epoch, sample id): no generator state is saved.
"""
