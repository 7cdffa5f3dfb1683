"""The ways to run a whole ConvNeXt that the study compares.

"eager" is this package's plain reference: it calls the same PyTorch operators on the same shapes as timm's model (the
tests compare the two lists). Weights are random, γ and the affines drawn from N(0, 1), so that no term of the formula
is hidden by a small factor; drop path is off, and no optimiser runs, as both are the same for all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench import runtimes
from bench.environment import DTYPES, cache_bytes
from bench.timing import Contender, Job, Reference
from convnext_fast import ConvNext, ConvNextConfig


@dataclasses.dataclass(frozen=True)
class Cell:
    """One piece of work: a model, its input, and what is done with it.

    Attributes:
        variant: one of ``config.VARIANTS``.
        batch, side: number of images, and their height and width in pixels.
        dtype: in inference that of parameters and images, in training autocast's, with float32 parameters.
        mode: "inference", or "training": forward, and backward down to every parameter.
        depths: numbers of blocks of the stages, instead of the variant's.
    """

    variant: str
    batch: int
    side: int
    dtype: str
    mode: str
    depths: tuple[int, ...] | None = None

    @property
    def config(self) -> ConvNextConfig:
        """The network, without drop path."""
        depths = {} if self.depths is None else {"depths": self.depths}
        return ConvNextConfig.from_variant(self.variant, num_labels=1000, drop_path_rate=0.0, **depths)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a contender runs. ``compile``: keyword arguments of `torch.compile`, or None; ``only``: a kind of device."""

    fused: bool = False
    recompute: int = 1
    frozen: bool = False
    channels_last: bool = False
    compile: dict[str, Any] | None = None
    graph: bool = False
    runtime: str | None = None
    modes: tuple[str, ...] = ("inference", "training")
    only: str | None = None
    quick: bool = True


INFERENCE, TRAINING = ("inference",), ("training",)
RECIPES = {
    "eager": Recipe(),
    "eager channels_last": Recipe(channels_last=True),
    "compile": Recipe(channels_last=True, compile={}),
    "compile reduce-overhead": Recipe(channels_last=True, compile={"mode": "reduce-overhead"}, only="cuda"),
    "compile max-autotune": Recipe(channels_last=True, compile={"mode": "max-autotune"}, quick=False),
    "compile force_layout_optimization": Recipe(
        channels_last=True, compile={"options": {"force_layout_optimization": True}}, quick=False
    ),
    "ONNX Runtime": Recipe(runtime="onnxruntime", modes=INFERENCE, only="cpu"),
    "OpenVINO": Recipe(runtime="openvino", modes=INFERENCE, only="cpu"),
    "fused": Recipe(fused=True),
    "fused, recompute 0": Recipe(fused=True, recompute=0, modes=TRAINING),
    "frozen": Recipe(fused=True, frozen=True, modes=INFERENCE),
    "frozen + compile": Recipe(fused=True, frozen=True, compile={}, modes=INFERENCE),
    "frozen + CUDA graph": Recipe(fused=True, frozen=True, graph=True, modes=INFERENCE, only="cuda"),
    "fused + compile": Recipe(fused=True, compile={}, modes=TRAINING, quick=False),
    "fused + CUDA graph": Recipe(fused=True, graph=True, modes=TRAINING, only="cuda"),
}


def contenders(mode: str, device: torch.device, quick: bool) -> tuple[str, ...]:
    """Names from ``RECIPES`` that run a mode on a device; ``quick`` leaves out those that compile slowly."""
    return tuple(
        name
        for name, recipe in RECIPES.items()
        if mode in recipe.modes and recipe.only in (None, device.type) and (recipe.quick or not quick)
    )


def is_ours(name: str) -> bool:
    """Whether a contender runs this package's fused ops."""
    return name in RECIPES and RECIPES[name].fused


@torch.no_grad()
def random_weights(config: ConvNextConfig, seed: int = 0) -> dict[str, Tensor]:
    """A state_dict: vectors from N(0, 1), matrices and convolutions from N(0, 1/fan-in)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ConvNext(config, device="meta").state_dict()
    return {
        name: torch.randn(like.shape, generator=generator) / (math.sqrt(like[0].numel()) if like.dim() > 1 else 1.0)
        for name, like in shapes.items()
    }


class Subject:
    """What all contenders of a cell share: weights, images, the output's gradient, and the reference."""

    def __init__(self, cell: Cell, device: torch.device):
        self.cell, self.device, self.config = cell, device, cell.config
        self.trains = cell.mode == "training"
        self.dtype = DTYPES[cell.dtype]
        self.stored = torch.float32 if self.trains else self.dtype
        self.weights = random_weights(self.config)
        generator = torch.Generator().manual_seed(1)
        shape = (cell.batch, self.config.num_channels, cell.side, cell.side)
        images = torch.randn(shape, generator=generator).to(device, self.stored)
        copies = min(16, 1 + -(-2 * cache_bytes(device) // (images.numel() * images.element_size())))
        self.images = [images, *(images.roll(i, 0) for i in range(1, copies))]
        self.cotangent = torch.randn(cell.batch, self.config.num_labels, generator=generator).to(device)
        self.checked = sorted({0, cell.batch - 1})

    def model(self, fused: bool) -> ConvNext:
        """A model with the weights, in the mode of the cell."""
        model = ConvNext(self.config, fused=fused, device="meta", dtype=self.stored).to_empty(device=self.device)
        model.load_state_dict(self.weights)
        return model.train(self.trains)

    def autocast(self) -> contextlib.AbstractContextManager:
        """In training autocast to the cell's dtype, unless that is float32; in inference nothing."""
        if not self.trains or self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @functools.cached_property
    def reference(self) -> Reference:
        """The results in float64; in inference only those of the first and the last image."""
        return Reference.of(self._eager(torch.float64), self._eager(self.dtype), self.cell.dtype)

    def _eager(self, dtype: torch.dtype) -> list[Tensor]:
        """Results of the plain model in a dtype, computed on a few images at a time; gradients accumulate."""
        model = self.model(fused=False)
        wide = dtype == torch.float64
        model = model.double() if wide else model
        images = self.images[0] if self.trains else self.images[0][self.checked]
        outputs = []
        for part, cotangent in zip(images.split(8), self.cotangent.split(8), strict=False):
            part = part.double() if wide else part
            if self.trains:
                with contextlib.nullcontext() if wide else self.autocast():
                    out = model(part)
                out.backward(cotangent.to(out.dtype))
            else:
                with torch.inference_mode():
                    out = model(part)
            outputs.append(out.detach())
        gradients = [p.grad for p in model.parameters()] if self.trains else []
        return [torch.cat(outputs), *gradients]


def prepare(names: tuple[str, ...], subject: Subject) -> dict[str, Contender]:
    """Contenders for `timing.measure`."""
    return {name: Contender(functools.partial(build, RECIPES[name], subject), subject.reference) for name in names}


def build(recipe: Recipe, subject: Subject) -> Job:
    """Prepare a contender.

    Raises:
        ImportError: a package that it needs is missing.
    """
    if recipe.runtime is not None:
        run = runtimes.load(recipe.runtime, subject.model(fused=False), subject.images[0])
        arrays = itertools.cycle([image.numpy() for image in subject.images])
        first = subject.images[0].numpy()
        return Job(lambda: lambda: run(next(arrays)), lambda: [torch.from_numpy(run(first))[subject.checked]])
    model = subject.model(recipe.fused)
    model.recompute = recipe.recompute
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    images = [image.contiguous(memory_format=layout) for image in subject.images]
    if recipe.channels_last:
        model.to(memory_format=torch.channels_last)
    if recipe.frozen:
        model.freeze()
    parameters = list(model.parameters())
    compiled = model if recipe.compile is None else torch.compile(model, dynamic=False, **recipe.compile)

    def run(image: Tensor) -> Tensor:
        if recipe.compile is not None:
            torch.compiler.cudagraph_mark_step_begin()
        if not subject.trains:
            with torch.inference_mode():
                return compiled(image)
        model.zero_grad(set_to_none=True)
        with subject.autocast():
            out = compiled(image)
        out.backward(subject.cotangent.to(out.dtype))
        return out.detach()

    if recipe.graph:
        run = captured(run, images[0], lambda: model.zero_grad(set_to_none=True))

    def results() -> list[Tensor]:
        out = run(images[0]).clone()
        return [out, *(p.grad for p in parameters)] if subject.trains else [out[subject.checked]]

    turns: Iterator[Tensor] = itertools.cycle(images)
    return Job(lambda: lambda: run(next(turns)), results, [*parameters, *images], subject.trains)


def captured(run: Callable[[Tensor], Tensor], image: Tensor, before: Callable[[], None]) -> Callable[[Tensor], Tensor]:
    """``run`` as a CUDA graph, which reads a copy of its argument (see "CUDA Graphs" in PyTorch's notes on CUDA)."""
    static = image.clone(memory_format=torch.preserve_format)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(static)
    torch.cuda.current_stream().wait_stream(stream)
    before()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(static)

    def replay(image: Tensor) -> Tensor:
        static.copy_(image)
        graph.replay()
        return out

    return replay
