"""The typed config of a run. `trainer.recipe` reads it from YAML."""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pipeline.augment import Crops
from pipeline.decode import DecoderName
from pipeline.order import default_lanes
from pipeline.storage import whole_url

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Area = Annotated[float, Field(gt=0, le=1)]
Place = Annotated[str, AfterValidator(whole_url)]  # a folder, or a URL; workers may run in another folder


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("a yes or no does not belong here")
        return value


class EncoderConfig(_Config):
    """The encoder's shape. Defaults are ViT-B/16's (paper, section 4)."""

    image_size: Count | tuple[Count, Count] = 224  # pixels: of both sides, or [height, width]
    patch_size: Count = 16
    width: Count = 768
    depth: Count = 12
    heads: Count = 12

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
        """The encoder's shape, of whatever has one."""
        return EncoderConfig(**{name: getattr(self, name) for name in EncoderConfig.model_fields})

    @property
    def patches(self) -> int:
        """L, patches an image."""
        return self.grid[0] * self.grid[1]

    @model_validator(mode="after")
    def _divides(self) -> "EncoderConfig":
        if any(side % self.patch_size for side in self.size):
            raise ValueError(f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        _check_width(self.width, "width", self.heads, "heads")
        return self


def _check_width(width: int, name: str, heads: int, of_heads: str) -> None:
    if width % heads:
        raise ValueError(f"{name} {width} is not divisible by {of_heads} {heads}")
    if width % 4:
        raise ValueError(f"{name} {width} is not divisible by 4 (2-D sin-cos positions)")


class ModelConfig(EncoderConfig):
    """The MAE's shape. Defaults are the paper's (section 4; decoder: Table 1, its heads: the authors' models_mae.py;
    normalised patches: Table 3)."""

    decoder_width: Count = 512
    decoder_depth: Count = 8
    decoder_heads: Count = 16
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    norm_pix: bool = True
    sampling: Literal["random", "block", "grid"] = "random"  # of the masked patches (paper, Table 1f)
    # What the encoder sees of masked patches: nothing, a mask token (paper, Table 1c), or, as a denoising autoencoder
    # would, all patches under noise, of which all are predicted.
    masked: Literal["nothing", "token", "noise"] = "nothing"

    @property
    def kept(self) -> int:
        """K, patches that the encoder sees."""
        return int(self.patches * (1 - self.mask_ratio))

    @model_validator(mode="after")
    def _fits(self) -> "ModelConfig":
        _check_width(self.decoder_width, "decoder_width", self.decoder_heads, "decoder_heads")
        if self.sampling == "grid" and self.mask_ratio != 0.75:
            raise ValueError("sampling grid keeps one of four patches: mask_ratio has to be 0.75")
        if self.kept < 1:
            raise ValueError(f"mask_ratio {self.mask_ratio} leaves no patch to see")
        return self


class ClassifierConfig(EncoderConfig):
    """An encoder with a head."""

    pool: Literal["mean", "class"] = (
        "mean"  # what the head reads: the mean of the patches, or the class token
    )
    drop_path: Share = 0.1


class OptimConfig(_Config):
    """A learning rate that warms up and goes down by a cosine."""

    blr: Positive  # lr = blr · B / 256
    weight_decay: NotNegative
    warmup_epochs: NotNegative
    min_lr: NotNegative = 0.0


class AdamWConfig(OptimConfig):
    """Defaults are pre-training's (paper, Table 8)."""

    blr: Positive = 1.5e-4
    beta1: Share = 0.9
    beta2: Share = 0.95
    weight_decay: NotNegative = 0.05
    warmup_epochs: NotNegative = 40


class FinetuneOptimConfig(AdamWConfig):
    """Defaults are ViT-B's (the authors' FINETUNE.md; min_lr: its main_finetune.py)."""

    blr: Positive = 5e-4
    beta2: Share = 0.999
    warmup_epochs: NotNegative = 5
    min_lr: NotNegative = 1e-6
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.65  # a layer's lr over that of the one above it
    ema: Share = 0.0  # of the weights that are evaluated; 0: they are the trained ones


class LarsConfig(OptimConfig):
    """LARS (You et al. 2017, arXiv 1708.03888). Defaults are linear probing's (paper, Table 10)."""

    blr: Positive = 0.1
    momentum: Share = 0.9
    weight_decay: NotNegative = 0.0
    warmup_epochs: NotNegative = 10


class MixingConfig(_Config):
    """What is done to a labelled batch on the device, and to its labels. Defaults are fine-tuning's (paper, Table 9; erase:
    the authors' FINETUNE.md)."""

    magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0  # of RandAugment; 0: none
    magnitude_std: NotNegative = 0.5
    erase: Share = 0.25  # probability
    mixup: NotNegative = 0.8  # α of the Beta distribution; 0: none
    cutmix: NotNegative = 1.0
    smoothing: Share = 0.1

    @property
    def mixes(self) -> bool:
        return bool(self.mixup or self.cutmix)


class DataConfig(_Config):
    """How batches are made. `lanes` and `block` are fixed when a run first starts."""

    lanes: Count | None = None  # V; default B / 4 where 4 divides B, else B
    block: Count | None = None  # K; default what memory_gb allows, 128 at most
    memory_gb: Positive = 16.0  # the read window of the whole cluster, from which K is chosen
    cache: str | None = None  # a folder on each node's own disk, where a fixed part of the dataset is kept
    cache_gb: Positive | None = None  # how large that part may become
    bad_samples: Annotated[int, Field(ge=0)] = 10  # so many distinct ones are put up with, or
    bad_share: Share = 1e-4  # so large a share of the dataset, if that is more
    crop_area: tuple[Area, Area] = (0.2, 1.0)  # of random crops, of the image (the authors' main_pretrain.py)
    crops: Crops = (
        "random"  # of any size and place, of one size anywhere, or always the centre (paper, Table 1e)
    )
    flips: bool = True
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


class LabelledDataConfig(DataConfig):
    """The same with classes, and what is evaluated on."""

    crop_area: tuple[Area, Area] = (
        0.08,
        1.0,
    )  # of random crops, as a share of the image (torchvision's default)
    val: Place | None = None  # a dataset with the same classes
    val_crop: Area = 224 / 256  # the centred square's side over the shorter side


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


class RunConfig(_Config):
    """What every run has. Its `task` says what is trained."""

    task: str
    global_batch: Count
    # Samples a worker puts through at once; gradients are accumulated. auto: what is fastest, see trainer.micro_batch.
    micro_batch: Count | Literal["auto"] = 256
    epochs: Positive
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    workers: WorkersConfig = WorkersConfig()
    precision: Literal["auto", "bf16", "float32", "float64"] = "auto"
    compile: Literal["auto", "always", "never"] = "auto"  # auto: on a GPU
    log_every: Count = 20  # steps between two looks at the device
    model: EncoderConfig
    optim: OptimConfig
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def at_once(self) -> int:
        """The micro-batch, when it is known."""
        assert isinstance(self.micro_batch, int)
        return self.micro_batch

    @model_validator(mode="after")
    def _warms_up(self) -> "RunConfig":
        if self.optim.warmup_epochs > self.epochs:
            raise ValueError(
                f"optim.warmup_epochs {self.optim.warmup_epochs:g} is longer than the run's {self.epochs:g} epochs"
            )
        return self


class KnnConfig(_Config):
    """k nearest neighbours during pre-training: samples of the dataset that is trained on name those of another."""

    val: Place  # a dataset with the same classes
    every: Positive = 10.0  # epochs
    known: Count = 20_000  # samples at most, spread evenly
    asked: Count = 5_000


class InitConfig(_Config):
    """The weights that a run begins with: of the newest commit of a run, or of the commit of one of its steps (which one is
    fixed when the run first starts); or of a model's folder or file of others (see trainer.pretrained)."""

    run: Place
    step: Count | None = None

    @model_validator(mode="after")
    def _tells_nothing(self) -> "InitConfig":
        if re.search(r"://[^/]*@|^https?:.*\?", self.run):
            raise ValueError(
                "a URL with a name, a password or a query does not belong in a config, which is kept: `maestream import` the "
                "file, and give the folder"
            )
        return self


def _place_alone(value: Any) -> Any:
    """init: PLACE is short for init: {run: PLACE}."""
    return {"run": value} if isinstance(value, str) and value != "scratch" else value


Init = Annotated[InitConfig | Literal["scratch"], BeforeValidator(_place_alone)]  # scratch: random weights


class PretrainConfig(RunConfig):
    """A pre-training run. Defaults are the paper's (Table 8; epochs: Table 1)."""

    task: Literal["pretrain"] = "pretrain"
    global_batch: Count = 4096
    epochs: Positive = 800
    init: Init = "scratch"
    knn: KnnConfig | None = None
    jitter: Share = 0.0  # how far brightness, contrast and saturation may go from 1 (paper, Table 1e)
    model: ModelConfig = ModelConfig()
    optim: AdamWConfig = AdamWConfig()


class LabelledRunConfig(RunConfig):
    """What runs have that train on labels, and begin with an encoder."""

    init: Init
    data: LabelledDataConfig = LabelledDataConfig()
    evaluate_every: Positive  # epochs


class FinetuneConfig(LabelledRunConfig):
    """A run that trains an encoder and a head to name classes. Defaults are ViT-B's (the authors' FINETUNE.md)."""

    task: Literal["finetune"] = "finetune"
    blocks: Annotated[float, Field(ge=0)] | Literal["all"] = (
        "all"  # so many last ones are trained (paper, Fig. 9)
    )
    global_batch: Count = 1024
    epochs: Positive = 100
    model: ClassifierConfig = ClassifierConfig()
    optim: FinetuneOptimConfig = FinetuneOptimConfig()
    mixing: MixingConfig = MixingConfig()
    evaluate_every: Positive = 1.0

    @model_validator(mode="after")
    def _fits(self) -> "FinetuneConfig":
        if self.blocks != "all" and self.blocks != 0.5 and self.blocks % 1:
            raise ValueError(f"blocks {self.blocks:g}: a whole number, 0.5 for the last block's MLP, or all")
        if self.blocks != "all" and self.blocks > self.model.depth:
            raise ValueError(f"blocks {self.blocks:g}: the model has {self.model.depth}")
        per_lane = self.global_batch // (self.data.lanes or default_lanes(self.global_batch))
        if self.mixing.mixes and per_lane < 2:
            raise ValueError(
                "mixup and cutmix take an image's partner from its lane, so that it is the same at any world size: "
                f"global_batch {self.global_batch} needs fewer lanes (data.lanes), or mixing.mixup=0 mixing.cutmix=0"
            )
        if self.mixing.mixes and self.micro_batch != "auto" and self.micro_batch < per_lane:
            raise ValueError(
                f"micro_batch {self.micro_batch} is less than what a step takes of a lane, {per_lane} samples, which "
                "mixup and cutmix need together: raise it, or data.lanes"
            )
        return self


class LinprobeConfig(LabelledRunConfig):
    """A run that trains a linear classifier on what a frozen encoder says. Defaults are ViT-B's (paper, Table 10)."""

    task: Literal["linprobe"] = "linprobe"
    global_batch: Count = 16384
    epochs: Positive = 90
    model: EncoderConfig = EncoderConfig()
    optim: LarsConfig = LarsConfig()
    evaluate_every: Positive = 10.0
