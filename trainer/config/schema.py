"""Config of a run: one model for each of pretrain, finetune and linprobe. `trainer.config.recipe` reads it from YAML.

This is the reference for every key of a recipe. The string below a field is its description; "paper" is He et al. 2021
(arXiv 2111.06377), and "the authors'" files are those of github.com/facebookresearch/mae. The models' and optimizers'
keys are in `model_schema` and `optim_schema`.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipeline.decode.decoder import DecoderName
from pipeline.images.pixels import RGB
from pipeline.loading.crops import Crops
from pipeline.loading.order import default_lanes
from pipeline.text import plural
from trainer.config.base import Area, Count, Location, Positive, Share, StrictConfig
from trainer.config.model_schema import (
    ClassifierConfig,
    EncoderConfig,
    ModelConfig,
    PixelScales,
    PixelValues,
)
from trainer.config.optim_schema import (
    AdamWConfig,
    FinetuneOptimConfig,
    LarsConfig,
    MixingConfig,
    OptimConfig,
)


class NormaliseConfig(StrictConfig):
    """Values for the normalisation of pixels, one for each channel. 8-bit and 16-bit pixels are scaled to [0, 1] first."""

    mean: PixelValues
    """Mean of each channel, which is subtracted."""
    std: PixelScales
    """Standard deviation of each channel, by which the result is divided."""


class DataConfig(StrictConfig):
    """Reading, cropping and decoding. `lanes` and `block` are fixed when a run first starts."""

    lanes: Count | None = None
    """V, the number of parallel read positions; it divides global_batch (B) and is the largest possible number of workers.
    Default: B / 4 if 4 divides B, else B."""
    block: Count | None = None
    """K, the number of consecutive samples of a lane that are shuffled together. Default: as many as memory_gb allows, at
    most 128."""
    memory_gb: Positive = 16.0
    """GiB of encoded samples held by the whole cluster while reading; the default of block is derived from it."""
    cache: str | None = None
    """Folder on each node's own disk that keeps a fixed part of the dataset; null: no disk cache."""
    cache_gb: Positive | None = None
    """Largest size of the disk cache in GiB per node; required with cache."""
    grow: bool = False
    """Whether a run continues with the larger dataset after `maestream shards extend`, from its next epoch on. Without it, a run
    refuses a dataset that has grown."""
    bad_samples: Annotated[int, Field(ge=0)] = 10
    """Number of distinct bad samples above which the run stops, or bad_share of the dataset if that is more."""
    bad_share: Share = 1e-4
    """Share of the dataset that may be bad samples, if that is more than bad_samples."""
    crop_area: tuple[Area, Area] = (0.2, 1.0)
    """Smallest and largest area of a random crop, as a share of the image (the authors' main_pretrain.py)."""
    crops: Crops = "random"
    """Training crops (paper, Table 1e): random size and position, a fixed size at a random position, or the centre."""
    flips: bool = True
    """Whether images are flipped horizontally with probability one half."""
    decoder: DecoderName = "auto"
    """Decoder of images: cpu, dali, or auto, which takes the one that suits the machine."""
    threads: Count | None = None
    """Decoder threads per worker. Default: the worker's share of the machine's cores."""
    normalise: Literal["dataset", "imagenet"] | NormaliseConfig | None = None
    """How pixels are normalised: dataset (by the mean and standard deviation that `maestream shards statistics` computed),
    imagenet, or {mean: […], std: […]}. Default: as the model of init; without one, imagenet for 8-bit images with 3
    channels, else dataset."""

    @field_validator("normalise", mode="before")
    @classmethod
    def _check_normalise(cls, value: Any) -> Any:
        if value in (None, "dataset", "imagenet") or isinstance(value, dict | NormaliseConfig):
            return value
        raise ValueError("expected dataset, imagenet or {mean: […], std: […]}")

    @model_validator(mode="after")
    def _check_cache(self) -> "DataConfig":
        if (self.cache is None) != (self.cache_gb is None):
            raise ValueError(
                "cache and cache_gb must be set together: the folder and its largest size in GiB"
            )
        return self

    @property
    def disk_cache(self) -> tuple[str, int] | None:
        """Folder and largest size in bytes of the disk cache, or None."""
        return (self.cache, int(self.cache_gb * 2**30)) if self.cache and self.cache_gb else None


class LabelledDataConfig(DataConfig):
    """Data of runs that train on labels."""

    crop_area: tuple[Area, Area] = (0.08, 1.0)
    """Smallest and largest area of a random crop, as a share of the image (torchvision's default)."""
    val: Location | None = None
    """Validation dataset, with the same kind of labels and classes as the training dataset; null: no evaluation."""
    val_crop: Area = 224 / 256
    """Side of the centre crop for evaluation, divided by the image's shorter side."""


class CheckpointConfig(StrictConfig):
    """When checkpoints are committed, and how many are kept."""

    every_minutes: Positive = 10.0
    """Minutes between two checkpoints."""
    every_steps: Count | None = None
    """Also commit a checkpoint every this many steps; null: only by time."""
    keep: Count = 3
    """Number of newest checkpoints that are kept."""
    keep_every: Count | None = None
    """Also keep, for good, the first checkpoint in every this many steps; null: none."""
    snapshots: str | None = "/dev/shm"
    """Memory-backed folder on each node for the snapshots from which a restarted run recovers; null: no snapshots."""


class WorkersConfig(StrictConfig):
    """How many workers train: at any time as many as the cluster has room for. A single number sets both bounds."""

    min: Count = 1
    """Fewest workers; with fewer, training waits."""
    max: Count = 1
    """Most workers."""

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        if isinstance(value, int):
            if value < 1:
                raise ValueError("expected at least 1 worker")
            return {"min": value, "max": value}
        if not isinstance(value, dict | WorkersConfig):
            raise ValueError("expected a number or {min: 1, max: 8}")
        return value

    @model_validator(mode="after")
    def _check_bounds(self) -> "WorkersConfig":
        if self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}")
        return self


class RunConfig(StrictConfig):
    """Keys that all runs have."""

    task: str
    """What is trained: pretrain, finetune or linprobe."""
    global_batch: Count
    """B, the number of samples per optimizer step over all workers."""
    micro_batch: Count | Literal["auto"] = 256
    """Largest number of samples that a worker puts through the model at once; gradients are accumulated over the rest of its
    share of global_batch. auto: the fastest size is measured before training."""
    epochs: Positive
    """Length of training in epochs; fractions are allowed."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of initial weights, order of samples, augmentation and masks."""
    workers: WorkersConfig = WorkersConfig()
    """Number of workers (GPUs, or processes on a CPU): a number, or {min, max} for elastic training."""
    precision: Literal["auto", "bf16", "float32", "float64"] = "auto"
    """Precision of the computation; bf16 is autocast with float32 weights. auto: bf16 on a GPU, float32 on a CPU."""
    compile: Literal["auto", "always", "never"] = "auto"
    """Whether the model is compiled with torch.compile. auto: on a GPU only."""
    log_every: Count = 20
    """Steps between two reads of the losses from the device; metrics are logged at these steps."""
    model: EncoderConfig
    """Architecture of the model."""
    optim: OptimConfig
    """Optimizer and learning-rate schedule."""
    data: DataConfig = DataConfig()
    """Reading, cropping and decoding."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints and snapshots."""

    @property
    def micro_batch_size(self) -> int:
        """micro_batch as a number; call it only after `auto` was resolved."""
        assert isinstance(self.micro_batch, int)
        return self.micro_batch

    @model_validator(mode="after")
    def _check_warmup(self) -> "RunConfig":
        if self.optim.warmup_epochs > self.epochs:
            raise ValueError(
                f"optim.warmup_epochs {self.optim.warmup_epochs:g} is longer than the run's {self.epochs:g} epochs"
            )
        return self

    @model_validator(mode="after")
    def _check_normalise(self) -> "RunConfig":
        normalise, channels = self.data.normalise, self.model.channels
        if normalise == "imagenet" and channels != 3:
            raise ValueError(
                f"data.normalise=imagenet has values for 3 channels, but model.channels is {channels}: use dataset, or "
                "{mean: […], std: […]}"
            )
        if isinstance(normalise, NormaliseConfig):
            for name, values in (("mean", normalise.mean), ("std", normalise.std)):
                if len(values) != channels:
                    raise ValueError(
                        f"data.normalise.{name} has {plural(len(values), 'value')}, but model.channels is {channels}"
                    )
        return self

    def check_colours(self, what: str, key: str) -> None:
        """Raise ValueError, because `what` is turned on by `key`, unless the images are 8-bit RGB images."""
        model = self.model
        if model.pixels != RGB:
            raise ValueError(
                f"{what} needs 8-bit RGB images, but the model's have {plural(model.channels, 'channel')} of type "
                f"{model.pixel_dtype}: set {key}=0"
            )


class KnnConfig(StrictConfig):
    """Evaluation of the encoder by k nearest neighbours during pre-training, in the background on rank 0."""

    val: Location
    """Validation dataset, with the same kind of labels and classes as the training dataset."""
    every: Positive = 10.0
    """Epochs between two evaluations."""
    known: Count = 20_000
    """Largest number of reference images, spread evenly over the training dataset."""
    asked: Count = 5_000
    """Largest number of query images, spread evenly over the validation dataset."""


class InitConfig(StrictConfig):
    """Initial weights from a run, or from a model's folder or file (see `trainer.weights.pretrained`)."""

    run: Location
    """Folder of a run or a model, or file of weights."""
    step: Count | None = None
    """Step of the run's checkpoint. Default: the newest when this run first starts."""

    @model_validator(mode="after")
    def _refuse_secrets(self) -> "InitConfig":
        if re.search(r"://[^/]*@|^https?:.*\?", self.run):
            raise ValueError(
                "the URL has a user name, password or query, and the config is stored in the run folder; "
                "run `maestream import URL FOLDER` and give the folder"
            )
        return self


def _expand_location(value: Any) -> Any:
    """`init: LOCATION` is short for `init: {run: LOCATION}`."""
    return {"run": value} if isinstance(value, str) and value != "scratch" else value


Init = Annotated[InitConfig | Literal["scratch"], BeforeValidator(_expand_location)]


class PretrainConfig(RunConfig):
    """A pre-training run. Defaults: the paper's (Table 8; epochs: Table 1)."""

    task: Literal["pretrain"] = "pretrain"
    """What is trained: a masked autoencoder."""
    global_batch: Count = 4096
    """B, the number of samples per optimizer step over all workers (paper, Table 8)."""
    epochs: Positive = 800
    """Length of training in epochs; fractions are allowed (paper, Table 1)."""
    init: Init = "scratch"
    """Initial weights: scratch (random), or a run, a model's folder or a file of weights."""
    knn: KnnConfig | None = None
    """Evaluation by k nearest neighbours during training; null: none."""
    jitter: Share = 0.0
    """Colour jitter: brightness, contrast and saturation are each scaled by 1 ± at most this much (paper, Table 1e)."""
    model: ModelConfig = ModelConfig()
    """Architecture of the masked autoencoder."""
    optim: AdamWConfig = AdamWConfig()
    """AdamW and learning-rate schedule."""

    @model_validator(mode="after")
    def _check_jitter(self) -> "PretrainConfig":
        if self.jitter:
            self.check_colours("colour jitter", "jitter")
        return self


class LabelledRunConfig(RunConfig):
    """Keys of runs that train on labels."""

    init: Init
    """Initial weights of the encoder: scratch (random), or a run, a model's folder or a file of weights."""
    data: LabelledDataConfig = LabelledDataConfig()
    """Reading, cropping, decoding, and the validation dataset."""
    evaluate_every: Positive
    """Epochs between two evaluations on data.val."""


class FinetuneConfig(LabelledRunConfig):
    """A fine-tuning run. Defaults: ViT-B (the authors' FINETUNE.md)."""

    task: Literal["finetune"] = "finetune"
    """What is trained: an encoder with a classification head."""
    blocks: Annotated[float, Field(ge=0)] | Literal["all"] = "all"
    """Number of last blocks that are trained, 0.5 for only the last block's MLP, or all (paper, Fig. 9)."""
    global_batch: Count = 1024
    """B, the number of samples per optimizer step over all workers (the authors' FINETUNE.md)."""
    epochs: Positive = 100
    """Length of training in epochs; fractions are allowed (the authors' FINETUNE.md, ViT-B)."""
    model: ClassifierConfig = ClassifierConfig()
    """Architecture of the encoder and its head."""
    optim: FinetuneOptimConfig = FinetuneOptimConfig()
    """AdamW, layer-wise learning-rate decay, weight averaging and learning-rate schedule."""
    mixing: MixingConfig = MixingConfig()
    """RandAugment, random erasing, mixup, CutMix and label smoothing."""
    evaluate_every: Positive = 1.0
    """Epochs between two evaluations on data.val."""

    @model_validator(mode="after")
    def _check_blocks_and_mixing(self) -> "FinetuneConfig":
        if self.blocks != "all" and self.blocks != 0.5 and self.blocks % 1:
            raise ValueError(
                f"blocks {self.blocks:g}: expected a whole number, 0.5 for the last block's MLP, or all"
            )
        if self.mixing.magnitude:
            self.check_colours("RandAugment (it changes colours)", "mixing.magnitude")
        if self.blocks != "all" and self.blocks > self.model.depth:
            raise ValueError(f"blocks {self.blocks:g} is more than the model's depth, {self.model.depth}")
        per_lane = self.global_batch // (self.data.lanes or default_lanes(self.global_batch))
        if self.mixing.mixes and per_lane < 2:
            raise ValueError(
                "mixup and CutMix mix samples of the same lane and need at least two per step: "
                f"global_batch {self.global_batch} needs fewer lanes (data.lanes), or set mixing.mixup=0 mixing.cutmix=0"
            )
        if self.mixing.mixes and self.micro_batch != "auto" and self.micro_batch < per_lane:
            raise ValueError(
                f"micro_batch {self.micro_batch} is smaller than a lane's {per_lane} samples per step, which mixup and CutMix "
                "need together: raise micro_batch or data.lanes"
            )
        return self


class LinprobeConfig(LabelledRunConfig):
    """A linear-probing run. Defaults: ViT-B (paper, Table 10)."""

    task: Literal["linprobe"] = "linprobe"
    """What is trained: a linear classifier on the class token of a frozen encoder."""
    global_batch: Count = 16384
    """B, the number of samples per optimizer step over all workers (paper, Table 10)."""
    epochs: Positive = 90
    """Length of training in epochs; fractions are allowed (paper, Table 10; ViT-B)."""
    model: EncoderConfig = EncoderConfig()
    """Architecture of the encoder."""
    optim: LarsConfig = LarsConfig()
    """LARS and learning-rate schedule."""
    evaluate_every: Positive = 10.0
    """Epochs between two evaluations on data.val."""
