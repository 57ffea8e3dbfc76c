"""Config of a model's architecture: encoder, masked autoencoder, classifier."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.images.pixels import Pixels
from trainer.config.base import Count, Positive, Share, StrictConfig

PixelValues = tuple[float, ...]
PixelScales = tuple[Positive, ...]


class EncoderConfig(StrictConfig):
    """Architecture of the ViT encoder. Defaults: ViT-B/16 (paper, section 4)."""

    image_size: Count | tuple[Count, Count] = 224
    """Height and width of the input in pixels: one number for square images, or [height, width]."""
    patch_size: Count = 16
    """Side of a square patch in pixels; it divides image_size."""
    width: Count = 768
    """Embedding dimension; divisible by heads and by 4."""
    depth: Count = 12
    """Number of transformer blocks."""
    heads: Count = 12
    """Number of attention heads."""
    channels: Count = 3
    """Number of colour channels or bands of the images. A dataset of grey images can be read with 1 or 3; any other dataset
    needs its own number."""
    pixel_dtype: Literal["uint8", "uint16", "float32"] = "uint8"
    """Type of the images' pixels, as in the dataset. Set when a run first starts."""
    pixel_bits: Annotated[int, Field(ge=1, le=16)] = 16
    """Significant bits of 16-bit pixels, as in the dataset: 12 if their values are below 4096. Set when a run first starts."""
    pixel_mean: PixelValues | None = None
    """Mean of each channel, which is subtracted from the pixels; 8-bit and 16-bit pixels are scaled to [0, 1] first. Set by
    data.normalise when a run first starts; null: ImageNet's."""
    pixel_std: PixelScales | None = None
    """Standard deviation of each channel, by which the pixels are then divided. Set like pixel_mean."""

    @property
    def pixels(self) -> Pixels:
        """The images that the model takes."""
        return Pixels(channels=self.channels, dtype=self.pixel_dtype, bits=self.pixel_bits)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.size[0] // self.patch_size, self.size[1] // self.patch_size

    @property
    def encoder(self) -> "EncoderConfig":
        """The encoder part of this config; subclasses add a decoder or a head."""
        return EncoderConfig(**{name: getattr(self, name) for name in EncoderConfig.model_fields})

    @property
    def num_patches(self) -> int:
        """L, the number of patches per image."""
        return self.grid[0] * self.grid[1]

    @model_validator(mode="after")
    def _check_divisibility(self) -> "EncoderConfig":
        if any(side % self.patch_size for side in self.size):
            raise ValueError(f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        _check_width("width", self.width, "heads", self.heads)
        return self

    @model_validator(mode="after")
    def _check_pixels(self) -> "EncoderConfig":
        if (self.pixel_mean is None) != (self.pixel_std is None):
            raise ValueError("pixel_mean and pixel_std must be set together")
        for name, values in (("pixel_mean", self.pixel_mean), ("pixel_std", self.pixel_std)):
            if values is not None and len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} values, but channels is {self.channels}")
        return self


def _check_width(width_key: str, width: int, heads_key: str, heads: int) -> None:
    if width % heads:
        raise ValueError(f"{width_key} {width} is not divisible by {heads_key} {heads}")
    if width % 4:
        raise ValueError(f"{width_key} {width} is not divisible by 4 (2-D sin-cos position embedding)")


class ModelConfig(EncoderConfig):
    """Architecture of the masked autoencoder. Defaults: the paper's (section 4)."""

    decoder_width: Count = 512
    """Embedding dimension of the decoder; divisible by decoder_heads and by 4 (paper, Table 1b)."""
    decoder_depth: Count = 8
    """Number of decoder blocks (paper, Table 1a)."""
    decoder_heads: Count = 16
    """Number of attention heads in the decoder (the authors' models_mae.py)."""
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Share of the patches that are masked (paper, section 4)."""
    norm_pix: bool = True
    """Whether the target is each patch's pixels normalised by that patch's mean and variance (paper, Table 3)."""
    sampling: Literal["random", "block", "grid"] = "random"
    """How masked patches are chosen (paper, Table 1f); grid keeps one of four patches and needs mask_ratio 0.75."""
    masked: Literal["nothing", "token", "noise"] = "nothing"
    """Encoder input at masked patches: nothing, a mask token (paper, Table 1c), or, as in a denoising autoencoder,
    Gaussian noise added to all patches, with the loss over all patches."""

    @property
    def num_visible(self) -> int:
        """K, the number of patches per image that are not masked."""
        return int(self.num_patches * (1 - self.mask_ratio))

    @model_validator(mode="after")
    def _check_decoder_and_masking(self) -> "ModelConfig":
        _check_width("decoder_width", self.decoder_width, "decoder_heads", self.decoder_heads)
        if self.sampling == "grid" and self.mask_ratio != 0.75:
            raise ValueError("sampling=grid keeps one of four patches, so mask_ratio must be 0.75")
        if self.num_visible < 1:
            raise ValueError(f"mask_ratio {self.mask_ratio} leaves no visible patch; lower it")
        return self


class ClassifierConfig(EncoderConfig):
    """Architecture of an encoder with a classification head."""

    pool: Literal["mean", "class"] = "mean"
    """Input of the head: the mean of the patch tokens, or the class token."""
    drop_path: Share = 0.1
    """Stochastic depth rate of the last block; it grows linearly from 0 at the first block."""
