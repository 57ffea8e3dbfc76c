"""Draw synthetic images for demos, tests and benchmarks, so that they need no download.

An image shows ground and sky, and shaded shapes with soft shadows. The class is the kind of the large shape in front, one
of ten. Images are deterministic and about as large as ImageNet's: 500 × 375 pixels and 55 kB.
"""

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Point = tuple[float, float]


def _polygon(corners: int, turn: float = 0.0) -> list[Point]:
    angles = [turn + 2 * math.pi * k / corners for k in range(corners)]
    return [(math.sin(a), -math.cos(a)) for a in angles]


def _star(points: int, inner: float) -> list[Point]:
    angles = [math.pi * k / points for k in range(2 * points)]
    return [((1, inner)[k % 2] * math.sin(a), -(1, inner)[k % 2] * math.cos(a)) for k, a in enumerate(angles)]


def _radial(radius: Callable[[float], float]) -> list[Point]:
    angles = [2 * math.pi * k / 90 for k in range(90)]
    return [(radius(a) * math.sin(a), -radius(a) * math.cos(a)) for a in angles]


GRAIN = 8  # amplitude of the film grain in grey levels (of 255)
_ARM = 0.35
SHAPES: dict[str, list[Point]] = {  # class name → outline, about as large as the unit circle
    "disc": _polygon(60),
    "square": _polygon(4, math.pi / 4),
    "triangle": _polygon(3),
    "star": _star(5, 0.42),
    "hexagon": _polygon(6),
    "cross": [
        (-_ARM, -1),
        (_ARM, -1),
        (_ARM, -_ARM),
        (1, -_ARM),
        (1, _ARM),
        (_ARM, _ARM),
        (_ARM, 1),
        (-_ARM, 1),
        (-_ARM, _ARM),
        (-1, _ARM),
        (-1, -_ARM),
        (-_ARM, -_ARM),
    ],
    "heart": [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17,
        )
        for t in (2 * math.pi * k / 60 for k in range(60))
    ],
    "flower": _radial(lambda a: 0.72 + 0.28 * math.cos(6 * a)),
    "drop": _radial(lambda a: 0.5 + 0.5 * max(0.0, math.cos(a)) ** 8),
    "bar": [(-0.35, -1), (0.35, -1), (0.35, 1), (-0.35, 1)],
}


def draw_scene(seed: int, index: int, label: int) -> bytes:
    """Return the JPEG bytes of image number `index` of the series `seed`. `label`: the kind of the shape in front."""
    rng = np.random.default_rng([seed, index])
    width, height = (int(v) for v in (rng.integers(400, 561), rng.integers(320, 431)))
    if rng.random() < 0.25:
        width, height = height, width
    image = Image.fromarray(_background(rng, width, height))
    outlines = list(SHAPES.values())
    others = [
        (int(rng.integers(len(outlines))), float(rng.uniform(0.08, 0.16))) for _ in range(rng.integers(0, 3))
    ]
    for kind, size in [*others, (label, float(rng.uniform(0.27, 0.40)))]:
        image = _with_shape(rng, image, outlines[kind], size * min(width, height) * 1.2)
    # Film grain: without it a file has a fifth of the size of a photograph.
    pixels = np.asarray(image, np.int16) + rng.integers(-GRAIN, GRAIN + 1, (height, width, 1), np.int16)
    pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Sky and ground, each with a vertical gradient, and a slanted horizon: uint8[height, width, 3]."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    horizon = height * rng.uniform(0.35, 0.7) + (x - width / 2) * rng.uniform(-0.15, 0.15)
    sky_colour, ground_colour = rng.uniform(40, 200, (2, 3)).astype(np.float32)
    above = np.clip(y / horizon, 0, 1)[..., None]
    below = np.clip((y - horizon) / (height - horizon), 0, 1)[..., None]
    sky = sky_colour * (1 - above) + (sky_colour + 255) / 2 * above  # paler towards the horizon
    ground = ground_colour * (0.9 - 0.4 * below)  # darker towards the viewer
    return np.where((y < horizon)[..., None], sky, ground).astype(np.uint8)


def _with_shape(
    rng: np.random.Generator, image: Image.Image, outline: list[Point], radius: float
) -> Image.Image:
    """Draw one shaded shape with its shadow at a random place. Returns a new image."""
    width, height = image.size
    centre = rng.uniform(0.3, 0.7) * width, rng.uniform(0.3, 0.7) * height
    turn, squeeze = rng.uniform(-0.4, 0.4), rng.uniform(0.8, 1.0)
    cos, sin = math.cos(turn) * radius, math.sin(turn) * radius
    points = [
        (centre[0] + cos * px * squeeze - sin * py, centre[1] + sin * px * squeeze + cos * py)
        for px, py in outline
    ]
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).polygon(points, fill=255)
    mask = mask.filter(ImageFilter.BoxBlur(1))
    offset = (int(radius * 0.12), int(radius * 0.15))
    shadow = Image.new("L", image.size)
    shadow.paste(mask, offset)
    shadow = shadow.filter(ImageFilter.BoxBlur(radius * 0.06)).point(lambda v: v * 0.5)
    image = Image.composite(Image.new("RGB", image.size), image, shadow)
    # Light from one side: a linear ramp from a light to a dark tone of one colour.
    colour = rng.uniform(60, 255, 3)
    light = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    ramp = ((x - centre[0]) * math.cos(light) + (y - centre[1]) * math.sin(light)) / radius
    shaded = np.clip(colour * (0.8 + 0.3 * np.clip(ramp, -1, 1))[..., None], 0, 255).astype(np.uint8)
    return Image.composite(Image.fromarray(shaded), image, mask)
