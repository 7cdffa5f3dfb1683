"""A model before and after `fuse`: speed, memory, and how closely the results agree."""

from __future__ import annotations

import copy
import functools
import importlib
import statistics
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import choose
from ..console import Console, plain, print_table
from ..fusion.apply import fuse
from ..fusion.report import FuseReport
from ..measuring import alternate, peak_bytes, relative_error, saved_bytes

MOST_PIXELS = 1 << 30
"""Largest batch."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Cost(NamedTuple):
    """Of one call, or of one training step (forward, backward, optimiser)."""

    seconds: float  # median over the rounds
    peak: int  # bytes allocated during the call; on a CPU, those that autograd kept for the backward pass


class Comparison(NamedTuple):
    """One model before and after `fuse`."""

    report: FuseReport
    forward: tuple[Cost, Cost]
    training: tuple[Cost, Cost]
    output_error: float  # relative, in evaluation, with one input
    gradient_error: float  # relative, the largest of all parameters that have a gradient
    path: str  # of the fused ops


def load_model(spec: str) -> nn.Module:
    """The model ``timm:NAME`` or ``torchvision:NAME``, with random weights, or ``hf:DIR``, with its own."""
    library, _, name = spec.partition(":")
    if library not in ("timm", "hf", "torchvision") or not name:
        raise ValueError(f"model is {spec!r}: expected timm:NAME, torchvision:NAME or hf:DIR")
    package = "transformers" if library == "hf" else library
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{spec} needs {package} ({error}): pip install {package}") from error
    try:
        if library == "timm":
            return module.create_model(name)
        return module.models.get_model(name) if library == "torchvision" else _load_transformers_model(module, name)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # libraries can raise anything for a bad file or name
        raise ValueError(f"{package} has no model {name!r}: {error or type(error).__name__}") from error


def _load_transformers_model(transformers: ModuleType, name: str) -> nn.Module:
    architectures = transformers.AutoConfig.from_pretrained(name).architectures or [None]
    architecture = getattr(transformers, str(architectures[0]), None)
    if not (isinstance(architecture, type) and issubclass(architecture, nn.Module)):
        architecture = transformers.AutoModel
    return architecture.from_pretrained(name)


def compare(model: nn.Module, images: Tensor, autocast: torch.dtype | None = None, rounds: int = 5) -> Comparison:
    """Measure copies of ``model``, unfused and fused, on ``images`` (N, C, H, W).

    Their calls are interleaved, so that changes of the machine's speed hit both. ``autocast``: its dtype, or None.
    """
    device = images.device
    models = [copy.deepcopy(model).to(device) for _ in range(2)]
    report = fuse(models[1])
    context = torch.autocast(device.type, autocast or torch.float32, enabled=autocast is not None)
    results = []
    with context:
        for m in models:
            m.eval().zero_grad()
            outputs = _tensors(m(images))
            sum(output.float().square().mean() for output in outputs).backward()
            gradients = {name: p.grad for name, p in m.named_parameters() if p.grad is not None}
            results.append(([output.detach() for output in outputs], gradients))
            m.zero_grad()
        (outputs, gradients), (fused_outputs, fused_gradients) = results
        output_error = max(relative_error(a, b) for a, b in zip(fused_outputs, outputs, strict=True))
        gradient_error = max((relative_error(fused_gradients[k], v) for k, v in gradients.items()), default=0.0)

        def forward(m: nn.Module) -> None:
            with torch.no_grad():
                m(images)

        forwards = _costs(models, forward, device, rounds)
        optimisers = {m: torch.optim.SGD(m.train().parameters(), lr=0.0) for m in models}

        def step(m: nn.Module) -> None:
            sum(output.float().square().mean() for output in _tensors(m(images))).backward()
            optimisers[m].step()
            optimisers[m].zero_grad()

        trainings = _costs(models, step, device, rounds)
    path = choose.select(device, autocast or images.dtype)
    return Comparison(report, forwards, trainings, output_error, gradient_error, path)


def run(
    console: Console,
    spec: str,
    device: torch.device,
    *,
    batch_size: int = 8,
    image_size: int = 224,
    dtype: str = "float32",
    rounds: int = 5,
) -> int:
    """Print the comparison of a model before and after `fuse`; 1 if no block could be fused, else 0."""
    if batch_size * image_size**2 > MOST_PIXELS:
        raise ValueError(
            f"{batch_size} images of {image_size}×{image_size} are too large: expected at most {MOST_PIXELS:,} pixels"
        )
    model = load_model(spec)
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if channels is None:
        raise ValueError(f"{spec} has no convolution: expected a model of images")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, channels, image_size, image_size, generator=generator).to(device)
    with console.status("measuring"):
        try:
            found = compare(model, images, None if dtype == "float32" else DTYPES[dtype], rounds)
        except (OSError, MemoryError, RuntimeError):
            raise
        except Exception as error:  # the model takes something other than images
            raise ValueError(f"{spec} does not run on images: {type(error).__name__}: {error}") from error
    console.print(plain(str(found.report)), soft_wrap=True)
    on_cpu = device.type == "cpu"
    rows = []
    for name, (before, after) in (("forward", found.forward), ("training step", found.training)):
        speeds = [f"{batch_size / cost.seconds:,.1f} images/s" for cost in (before, after)]
        rows.append((name, *speeds, f"{before.seconds / after.seconds:.2f} times as fast"))
        if before.peak:
            sizes = [f"{cost.peak / 2**20:,.1f} MiB" for cost in (before, after)]
            memory = "kept for backward" if on_cpu else f"peak memory, {name}"
            rows.append((memory, *sizes, f"{after.peak / before.peak:.2f} of it"))
    title = f"{spec}, {batch_size} images of {image_size}×{image_size}, {dtype}, {device.type} ({found.path})"
    print_table(console, title, ("", "before", "after", "after / before"), rows)
    console.print(
        f"Outputs within {found.output_error:.1e} of the unfused model's, gradients within {found.gradient_error:.1e} "
        "(relative).",
        soft_wrap=True,
    )
    return 0 if found.report.fused else 1


def _costs(
    models: list[nn.Module], call: Callable[[nn.Module], None], device: torch.device, rounds: int
) -> tuple[Cost, ...]:
    calls = [functools.partial(call, model) for model in models]
    peaks = []
    for model, one in zip(models, calls, strict=True):  # these calls also warm up
        if device.type == "cpu":
            peaks.append(saved_bytes(one, model.parameters()))
        else:
            one()
            peaks.append(peak_bytes(one, device))
    times = alternate(calls, device, rounds)
    return tuple(Cost(statistics.median(taken), peak) for taken, peak in zip(times, peaks, strict=True))


def _tensors(outputs: Any) -> list[Tensor]:
    """The floating tensors in a model's outputs."""
    if isinstance(outputs, Tensor):
        return [outputs] if outputs.is_floating_point() else []
    values = outputs.values() if hasattr(outputs, "values") else outputs
    return [tensor for value in values if value is not None for tensor in _tensors(value)]
