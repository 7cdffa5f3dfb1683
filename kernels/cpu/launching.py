"""Compiles kernels and runs them on PyTorch's own threads.

PyTorch's Linux builds bring libgomp, whose threads keep spinning for a while after each parallel region. A second
thread pool would compete with them for the cores, so kernels are started with ``GOMP_parallel`` of the library that
PyTorch has loaded.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from llvmlite import binding
from torch import Tensor

from .code_cache import code_for
from .dwconv import DwconvSizes as DwconvSizes
from .dwconv_wgrad import WgradSizes as WgradSizes
from .frozen_block import BlockSizes as BlockSizes
from .gelu_rows import ElementwiseSizes as ElementwiseSizes
from .gemm import UNROLL as UNROLL
from .gemm import pack as pack
from .grn_fwd import GrnBlockSizes as GrnBlockSizes
from .grn_fwd import GrnMlpSizes as GrnMlpSizes
from .grn_mlp_bwd import GrnMlpBwdSizes as GrnMlpBwdSizes
from .layer_scale_bwd import LayerScaleSizes as LayerScaleSizes
from .machine import AVX2, AVX512, NEEDED, Machine, compile_for, host_features, identity, load
from .mlp import MlpSizes as MlpSizes
from .mlp_bwd import MlpBwdSizes as MlpBwdSizes
from .packing import PackSizes as PackSizes
from .patchify import PatchSizes as PatchSizes
from .weight_grad import WeightGradSizes as WeightGradSizes
from .work_sharing import ENTRY, NUMBERS, THREAD_FUNCTIONS, numbers, numbers_of_rows, scratch_rows
from .work_sharing import PADDING as PADDING
from .work_sharing import WIDE_WEIGHT as WIDE_WEIGHT
from .work_sharing import units_of_rows as units_of_rows

MOST = 256
"""Compiled kernels that are kept in memory; those that have not run for longest go first."""


@functools.cache
def _threads() -> ctypes.CDLL | None:
    """PyTorch's libgomp in this process; None if PyTorch uses another threading library."""
    if not sys.platform.startswith("linux"):
        return None
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    own = f"{Path(torch.__file__).parent}{os.sep}"
    found = sorted((path for path in paths if "libgomp" in Path(path).name), key=lambda path: not path.startswith(own))
    others = any(name in Path(path).name for path in paths for name in ("libiomp", "libomp."))
    if not found or (others and not found[0].startswith(own)):
        return None
    try:
        library = ctypes.CDLL(found[0])
    except OSError:  # the file was replaced while the process runs
        return None
    library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    return library


@functools.cache
def has(machine: Machine) -> bool:
    """Whether kernels for ``machine`` run here: where the processor and PyTorch (ATEN_CPU_CAPABILITY) agree."""
    if platform.machine() not in ("x86_64", "AMD64") or _threads() is None:
        return False
    allowed = {"DEFAULT": (), "AVX2": (AVX2,)}.get(torch.backends.cpu.get_cpu_capability(), (AVX2, AVX512))
    return machine in allowed and all(host_features().get(name, False) for name in NEEDED[machine])


@functools.cache
def machine_for(*sizes: int) -> Machine | None:
    """The widest supported vectors whose lanes divide every size; None if there are none."""
    fitting = (machine for machine in (AVX512, AVX2) if not any(size % machine.lanes for size in sizes))
    return next((machine for machine in fitting if has(machine)), None)


class Kernel(NamedTuple):
    """A compiled kernel; its code is in memory as long as the engine is."""

    address: int
    engine: binding.ExecutionEngine


@functools.lru_cache(MOST, typed=True)  # sizes of different kernels may compare equal
def _kernel(machine: Machine, sizes: Any) -> Kernel:
    """The kernel that one of the classes ``…Sizes`` emits."""
    code = code_for(f"{identity(machine)} {sizes}", lambda: compile_for(machine, sizes.emit(machine)))
    threads = {name: ctypes.cast(getattr(_threads(), name), ctypes.c_void_p).value for name in THREAD_FUNCTIONS}
    engine = load(machine, code, threads)
    return Kernel(engine.get_function_address(ENTRY), engine)


def run(machine: Machine, sizes: Any, *fields: int) -> None:
    """A kernel whose argument is these numbers and addresses."""
    argument = (ctypes.c_int64 * len(fields))(*fields)
    kernel = _kernel(machine, sizes)
    _threads().GOMP_parallel(kernel.address, ctypes.addressof(argument), torch.get_num_threads(), 0)


def memory(count: int) -> Tensor:
    """A new uninitialised float32 tensor of ``count`` elements."""
    return torch.empty(count, dtype=torch.float32, device="cpu")


def run_rows(machine: Machine, sizes: Any, samples: int, rows: int, eps: float, *addresses: int) -> None:
    """Run a kernel without a convolution on samples of ``rows`` each, or on independent rows as one sample.

    addresses: all except that of the scratch buffer, which comes last.
    """
    threads = torch.get_num_threads()
    given = numbers_of_rows(machine, samples, rows, sizes.channels * sizes.hidden, eps, threads)
    scratch = memory(threads * scratch_rows(machine, given["unit"], given["units"]) * sizes.row)
    run(machine, sizes, *addresses, scratch.data_ptr(), *(given[name] for name in NUMBERS))


class Launch:
    """A kernel for images of one shape, not empty, and one number of threads.

    sizes: what the kernel is compiled for; samples: N; image, result: heights and widths of x and y. ``units``: of the
    whole result (`work_sharing`).
    """

    def __init__(
        self, machine: Machine, sizes: Any, samples: int, image: tuple, result: tuple, eps: float, threads: int
    ):
        given = numbers(samples, image, result, eps, threads)
        self.units = given["rows"] * given["pieces"]
        self.kernel, self.threads, self.run = _kernel(machine, sizes), threads, _threads().GOMP_parallel
        self.numbers = tuple(given[name] for name in NUMBERS)
        self.scratch_size = threads * scratch_rows(machine, given["unit"], given["units"]) * sizes.row
        # A tile's rows beyond the last pixel are computed too: on zeros, because leftover values can be slow.
        self.wants_zeros = bool(result[1] % (machine.rows // 2))
        self.argument = ctypes.c_int64 * (len(sizes.addresses) + len(NUMBERS))

    def start(self, x: int, y: int, weights: Sequence[int], scratch: Tensor) -> Callable[[], None]:
        """A function that runs the kernel; ``weights``: the addresses between those of y and of the scratch buffer."""
        argument = self.argument(x, y, *weights, scratch.data_ptr(), *self.numbers)
        return functools.partial(self.run, self.kernel.address, argument, self.threads, 0)

    def __call__(self, x: Tensor, y: Tensor, weights: Sequence[int]) -> Tensor:
        """y, filled, for x; both contiguous."""
        run_sequence([(self, weights)], [x.data_ptr(), y.data_ptr()])
        return y


def run_sequence(launches: Sequence[tuple[Launch, Sequence[int]]], places: Sequence[int]) -> None:
    """Run kernels, given the addresses of their weights: each reads one of ``places`` and writes the next."""
    new = torch.zeros if any(launch.wants_zeros for launch, _ in launches) else torch.empty
    scratch = new(max(launch.scratch_size for launch, _ in launches), dtype=torch.float32, device="cpu")
    calls = [
        launch.start(source, target, weights, scratch)
        for (launch, weights), (source, target) in zip(launches, itertools.pairwise(places), strict=True)
    ]
    for call in calls:
        call()
