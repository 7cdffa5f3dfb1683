"""Functions that look as if they launched kernels, for the tests of recorded plans."""

from types import SimpleNamespace
from unittest import mock

import torch
from convnext_fast.kernels import replaying
from convnext_fast.kernels.launching import launch_hook

PTX = """.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1,
	.param .f32 kernel_param_2,
	.param .u64 .ptr .global .align 1 kernel_param_3,
	.param .u64 .ptr .global .align 1 kernel_param_4
)
"""


EPS, X, WEIGHT = 1e-6, torch.randn(8, 4), torch.randn(6)


class Kernel:
    """Looks like a compiled kernel of (pointer, int, float, pointer): ``function`` is its handle."""

    def __init__(self, function=7, ptx=PTX, **metadata):
        self.function, self.asm, self.packed_metadata = function, {"ptx": ptx}, (4, 1, 2048)
        self.metadata = SimpleNamespace(num_ctas=1, **metadata)
        self.src = SimpleNamespace(
            signature={"x": "*fp32", "n": "i32", "eps": "fp32", "BLOCK": "constexpr", "y": "*fp32"}
        )


def launched(kernel, grid, *parameters):
    """Report a launch to the recording, as `launching.launch` does."""
    recording = launch_hook.recording
    if recording is not None:
        recording.note(kernel, grid, recording.places(parameters))


def known(function, *arguments):
    """The replayed function, which already has a plan for such a call."""
    call = replaying.replayed(function)
    with mock.patch.object(replaying.Calls, "_repeat"):
        call(*arguments)
    return call


def scaled(kernel):
    """A function of x and a weight that allocates scratch memory and a result."""

    def function(x, weight, eps=EPS):
        scratch = torch.empty(8, dtype=torch.float32)
        launched(kernel, (3, 2), x, 5, eps, 128, scratch)
        y = torch.empty_like(x)
        launched(kernel, (1,), weight[1:], -6, 0.5, 128, scratch[4:])
        launched(kernel, (1, 1, 9), scratch, 7, 2.0, 128, y)
        return y.view(2, -1) if y.is_contiguous() else y

    return function
