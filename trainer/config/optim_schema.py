"""Config of optimizers, learning-rate schedules, and the augmentation of labelled batches."""

from typing import Annotated

from pydantic import Field

from trainer.config.base import NotNegative, Positive, Share, StrictConfig


class OptimConfig(StrictConfig):
    """Learning rate with a linear warm-up and a cosine decay, set at every step."""

    blr: Positive
    """Base learning rate; the peak learning rate is blr · global_batch / 256."""
    weight_decay: NotNegative
    """Weight decay."""
    warmup_epochs: NotNegative
    """Length of the linear warm-up from 0, in epochs; fractions are allowed."""
    min_lr: NotNegative = 0.0
    """Learning rate at the end of the cosine decay (absolute, not scaled by global_batch)."""


class AdamWConfig(OptimConfig):
    """AdamW. Defaults: pre-training (paper, Table 8)."""

    blr: Positive = 1.5e-4
    """Base learning rate; the peak learning rate is blr · global_batch / 256 (paper, Table 8)."""
    beta1: Share = 0.9
    """Decay rate of AdamW's first moment (paper, Tables 8 and 9)."""
    beta2: Share = 0.95
    """Decay rate of AdamW's second moment (paper, Table 8)."""
    weight_decay: NotNegative = 0.05
    """Weight decay of all parameters except biases and 1-D parameters (paper, Tables 8 and 9)."""
    warmup_epochs: NotNegative = 40
    """Length of the linear warm-up from 0, in epochs; fractions are allowed (paper, Table 8)."""


class FinetuneOptimConfig(AdamWConfig):
    """AdamW for fine-tuning. Defaults: ViT-B (the authors' FINETUNE.md and main_finetune.py)."""

    blr: Positive = 5e-4
    """Base learning rate; the peak learning rate is blr · global_batch / 256 (the authors' FINETUNE.md, ViT-B)."""
    beta2: Share = 0.999
    """Decay rate of AdamW's second moment (paper, Table 9)."""
    warmup_epochs: NotNegative = 5
    """Length of the linear warm-up from 0, in epochs; fractions are allowed (paper, Table 9)."""
    min_lr: NotNegative = 1e-6
    """Learning rate at the end of the cosine decay (the authors' main_finetune.py)."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.65
    """Learning rate of a layer divided by that of the layer above it; 1 is no decay (the authors' FINETUNE.md, ViT-B)."""
    ema: Share = 0.0
    """Decay rate of a moving average of the weights, which is then what is evaluated and exported; 0 turns it off."""


class LarsConfig(OptimConfig):
    """LARS (You et al. 2017, arXiv 1708.03888). Defaults: linear probing (paper, Table 10)."""

    blr: Positive = 0.1
    """Base learning rate; the peak learning rate is blr · global_batch / 256 (paper, Table 10)."""
    momentum: Share = 0.9
    """Momentum (paper, Table 10)."""
    weight_decay: NotNegative = 0.0
    """Weight decay (paper, Table 10)."""
    warmup_epochs: NotNegative = 10
    """Length of the linear warm-up from 0, in epochs; fractions are allowed (paper, Table 10)."""


class MixingConfig(StrictConfig):
    """Augmentation of a labelled batch on the device. Defaults: fine-tuning (paper, Table 9; erase: FINETUNE.md).

    Labels that are numbers need mixup, cutmix and smoothing turned off."""

    magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    """Mean magnitude of RandAugment, 0 to 10; 0 turns it off (paper, Table 9)."""
    magnitude_std: NotNegative = 0.5
    """Standard deviation of the magnitude (paper, Table 9)."""
    erase: Share = 0.25
    """Probability of random erasing per image; 0 turns it off (the authors' FINETUNE.md)."""
    mixup: NotNegative = 0.8
    """Mixup's α: shares are drawn from Beta(α, α); 0 turns it off (paper, Table 9)."""
    cutmix: NotNegative = 1.0
    """CutMix's α: shares are drawn from Beta(α, α); 0 turns it off. With mixup too, each image gets either, at random
    (paper, Table 9)."""
    smoothing: Share = 0.1
    """Label smoothing: this share of the target is spread evenly over all classes; 0 turns it off (paper, Table 9)."""

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with others of the batch (mixup or CutMix)."""
        return bool(self.mixup or self.cutmix)
