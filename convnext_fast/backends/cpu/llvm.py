"""The kernels that LLVM compiles for an x86 CPU, in float32 (`kernels.cpu`): packing their weights and running them.

They need Linux, AVX2, llvmlite, GELU, numbers of channels that are multiples of 8, and a PyTorch that uses libgomp's
threads.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from itertools import chain, cycle
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...kernels.weights import FrozenBlock
from .. import environment
from ..steps import patched

_OLDEST_LLVMLITE = 0, 46


@functools.cache
def launchers() -> ModuleType | None:
    """The launchers; None if llvmlite is missing or too old, or if ATen was requested."""
    try:
        version = metadata.version("llvmlite")
    except metadata.PackageNotFoundError:
        return None
    if environment.REQUEST == "aten" or tuple(map(int, version.split(".")[:2])) < _OLDEST_LLVMLITE:
        return None
    try:
        from ...kernels.cpu import launching
    except (ImportError, OSError) as error:
        warnings.warn(f"the kernels for CPUs do not run, because llvmlite cannot be imported: {error}", stacklevel=2)
        return None
    return launching


def describe() -> str:
    """What the kernels are compiled for here, or why there are none, as text for people."""
    kernels = launchers()
    if kernels is None:
        return "none, they need llvmlite and CONVNEXT_FAST_BACKEND other than aten"
    names = {kernels.AVX512: "AVX-512", kernels.AVX2: "AVX2"}
    found = [name for machine, name in names.items() if kernels.has(machine)]
    return found[0] if found else "none, they need Linux, an x86 processor with AVX2 and PyTorch's libgomp"


def machine_for(*channels: int) -> Any:
    """The machine that kernels for these numbers of channels are compiled for; None if they are not supported."""
    kernels = launchers()
    return None if kernels is None else kernels.machine_for(*channels)


def serves_block(channels: int, hidden: int, act: str) -> bool:
    """Whether the kernels run blocks of this width, frozen or in training."""
    return act == "gelu" and machine_for(channels, hidden) is not None


@functools.lru_cache(256, typed=True)
def _launch(*arguments: Any) -> Any:
    return launchers().Launch(*arguments)


class Kernel:
    """A step as one kernel, for contiguous x (N, H, W, C), or a stem's (N, C, H, W), that `onednn.supports`.

    machine: what its weights are packed for; weights: the copies that its addresses point to, because PyTorch may move
    a tensor's memory (`Module.share_memory`); sizes: what the kernel is compiled for, given the width of x; patch: the
    size (C', C, kh, kw) of a patch convolution's weight, None for a block.
    """

    def __init__(self, machine: Any, weights: Sequence[Tensor], sizes: Callable, patch: Any = None, stem: bool = False):
        self.machine, self.weights, self.sizes, self.patch, self.stem = machine, weights, sizes, patch, stem
        self.addresses = tuple(weight.data_ptr() for weight in weights)

    def launch(self, shape: Sequence[int], eps: float) -> Any:
        """`kernels.cpu.launching.Launch` for images of this shape."""
        image = tuple(shape[2:] if self.stem else shape[1:3])
        sizes, result = self.sizes(image[1]), tuple(self.result(shape)[1:3])
        return _launch(self.machine, sizes, shape[0], image, result, eps, torch.get_num_threads())

    def result(self, shape: Sequence[int]) -> Sequence[int]:
        """The shape of the result."""
        return shape if self.patch is None else patched(shape, self.patch, self.stem)

    def __call__(self, x: Tensor, eps: float) -> Tensor:
        """A new tensor (N, H, W, C)."""
        y = x.new_empty(self.result(x.shape))
        launchers().run_sequence([(self.launch(x.shape, eps), self.addresses)], [x.data_ptr(), y.data_ptr()])
        return y


class CompiledBlock(Kernel):
    """A frozen block."""

    def __init__(self, weights: FrozenBlock, machine: Any):
        (hidden, channels), side = weights.w1.shape, weights.dwconv_weight.shape[2]
        held = chain.from_iterable(self.packed(weights, machine))
        super().__init__(machine, tuple(held), partial(launchers().BlockSizes.of, channels, hidden, side))

    @staticmethod
    def packed(weights: FrozenBlock, machine: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The weights that the kernels read: those up to the hidden units, and those after them."""
        dwconv_weight, dwconv_bias, w1, b1, w2, b2, _ = weights
        pack, channels = launchers().pack, w1.shape[1]
        taps = dwconv_weight.reshape(channels, -1).t().clone(memory_format=torch.contiguous_format)
        bias = w1.new_zeros(channels) if dwconv_bias is None else dwconv_bias
        return (taps, _copy(bias), pack(w1, machine), _copy(b1[0])), (pack(w2, machine), _copy(b2))


class CompiledPatches(Kernel):
    """A stem, with ``parameters`` bias, ln_weight and ln_bias, or a frozen downsampling layer, with bias alone."""

    def __init__(self, machine: Any, weight: Tensor, *parameters: Tensor):
        stem, (out_channels, channels, *patch) = len(parameters) == 3, weight.shape
        rows = weight if stem else weight.permute(0, 2, 3, 1)
        held = launchers().pack(rows.flatten(1), machine), *map(_copy, parameters)
        sizes = launchers().PatchSizes(channels, out_channels, *patch, stem)
        super().__init__(machine, held, lambda width: sizes, weight.shape, stem)
        if not stem:
            self.addresses += 0, 0


def dense(tensor: Tensor | None) -> Tensor | None:
    """The tensor as kernels read it: contiguous and without the negative bit."""
    return None if tensor is None else tensor.resolve_neg().contiguous()


def _copy(vector: Tensor) -> Tensor:
    """A copy as the kernels read it."""
    return dense(vector.to(torch.float32, copy=True))


def run(
    kernels: Sequence[Kernel], eps: Sequence[float], shapes: Sequence[Sequence[int]], x: Tensor, ends: Sequence[int]
) -> list[Tensor]:
    """Run x, contiguous, through kernels with their epsilons; returns the outputs of the kernels numbered ``ends``.

    ends: in ascending order, including the last kernel. shapes: of all results. Intermediate results alternate between
    two scratch buffers.
    """
    results = {end: x.new_empty(shapes[end]) for end in ends}
    befores = chain([x.shape], shapes)
    launches = [
        (kernel.launch(before, e), kernel.addresses) for kernel, e, before in zip(kernels, eps, befores, strict=False)
    ]
    between = [math.prod(shape) for i, shape in enumerate(shapes) if i not in results]
    spare = x.new_empty(2, max(between, default=0))
    turns = cycle(row.data_ptr() for row in spare)
    places = [results[i].data_ptr() if i in results else next(turns) for i in range(len(kernels))]
    launchers().run_sequence(launches, [x.data_ptr(), *places])
    return [results[end] for end in ends]


def prepare_stem(weight: Tensor, bias: Tensor | None, ln_weight: Tensor, ln_bias: Tensor) -> CompiledPatches | None:
    """The kernel of a stem, with its current weights packed; None if not supported."""
    machine = machine_for(weight.shape[0])
    if machine is None or weight[0].numel() % launchers().UNROLL:
        return None
    bias = torch.zeros_like(ln_bias) if bias is None else bias
    return CompiledPatches(machine, weight, bias, ln_weight, ln_bias)


def dwconv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Depthwise convolution of x (N, H, W, C) that `onednn.supports`, the same shape; None if not supported."""
    samples, height, width, channels = x.shape
    machine = machine_for(channels)
    if machine is None:
        return None
    x, taps = dense(x), dense(weight.reshape(channels, -1).t())
    bias = x.new_zeros(channels) if bias is None else dense(bias.to(torch.float32))
    sizes = launchers().DwconvSizes.of(channels, weight.shape[2], width)
    image = height, width
    launch = _launch(machine, sizes, samples, image, image, 0.0, torch.get_num_threads())
    return launch(x, torch.empty_like(x), (taps.data_ptr(), bias.data_ptr()))


def dwconv_weight_grad(x: Tensor, du: Tensor, side: int) -> Tensor | None:
    """(C, 1, side, side) for x and du (N, H, W, C) that `onednn.supports`; None if not supported."""
    samples, height, width, channels = x.shape
    machine = machine_for(channels)
    if machine is None:
        return None
    x, du, dw = dense(x), dense(du), x.new_empty(side * side, channels)
    kernels = launchers()
    pointers = (tensor.data_ptr() for tensor in (x, du, dw))
    kernels.run(machine, kernels.WgradSizes(channels, side), *pointers, samples, height, width)
    return dw.t().contiguous().view(channels, 1, side, side)


def supports_gelu(a: Tensor) -> bool:
    """Whether `gelu` and `gelu_bwd_` support a tensor a that `onednn.supports`."""
    return a.is_contiguous() and machine_for(a.shape[-1]) is not None


def gelu(a: Tensor) -> Tensor:
    """GELU(a)."""
    kernels, machine = launchers(), machine_for(a.shape[-1])
    h = torch.empty_like(a)
    kernels.run(machine, kernels.ElementwiseSizes(False), a.data_ptr(), h.data_ptr(), 0, a.numel())
    return h


def gelu_bwd_(dh: Tensor, a: Tensor, h: Tensor) -> None:
    """Write dh·GELU'(a) over dh, and GELU(a) to h, which may be a."""
    kernels, machine = launchers(), machine_for(a.shape[-1])
    pointers = (tensor.data_ptr() for tensor in (a, h, dh))
    kernels.run(machine, kernels.ElementwiseSizes(True), *pointers, a.numel())
