"""The types of a dataset's images, and the one type that its batches get."""

from collections.abc import Callable

from pydantic import BaseModel

from pipeline.errors import UserError
from pipeline.images.pixels import Dtype, Pixels

DEPTHS = (8, 10, 12, 14, 16)  # of cameras and scanners


class ImageKinds(BaseModel):
    """Which types of images there are. Can be collected in parts and merged."""

    first: dict[str, str] = {}  # "12 uint16" (channels, dtype) → name of the first such image
    bits: int = 0  # the most that a 16-bit image's file says, or its values use; 0 if there are none
    found: bool = False  # whether these bits were found by values

    def add(self, name: str, channels: int, dtype: Dtype, bits: int = 0, found: bool = False) -> None:
        """Add an image. `bits` and `found` of a 16-bit image: as above."""
        self.first.setdefault(f"{channels} {dtype}", name)
        if bits > self.bits:
            self.bits, self.found = bits, found

    def merge(self, other: "ImageKinds") -> None:
        """Add other images."""
        self.first = other.first | self.first
        if other.bits > self.bits:
            self.bits, self.found = other.bits, other.found

    def pixels(self, bits: int | None = None) -> Pixels:
        """The type of the batches. UserError if there is none for these images.

        Args:
            bits: significant bits of 16-bit images, if the user said.
        """
        kinds = [(int(kind.split()[0]), kind.split()[1]) for kind in sorted(self.first)]
        channels, dtypes = {kind[0] for kind in kinds}, {kind[1] for kind in kinds}
        if len(channels) > 1 and not channels <= {1, 3}:
            self._refuse("channels", lambda kind: kind.split()[0])
        if "float32" in dtypes and len(dtypes) > 1:
            self._refuse("values", lambda kind: kind.split()[1])
        dtype: Dtype = "uint8" if "uint8" in dtypes else "uint16" if "uint16" in dtypes else "float32"
        if not kinds or (channels <= {1, 3} and dtype == "uint8"):
            return Pixels(bits=self.used_bits(bits))
        return Pixels(channels=max(channels), dtype=dtype, bits=self.used_bits(bits))

    def used_bits(self, bits: int | None = None) -> int:
        """The significant bits of 16-bit images: what the user said, or else what was found; 16 if there are none."""
        if not self.bits:
            return 16
        return bits or next(depth for depth in DEPTHS if depth >= self.bits)

    def note(self, bits: int | None = None) -> str | None:
        """What to tell about the bits, or None."""
        used = self.used_bits(bits)
        if bits or used == 16 or not self.found:
            return None
        return (
            f"the 16-bit images have values of at most {used} bits (0 to {(1 << used) - 1:,}), so they are read as {used}-bit "
            "images; --bits 16 reads them as 16-bit images"
        )

    def _refuse(self, what: str, part: Callable[[str], str]) -> None:
        by_part: dict[str, str] = {}
        for kind, name in sorted(self.first.items()):
            by_part.setdefault(part(kind), name)
        (one, first), (other, second) = list(by_part.items())[:2]
        raise UserError(
            f"images of one dataset must have the same type: {first} has {_describe(one, what)}, {second} has "
            f"{_describe(other, what)}. Make two datasets, or convert one kind"
        )


def _describe(part: str, what: str) -> str:
    return f"{part} {what}" if part != "1" else "1 channel"


def bits_of(largest: int) -> int:
    """The bits that a value of this size needs, at least 8."""
    return max(largest.bit_length(), 8)
