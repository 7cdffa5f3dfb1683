"""What an x86 CPU runs as kernels of our own, in float32 (`kernels.cpu`), where llvmlite (extra ``cpu``) is installed.

They need Linux, AVX2, numbers of channels that are multiples of 8, GELU, and PyTorch's threads to be libgomp's.
"""

from __future__ import annotations

import functools
import warnings
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import backend

_OLDEST_LLVMLITE = 0, 46


@functools.cache
def _kernels() -> ModuleType | None:
    """The launchers; None where llvmlite is missing or old, or ATen's calls were asked for."""
    try:
        version = metadata.version("llvmlite")
    except metadata.PackageNotFoundError:
        return None
    if backend.REQUEST == "aten" or tuple(map(int, version.split(".")[:2])) < _OLDEST_LLVMLITE:
        return None
    try:
        from .kernels.cpu import launching
    except (ImportError, OSError) as error:
        warnings.warn(f"the kernels for CPUs do not run, for llvmlite cannot be imported: {error}", stacklevel=2)
        return None
    return launching


def describe() -> str:
    """What the kernels are compiled for here, in words, or why there are none."""
    kernels = _kernels()
    if kernels is None:
        return "none, they need llvmlite (extra cpu) and CONVNEXT_FAST_BACKEND other than aten"
    names = {kernels.AVX512: "AVX-512", kernels.AVX2: "AVX2"}
    found = [name for machine, name in names.items() if kernels.has(machine)]
    return found[0] if found else "none, they need Linux, an x86 processor with AVX2 and PyTorch's libgomp"


def _machine_for(*channels: int) -> Any:
    """What kernels for these numbers of channels are compiled for; None where they do not serve."""
    kernels = _kernels()
    return None if kernels is None else kernels.machine_for(*channels)


@functools.lru_cache(1024, typed=True)
def _launch(*arguments: Any) -> Any:
    return _kernels().Launch(*arguments)


def _as_read(vector: Tensor) -> Tensor:
    """As the kernels read it."""
    return vector.to(torch.float32).contiguous()


class CompiledBlock:
    """A frozen block as one kernel; ``machine``: what the weights are packed for."""

    def __init__(self, weights: tuple[Tensor | None, ...], machine: Any):
        dwconv_weight, dwconv_bias, w1, b1, w2, b2 = weights
        kernels = self.kernels = _kernels()
        hidden, channels = w1.shape
        self.machine, self.channels, self.options = machine, channels, (channels, hidden, dwconv_weight.shape[2])
        taps = dwconv_weight.reshape(channels, -1).t().clone(memory_format=torch.contiguous_format)
        w1, w2 = kernels.pack(w1, machine), kernels.pack(w2, machine)
        bias = w1.new_zeros(channels) if dwconv_bias is None else dwconv_bias
        # Copies: PyTorch may move a tensor's memory (`Module.share_memory`), and addresses are kept.
        self.weights = taps, _as_read(bias).clone(), w1, _as_read(b1[0]).clone(), w2, _as_read(b2).clone()
        self.addresses = tuple(weight.data_ptr() for weight in self.weights)

    def launch(self, x: Tensor, eps: float) -> Any:
        """The kernel for images like x."""
        samples, height, width, _ = x.shape
        sizes = self.kernels.BlockSizes.of(*self.options, width)
        image = height, width
        return _launch(self.machine, sizes, samples, image, image, eps, torch.get_num_threads())

    def __call__(self, x: Tensor, eps: float) -> Tensor:
        """`prepared.Prepared`."""
        return self.launch(x, eps)(x, torch.empty_like(x), self.addresses)


def run_chain(chain: list[tuple[CompiledBlock, float]], x: Tensor) -> Tensor:
    """x (N, H, W, C), contiguous, through blocks with their epsilons."""
    launches = [(block.launch(x, eps), block.addresses) for block, eps in chain]
    return _kernels().run_in_turn(launches, x, [torch.empty_like(x) for _ in launches[:2]])


def prepare(weights: tuple[Tensor | None, ...], act: str) -> CompiledBlock | None:
    """The block of these weights made ready; None where the kernel does not serve."""
    w1 = weights[2]
    machine = _machine_for(*w1.shape) if act == "gelu" else None
    return None if machine is None else CompiledBlock(weights, machine)


def dwconv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Depthwise convolution of x (N, H, W, C) that `onednn.serves`, the same shape; None where no kernel serves."""
    samples, height, width, channels = x.shape
    machine = _machine_for(channels)
    if machine is None:
        return None
    x, taps = x.contiguous(), weight.reshape(channels, -1).t().contiguous()
    bias = x.new_zeros(channels) if bias is None else _as_read(bias)
    sizes = _kernels().DwconvSizes.of(channels, weight.shape[2], width)
    image = height, width
    launch = _launch(machine, sizes, samples, image, image, 0.0, torch.get_num_threads())
    return launch(x, torch.empty_like(x), (taps.data_ptr(), bias.data_ptr()))


def dwconv_weight_grad(x: Tensor, du: Tensor, side: int) -> Tensor | None:
    """(C, 1, side, side) for x and du (N, H, W, C) that `onednn.serves`; None where no kernel serves."""
    samples, height, width, channels = x.shape
    machine = _machine_for(channels)
    if machine is None:
        return None
    x, du, dw = x.contiguous(), du.contiguous(), x.new_empty(side * side, channels)
    kernels = _kernels()
    pointers = (tensor.data_ptr() for tensor in (x, du, dw))
    kernels.run(machine, kernels.WgradSizes(channels, side), *pointers, samples, height, width)
    return dw.t().contiguous().view(channels, 1, side, side)


def serves_gelu(a: Tensor) -> bool:
    """Whether `gelu` and `gelu_bwd_` serve for a that `onednn.serves`."""
    return a.is_contiguous() and _machine_for(a.shape[-1]) is not None


def gelu(a: Tensor) -> Tensor:
    """GELU(a)."""
    kernels, machine = _kernels(), _machine_for(a.shape[-1])
    h = torch.empty_like(a)
    kernels.run(machine, kernels.ElementwiseSizes(False), a.data_ptr(), h.data_ptr(), 0, a.numel())
    return h


def gelu_bwd_(dh: Tensor, a: Tensor, h: Tensor) -> None:
    """dh·GELU'(a) in the place of dh, GELU(a) in h, which may be a."""
    kernels, machine = _kernels(), _machine_for(a.shape[-1])
    pointers = (tensor.data_ptr() for tensor in (a, h, dh))
    kernels.run(machine, kernels.ElementwiseSizes(True), *pointers, a.numel())


_PACKED = WeakTensorKeyDictionary()


def frozen_downsample(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor | None:
    """`aten.frozen_downsample_fwd` for x that `onednn.serves`; None where the kernel does not serve."""
    machine = _machine_for(x.shape[3], weight.shape[0])
    if machine is None:
        return None
    packed = _PACKED.get(weight)
    if packed is None:
        packed = _PACKED[weight] = _kernels().pack(weight.permute(0, 2, 3, 1).flatten(1), machine)
    bias, nowhere = _as_read(bias), (0, 0)
    addresses = packed.data_ptr(), bias.data_ptr(), *nowhere
    return _patches(machine, x.contiguous(), weight, eps, addresses, x.shape[3], x.shape[1:3])


def stem(
    image: Tensor, weight: Tensor, bias: Tensor | None, ln_weight: Tensor, ln_bias: Tensor, eps: float
) -> Tensor | None:
    """`aten.patchify_stem_fwd` for an image that `onednn.serves`; None where the kernel does not serve."""
    machine = _machine_for(weight.shape[0])
    if machine is None or weight[0].numel() % _kernels().UNROLL:
        return None
    packed = _kernels().pack(weight.flatten(1), machine)
    bias = packed.new_zeros(weight.shape[0]) if bias is None else bias
    parameters = [packed, *map(_as_read, (bias, ln_weight, ln_bias))]
    addresses = tuple(parameter.data_ptr() for parameter in parameters)
    return _patches(machine, image.contiguous(), weight, eps, addresses, image.shape[1], image.shape[2:], stem=True)


def _patches(
    machine: Any,
    x: Tensor,
    weight: Tensor,
    eps: float,
    addresses: tuple[int, ...],
    channels: int,
    image: torch.Size,
    stem: bool = False,
) -> Tensor:
    out_channels, _, kh, kw = weight.shape
    result = image[0] // kh, image[1] // kw
    sizes = _kernels().PatchSizes(channels, out_channels, kh, kw, stem)
    launch = _launch(machine, sizes, x.shape[0], tuple(image), result, eps, torch.get_num_threads())
    return launch(x, x.new_empty(x.shape[0], *result, out_channels), addresses)
