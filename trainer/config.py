"""The typed config of a run. Recipes are its YAML; `key=value` overrides reach any depth.

Unknown keys, wrong types and impossible values are refused with one message that names them all.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pipeline.decode import DecoderName
from pipeline.errors import UserError

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("a yes or no does not belong here")
        return value


class ModelConfig(_Config):
    """The MAE's shape. Defaults are ViT-B/16's (paper, section 4; decoder: Table 1)."""

    image_size: Count = 224
    patch_size: Count = 16
    width: Count = 768
    depth: Count = 12
    heads: Count = 12
    decoder_width: Count = 512
    decoder_depth: Count = 8
    decoder_heads: Count = 16
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    norm_pix: bool = True

    @property
    def patches(self) -> int:
        """L, patches an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def kept(self) -> int:
        """K, patches that the encoder sees."""
        return int(self.patches * (1 - self.mask_ratio))

    @model_validator(mode="after")
    def _fits(self) -> "ModelConfig":
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        for width, heads in (("width", "heads"), ("decoder_width", "decoder_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"{width} {getattr(self, width)} is not divisible by {heads} {getattr(self, heads)}"
                )
            if getattr(self, width) % 4:
                raise ValueError(
                    f"{width} {getattr(self, width)} is not divisible by 4 (2-D sin-cos positions)"
                )
        if self.kept < 1:
            raise ValueError(f"mask_ratio {self.mask_ratio} leaves no patch to see")
        return self


class OptimConfig(_Config):
    """AdamW with warm-up and cosine. Defaults are the paper's (Table 8)."""

    blr: Positive = 1.5e-4  # lr = blr · B / 256
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    weight_decay: NotNegative = 0.05
    warmup_epochs: NotNegative = 40
    min_lr: NotNegative = 0.0


class DataConfig(_Config):
    """How batches are made. `lanes` and `block` are fixed when a run first starts."""

    lanes: Count | None = None  # V; default B / 4 where 4 divides B, else B
    block: Count | None = None  # K; default what memory_gb allows, 128 at most
    memory_gb: Positive = 16.0  # the read window of the whole cluster, from which K is chosen
    cache: str | None = None  # a folder on each node's own disk, where a fixed part of the dataset is kept
    cache_gb: Positive | None = None  # how large that part may become
    bad_samples: Annotated[int, Field(ge=0)] = 10  # so many distinct ones are put up with, or
    bad_share: Annotated[float, Field(ge=0, lt=1)] = 1e-4  # so large a share of the dataset, if that is more
    decoder: DecoderName = "auto"
    threads: Count | None = None  # decoding threads a worker; default its share of the machine's cores

    @model_validator(mode="after")
    def _fits(self) -> "DataConfig":
        if (self.cache is None) != (self.cache_gb is None):
            raise ValueError(
                "cache and cache_gb go together: where a part of the dataset is kept, and how much"
            )
        return self

    @property
    def kept_part(self) -> tuple[str, int] | None:
        """Folder and bytes of the kept part."""
        return (self.cache, int(self.cache_gb * 2**30)) if self.cache and self.cache_gb else None


class CheckpointConfig(_Config):
    every_minutes: Positive = 10.0
    every_steps: Count | None = None  # besides, at these steps
    keep: Count = 3  # newest commits kept
    keep_every: Count | None = None  # besides, for good, the first commit of each so many steps
    snapshots: str | None = (
        "/dev/shm"  # a memory-backed folder of each node, see trainer.snapshot; null: none
    )


class WorkersConfig(_Config):
    """How many workers train: as many of these as the cluster has room for, at any time. One number fixes it."""

    min: Count = 1
    max: Count = 1

    @model_validator(mode="before")
    @classmethod
    def _one_number(cls, value: Any) -> Any:
        if isinstance(value, int):
            return {"min": value, "max": value}
        if not isinstance(value, dict | WorkersConfig):
            raise ValueError("a number, or {min: 1, max: 8}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> "WorkersConfig":
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class PretrainConfig(_Config):
    """A pre-training run."""

    global_batch: Count = 4096
    micro_batch: Count = 256  # samples a worker puts through at once; gradients are accumulated
    epochs: Positive = 800
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    workers: WorkersConfig = WorkersConfig()
    precision: Literal["auto", "bf16", "float32", "float64"] = "auto"
    log_every: Count = 20  # steps between two looks at the device
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _fits(self) -> "PretrainConfig":
        if self.optim.warmup_epochs > self.epochs:
            raise ValueError(
                f"optim.warmup_epochs {self.optim.warmup_epochs:g} is longer than the run's {self.epochs:g} epochs"
            )
        return self


# What may differ when a run is resumed: how it is run, not what it computes.
FREE_ON_RESUME = (
    "workers",
    "micro_batch",
    "log_every",
    "checkpoint",
    "data.decoder",
    "data.threads",
    "data.memory_gb",
    "data.cache",
    "data.cache_gb",
    "data.bad_samples",
    "data.bad_share",
)

C = TypeVar("C", bound=_Config)


def load_config(kind: type[C], path: str | Path, overrides: tuple[str, ...] = ()) -> C:
    """A recipe's YAML with `key.key=value` overrides on top. UserError names every mistake at once."""
    try:
        tree = yaml.safe_load(Path(path).read_text()) or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such config; the recipes are in recipes/") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, this is a {type(tree).__name__}")
    for override in overrides:
        _override(tree, override)
    return parse_config(kind, tree, str(path))


def parse_config(kind: type[C], tree: dict[str, Any], where: str) -> C:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_describe(kind, e) for e in error.errors())) from None


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"{override}: an override is key=value, epochs=10 say")
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"{override}: {parent} is a value, it has no keys")
    try:
        tree[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"{override}: the value is not YAML") from None


def _describe(kind: type[BaseModel], error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        for parent in path[:-1]:
            annotation = kind.model_fields[parent].annotation
            assert isinstance(annotation, type)
            kind = annotation
        near = difflib.get_close_matches(path[-1], kind.model_fields, n=1)
        known = f"did you mean {near[0]}?" if near else f"known are {', '.join(kind.model_fields)}"
        return f"there is no key {key}: {known}"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], dict):  # several keys that do not fit together
        return ": ".join(filter(None, [key, message]))
    return f"{key}: {message}, not {error['input']!r}"


def dump_config(config: _Config) -> str:
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def fixed_part(config: _Config) -> dict[str, Any]:
    """All of a config that may not differ when a run is resumed: key → value."""
    return {
        key: value
        for key, value in _flat(config.model_dump()).items()
        if not any(key == free or key.startswith(free + ".") for free in FREE_ON_RESUME)
    }


def differences(old: _Config, new: _Config) -> list[str]:
    """What differs between two configs besides FREE_ON_RESUME, as "key: old → new"."""
    a, b = fixed_part(old), fixed_part(new)
    return [
        f"{key}: {a.get(key)} → {b.get(key)}" for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
