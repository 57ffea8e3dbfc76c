"""The type of a dataset's images."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Dtype = Literal["uint8", "uint16", "float32"]


class Pixels(BaseModel):
    """The type of a dataset's images. The default holds for all mixtures of 8-bit grey and RGB images."""

    model_config = ConfigDict(frozen=True)

    channels: int = 3
    dtype: Dtype = "uint8"
    # Significant bits of 16-bit images: 12 if their values are 0 to 4095. Images whose files say how many bits they have
    # (TIFF, JPEG 2000, AVIF, JPEG XL) are scaled to this number.
    bits: int = 16


RGB = Pixels()
