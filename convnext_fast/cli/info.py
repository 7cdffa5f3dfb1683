"""The cost of a ConvNeXt, counted from its parameters' shapes, and what runs on this machine."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import NamedTuple

import torch

from .. import __version__
from ..backends import choose, environment
from ..backends.cpu import llvm
from ..checkpoints.load_save import load_checkpoint
from ..config import VARIANTS, ConvNextConfig
from ..config.checks import pair
from ..console import Console, print_table
from ..models.convnext import ConvNext


class Count(NamedTuple):
    """The cost of a part of a network for one image."""

    name: str  # "stem", "stage1", …, "head"
    blocks: int
    channels: int  # of its output, as height and width
    height: int
    width: int
    parameters: int
    macs: int  # multiply-accumulates of its convolutions and linear layers


def count(config: ConvNextConfig, image_size: int | tuple[int, int] | None = None) -> list[Count]:
    """The stem, each stage with the downsampling before it, and the head, for one image of (height, width) or a side.

    Papers call multiply-accumulates "FLOPs" (4.5 G for ConvNeXt-T at 224²); additions and products are twice as many.
    """
    size = config.image_shape if image_size is None else pair(image_size)
    height, width = (side // patch for side, patch in zip(size, config.patch_shape, strict=True))
    model, widths = ConvNext(config, device="meta"), config.hidden_sizes
    parts = [("stem", model.stem, 0, widths[0], height, width)]
    for i, (stage, depth) in enumerate(zip(model.stages, config.depths, strict=True)):
        parts.append((f"stage{i + 1}", stage, depth, widths[i], height >> i, width >> i))
    counts = []
    for name, part, *sizes in [*parts, ("head", model.head, 0, config.num_labels or widths[-1], 1, 1)]:
        own = list(part.parameters())
        per_pixel = sum(weight.numel() for weight in own if weight.dim() > 1)
        counts.append(Count(name, *sizes, sum(p.numel() for p in own), sizes[-2] * sizes[-1] * per_pixel))
    return counts


def versions() -> dict[str, str]:
    """Versions of this package and of its dependencies, or "not installed"."""
    found = {"convnext-fast": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "llvmlite", "numpy", "pillow", "safetensors", "huggingface_hub", "rich", "scikit-learn"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.version.cuda or torch.version.hip:
        found["cuda" if torch.version.cuda else "rocm"] = torch.version.cuda or torch.version.hip
    return found


def print_here(console: Console) -> None:
    """Print versions, and for each device the path that ``fused=True`` takes in each dtype."""
    print_table(console, "Versions", None, list(versions().items()))
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    rows, accelerator = [], torch.accelerator.current_accelerator(check_available=True)
    for device in [torch.device("cpu"), *([torch.device(accelerator.type)] if accelerator else [])]:
        name = device.type if device.type != "cuda" else f"cuda ({torch.cuda.get_device_name()})"
        rows.append((name, *(choose.select(device, dtype) for dtype in dtypes)))
    columns = ("device", *(str(dtype).removeprefix("torch.") for dtype in dtypes))
    print_table(console, "What fused=True runs here", columns, rows)
    console.print(f"CONVNEXT_FAST_BACKEND is {environment.REQUEST}.", soft_wrap=True)
    console.print(f"Kernels for this CPU: {llvm.describe()}.")


def print_variants(console: Console) -> None:
    """Print the size of each named variant, with 1000 classes at 224²."""
    rows = []
    for name, (depths, widths) in VARIANTS.items():
        counts = count(ConvNextConfig.from_variant(name, num_labels=1000))
        total, macs = sum(part.parameters for part in counts), sum(part.macs for part in counts)
        rows.append((name, "-".join(map(str, depths)), "-".join(map(str, widths)), _short(total), _short(macs)))
    columns = ("name", "depths", "widths", "parameters", "multiply-adds")
    print_table(console, "Variants (1000 classes, 224×224)", columns, rows)


def print_config(console: Console, config: ConvNextConfig, title: str) -> None:
    """Print what each part of a network costs for one image of the configuration's size."""
    counts = count(config)
    parameters, macs = sum(part.parameters for part in counts), sum(part.macs for part in counts)
    rows = []
    for part in counts:
        size = "" if part.name == "head" else f"{part.height}×{part.width}"
        cost = (_short(part.parameters), _short(part.macs), f"{part.macs / macs:.0%}" if macs else "")
        rows.append((part.name, str(part.blocks or ""), str(part.channels), size, *cost))
    rows.append(("all", str(sum(config.depths)), "", "", _short(parameters), _short(macs), ""))
    columns = ("part", "blocks", "channels", "output", "parameters", "multiply-adds", "share")
    print_table(console, title, columns, rows, total=True)
    height, width = config.image_shape
    console.print(
        f"One image of {config.num_channels}×{height}×{width}; {config.num_labels} classes; {config.activation}. "
        "Multiply-adds are what papers call FLOPs: products and sums are twice as many."
    )


def print_checkpoint(console: Console, source: str) -> None:
    """Print the format and the size of a checkpoint."""
    checkpoint = load_checkpoint(source)
    print_config(console, checkpoint.config, source)
    tensors = [*checkpoint.state_dict.values(), *checkpoint.extra.values()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    order = "before" if checkpoint.head_norm_first else "after"
    console.print(
        f"ConvNeXt V{checkpoint.config.version}. Names of {checkpoint.format}; {len(tensors)} tensors, "
        f"{size:,} bytes of {', '.join(dtypes)}; the last LayerNorm is {order} the pooling."
    )


def _short(value: int) -> str:
    """At least three significant digits, with an SI prefix."""
    for factor, prefix in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= factor:
            return f"{value / factor:.{1 if value >= 100 * factor else 2}f} {prefix}"
    return str(value)
