"""Run the CPU kernels on tensors between protected pages. It is a script, because a bad access ends its process.

Prints a line for each case. An access before the first byte of a tensor, or after its last one, is a segmentation
fault; an access to memory in between shows in the values.
"""

import ctypes
import mmap

import torch
from convnext_fast.kernels.cpu import launching
from convnext_fast.kernels.cpu.machine import AVX2, AVX512
from frozen_support import frozen_v2_weights, frozen_weights

from convnext_fast.backends.cpu import llvm, llvm_grn, llvm_mlp
from convnext_fast.backends.cpu.aten_layers import Mlp, Norm
from convnext_fast.backends.cpu.response_norm import ResponseNorm

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(like: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy between two forbidden pages, next to one of them; never freed."""
    size = like.numel() * 4
    pages = -(-size // PAGE) * PAGE
    everything = mmap.PROT_READ | mmap.PROT_WRITE
    start = _libc.mmap(None, pages + 2 * PAGE, everything, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    for forbidden in (start, start + PAGE + pages):
        assert _libc.mprotect(forbidden, PAGE, 0) == 0
    first = start + PAGE + (pages - size if at_end else 0)
    memory = (ctypes.c_float * like.numel()).from_address(first)
    return torch.frombuffer(memory, dtype=torch.float32).view(like.shape).copy_(like)


class GuardedLaunch(launching.Launch):
    """Guards scratch memory, too."""

    at_end = True

    def start(self, x, y, weights, scratch):
        return super().start(x, y, weights, guarded(scratch, self.at_end) if scratch.numel() else scratch)


def run(launch, x: torch.Tensor, y: torch.Tensor, weights: list[torch.Tensor], expected: torch.Tensor) -> None:
    for at_end in (True, False):
        GuardedLaunch.at_end = at_end
        held = [guarded(weight, at_end) for weight in weights]
        result = guarded(torch.full_like(y, float("nan")), at_end)
        launch(guarded(x, at_end), result, [weight.data_ptr() for weight in held])
        assert torch.equal(result, expected)


def block(machine, image, channels, hidden, side):
    kept = llvm.CompiledBlock(frozen_weights(channels, hidden, side), machine)
    x = torch.randn(*image, channels)
    sizes = launching.BlockSizes.of(channels, hidden, side, image[2])
    launch = GuardedLaunch(machine, sizes, image[0], image[1:], image[1:], 1e-6, torch.get_num_threads())
    run(launch, x, x, kept.weights, kept(x, 1e-6))


def v2_block(machine, image, channels, hidden, side):
    kept = llvm_grn.CompiledV2Block(frozen_v2_weights(channels, hidden, side), machine)
    x = torch.randn(*image, channels)
    sizes = launching.GrnBlockSizes.of(channels, hidden, side, image[2])
    launch = GuardedLaunch(machine, sizes, image[0], image[1:], image[1:], 1e-6, torch.get_num_threads())
    h = torch.zeros(image[0] * image[1] * image[2] + machine.rows, hidden + launching.PADDING)
    run(launch, x, x, [*kept.weights, h, torch.zeros(launch.units, hidden)], kept(x, 1e-6))


def patches(machine, stem):
    sizes = launching.PatchSizes(3 if stem else 32, 48, 4, 4, stem)
    image, result = (31, 46), (7, 11)
    x = torch.randn(2, 3, *image) if stem else torch.randn(2, *image, 32)
    y = torch.empty(2, *result, 48)
    weights = [launching.pack(torch.randn(48, sizes.depth), machine), *torch.randn(3, 48)]
    launch = GuardedLaunch(machine, sizes, 2, image, result, 1e-6, torch.get_num_threads())
    expected = launch(x, y, [weight.data_ptr() for weight in weights])
    run(launch, x, y, weights, expected.clone())


def convolution(machine, image, channels, side):
    x, du = torch.randn(2, *image, channels)
    taps, bias = torch.randn(side * side, channels), torch.randn(channels)
    sizes = launching.DwconvSizes.of(channels, side, image[2])
    launch = GuardedLaunch(machine, sizes, image[0], image[1:], image[1:], 0.0, torch.get_num_threads())
    expected = launch(x, torch.empty_like(x), [taps.data_ptr(), bias.data_ptr()])
    run(launch, x, x, [taps, bias], expected)

    def weight_grad(x, du, dw):
        pointers = (tensor.data_ptr() for tensor in (x, du, dw))
        launching.run(machine, launching.WgradSizes(channels, side), *pointers, *image)
        return dw

    expected = weight_grad(x, du, torch.empty_like(taps))
    for at_end in (True, False):
        given = (guarded(tensor, at_end) for tensor in (x, du, torch.full_like(taps, float("nan"))))
        assert torch.equal(weight_grad(*given), expected)


def elementwise(machine, count):
    a, dh = torch.randn(2, count)
    for backward in (False, True):
        sizes = launching.ElementwiseSizes(backward)
        expected = [a.clone(), torch.empty_like(a), dh.clone()]
        launching.run(machine, sizes, *(tensor.data_ptr() for tensor in expected), count)
        for at_end in (True, False):
            held = [guarded(tensor, at_end) for tensor in (a, torch.full_like(a, float("nan")), dh)]
            launching.run(machine, sizes, *(tensor.data_ptr() for tensor in held), count)
            assert all(map(torch.equal, held, expected))


def rows_alone(machine, rows, channels, hidden, scaled, saves, samples=0):
    """Forward and backward of the MLP, which launch their kernels themselves: every tensor of a launch is guarded.

    samples: V2's, for that many samples.
    """
    u, residual, dy = torch.randn(3, rows, channels)
    norm = Norm(*torch.randn(2, channels), 1e-6)
    weights = torch.randn(hidden, channels), torch.randn(hidden), torch.randn(channels, hidden)
    mlp = Mlp(*weights, *torch.randn(2, channels), "gelu")
    scale = torch.rand(rows, 1) if scaled else None

    def step():
        grn = ResponseNorm(*torch.ones(2, hidden), rows // samples) if samples else None
        weights = norm, mlp._replace(gamma=None) if samples else mlp, grn, scale
        y, a, norms = llvm_mlp.mlp_fwd(machine, u, residual, *weights, saves, overwrite=False)
        grads = llvm_mlp.mlp_bwd(machine, dy, u, a, *weights)
        return [result for result in (y, norms, *grads) if result is not None]

    expected = step()
    plain = llvm_mlp.addresses, launching.run, launching.memory
    for at_end in (True, False):
        pairs = []

        def addresses(tensors, at_end=at_end, pairs=pairs):
            pairs += [(tensor, guarded(tensor, at_end)) for tensor in tensors if tensor is not None]
            held = iter(pairs[len(pairs) - sum(tensor is not None for tensor in tensors) :])
            return [0 if tensor is None else next(held)[1].data_ptr() for tensor in tensors]

        def run(*arguments, pairs=pairs):
            plain[1](*arguments)
            for tensor, copy in pairs:
                tensor.copy_(copy)
            pairs.clear()

        llvm_mlp.addresses, launching.run = addresses, run
        launching.memory = lambda count, at_end=at_end: guarded(torch.full((count,), float("nan")), at_end)
        try:
            assert all(map(torch.equal, step(), expected))
        finally:
            llvm_mlp.addresses, launching.run, launching.memory = plain


if __name__ == "__main__":
    torch.manual_seed(0)
    for machine in filter(launching.has, (AVX2, AVX512)):
        for case in (
            ((2, 9, 9), 32, 64, 7), ((1, 3, 70), 48, 80, 7), ((3, 2, 3), 16, 64, 7), ((1, 1, 1), 16, 16, 5),
            ((1, 30, 7), 80, 96, 3), ((2, 14, 14), 96, 384, 7), ((1, 1, 3718), 16, 16, 7), ((1, 2, 4161), 16, 16, 7),
        ):  # fmt: skip
            block(machine, *case)
            print("ok", machine.lanes, *case)
        for case in (((1, 3, 70), 48, 80, 7), ((1, 1, 1), 16, 16, 5), ((2, 14, 14), 96, 384, 7)):
            v2_block(machine, *case)
            print("ok", machine.lanes, *case)
        for case in (((2, 9, 9), 32, 7), ((1, 3, 70), 48, 5), ((3, 2, 3), 16, 7), ((2, 14, 14), 96, 3)):
            convolution(machine, *case)
            print("ok", machine.lanes, *case)
        for case in ((1, 16, 16, False, True), (70, 48, 80, True, False), (229, 32, 128, False, False)):
            rows_alone(machine, *case)
            print("ok", machine.lanes, *case)
        for case in ((1, 16, 16, False, True, 1), (70, 48, 80, True, False, 7), (2 * 131, 32, 128, False, False, 2)):
            rows_alone(machine, *case)
            print("ok", machine.lanes, *case)
        elementwise(machine, 16 * 37)
        print("ok", machine.lanes, "elementwise")
        for stem in (True, False):
            patches(machine, stem)
            print("ok", machine.lanes, "stem" if stem else "downsampling")
