"""`TrainingOptions`: everything that decides what a run computes."""

from __future__ import annotations

import dataclasses
import math

from ..config.checks import integer, one_of
from .augment import AUGMENTATIONS

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """How to train; the defaults follow the paper's recipe for ImageNet (appendix A).

    Batch size, learning rate and warm-up are smaller, and there is no RandAugment, no random erasing and, unless
    ``drop_path`` asks for it (the paper has 0.1 for T), no stochastic depth.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per step, of all processes together.
        lr, min_lr: learning rate after the warm-up and at the end of the cosine.
        warmup_epochs: length of the linear warm-up; may be a fraction; None: 5, at most a fifth of the epochs.
        weight_decay, betas: of AdamW; only matrices and convolutions decay.
        layer_decay: the learning rate of each layer is this times that of the next layer; 1 for none.
        clip_grad: largest norm of the whole gradient; 0 for no clipping.
        drop_path: stochastic depth of the last block; None keeps the configuration's.
        label_smoothing: the part of the target that is spread over all classes.
        mixup, cutmix: α of the Beta distribution that the mixing ratio is drawn from; 0 for off.
        ema: decay of the exponential moving average of the weights, which is evaluated and exported; 0 for off.
        augmentation: one of ``augment.AUGMENTATIONS``.
        dtype: one of ``DTYPES``; those of 16 bits by autocast, with float32 parameters and, for float16, a dynamic
            loss scale.
        seed: of initial weights, order, augmentation, mixing and drop path.

    Raises:
        TypeError, ValueError: a value is not as above; the message names it.
    """

    epochs: int = 300
    batch_size: int = 128
    lr: float = 5e-4
    min_lr: float = 1e-6
    warmup_epochs: float | None = None
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    layer_decay: float = 1.0
    clip_grad: float = 0.0
    drop_path: float | None = None
    label_smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    ema: float = 0.9999
    augmentation: str = "crop"
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("seed", 0)):
            object.__setattr__(self, name, integer(name, getattr(self, name), least))
        for name in ("lr", "min_lr", "weight_decay", "clip_grad", "mixup", "cutmix"):
            self._check(name, math.inf)
        for name in ("label_smoothing", "ema", *(() if self.drop_path is None else ("drop_path",))):
            self._check(name, 1.0)
        if not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"layer_decay is {self.layer_decay}: expected a number in (0, 1]")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr is {self.min_lr}: expected at most lr, {self.lr}")
        if self.warmup_epochs is None:
            object.__setattr__(self, "warmup_epochs", min(5.0, self.epochs / 5))
        self._check("warmup_epochs", math.inf)
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs is {self.warmup_epochs}: expected at most epochs, {self.epochs}")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}: expected two numbers in [0, 1)")
        for name, known in (("augmentation", AUGMENTATIONS), ("dtype", DTYPES)):
            one_of(name, getattr(self, name), known)

    def _check(self, name: str, end: float) -> None:
        value = getattr(self, name)
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not real or not 0 <= value < end:
            raise (ValueError if real else TypeError)(f"{name} is {value!r}: expected a number in [0, {end:g})")
