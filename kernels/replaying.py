"""What a call of the kernels does on the host, recorded once and repeated: allocate these, launch those.

Which form of a kernel runs, in which configuration, on what grid and with what memory between the launches, depends on
the shapes, strides, dtypes and alignments of a call's tensors and on its other arguments, never on values. Finding it
costs the host more time than most kernels take. So the first call of its kind runs as it is written (it compiles and
may tune), the second is recorded, and the third and later ones repeat the record, with addresses in the place of
tensors. A call that does anything but allocate, look at parts of tensors and launch is not recorded.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

from .launching import PLAIN, current, listening
from .mlp.tuning import dot_precision

Function = TypeVar("Function", bound=Callable)
MOST = 4096
"""Kinds of calls that are remembered; when there are more, as of images of ever new sizes, all are forgotten."""
_plans: dict[tuple[Hashable, ...], Plan | None] = {}
_VALUES = frozenset((type(None), int, float, str, bool, torch.dtype))
_ALLOCATIONS = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default)
_ALIGNMENT = 512  # bytes, as CUDA's allocator gives: no kernel asks for more


def serves(tensor: Tensor) -> bool:
    """Whether calls on ``tensor`` may be repeated: on NVIDIA, as AMD's kernels also depend on a storage's size."""
    return tensor.is_cuda and torch.version.hip is None and not torch._C._len_torch_dispatch_stack()


def replayed(function: Function) -> Function:
    """``function(tensor, ...)``, which returns a tensor or a tuple of tensors and None, repeating earlier calls."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        known = _kind(function, args) if serves(args[0]) else None
        if known is None:
            return function(*args)
        kind, addresses = known
        plan = _plans.get(kind, _UNKNOWN)
        if plan is None:
            return function(*args)
        if plan is _UNKNOWN:
            if len(_plans) >= MOST:
                _plans.clear()
            _plans[kind] = _ONCE
            return function(*args)
        if plan is _ONCE:
            results, _plans[kind] = _record(function, args)
            return results
        with current(args[0]):
            return plan.repeat(args[0], addresses)

    return call  # type: ignore[return-value]


def _kind(function: Callable, args: tuple) -> tuple[tuple[Hashable, ...], list[int]] | None:
    """All that a call depends on but values, and its tensors' addresses; None where an argument is of another type."""
    key: list[Hashable] = [function, args[0].get_device(), dot_precision(args[0])]
    addresses = []
    for arg in _flat(args):
        kind = type(arg)
        if kind in PLAIN:
            address = arg.data_ptr()
            addresses.append(address)
            key += (arg.shape, arg.stride(), arg.dtype, address % 16)
        elif kind in _VALUES:
            key += (kind, arg)
        else:
            return None
    return tuple(key), addresses


def _flat(args: Iterable[Any]) -> Iterator[Any]:
    """The arguments with groups of weights (tuples) taken apart."""
    for arg in args:
        if isinstance(arg, tuple):
            yield from arg
        else:
            yield arg


class Plan(NamedTuple):
    """A recorded call. Memory is numbered: its tensors', the scratch memory, then that of each allocation.

    Attributes:
        scratch: bytes that only the launches see.
        allocations: (shape, strides, dtype) of tensors that are returned, or parts of which are.
        places: (memory, offset in bytes) of every pointer that is launched with.
        values: all other parameters of the launches.
        launches: a compiled kernel on its grid, and what takes its parameters from the addresses and the values.
        results: for each result None, or its allocation and the (shape, strides, offset) that it is of that.
        single: whether the result is one tensor, no tuple.
    """

    scratch: int
    allocations: list[tuple[torch.Size, tuple[int, ...], torch.dtype]]
    places: list[tuple[int, int]]
    values: list[Any]
    launches: list[tuple[Callable[..., None], Callable[[list], tuple]]]
    results: list[tuple[int, tuple[torch.Size, tuple[int, ...], int] | None] | None]
    single: bool

    def repeat(self, tensor: Tensor, addresses: list[int]) -> Any:
        """The results of such a call, on the device of ``tensor``, with its tensors at ``addresses``."""
        device = tensor.device
        scratch = torch.empty(self.scratch, dtype=torch.uint8, device=device)
        made = [torch.empty_strided(shape, stride, dtype=t, device=device) for shape, stride, t in self.allocations]
        memory = [*addresses, scratch.data_ptr(), *map(Tensor.data_ptr, made)]
        pool = [memory[number] + offset for number, offset in self.places]
        pool += self.values
        stream = driver.active.get_current_stream(tensor.get_device())
        for kernel, parameters in self.launches:
            kernel(*parameters(pool), stream=stream)
        results = []
        for result in self.results:
            if result is not None:
                number, part = result
                result = made[number] if part is None else made[number].as_strided(*part)
            results.append(result)
        return results[0] if self.single else tuple(results)


_UNKNOWN, _ONCE = (Plan(0, [], [], [], [], [], False) for _ in range(2))  # stand for plans that are not made yet


class _Recorder(TorchDispatchMode):
    """Hears what a call allocates and launches; ``faithful`` as long as it does nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.faithful = True
        self.allocated: list[Tensor] = []
        self.launches: list[tuple[Any, tuple[int, ...], tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS and out.numel():
            self.allocated.append(out)
        elif not func.is_view:
            self.faithful = False
        return out

    def __enter__(self):
        self.before, listening.ear = listening.ear, lambda *launch: self.launches.append(launch)
        return super().__enter__()

    def __exit__(self, *error):
        listening.ear = self.before
        return super().__exit__(*error)


class _Regions:
    """The memory of a recorded call: which addresses are which place, (number, offset), of a plan."""

    def __init__(self) -> None:
        self.known: list[tuple[int, int, int, int]] = []

    def add(self, tensor: Tensor, number: int, offset: int = 0) -> None:
        span = 1 + sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride(), strict=True))
        low = tensor.data_ptr()
        self.known.append((low, low + span * tensor.element_size(), number, offset))

    def apart(self) -> bool:
        """Whether no two overlap: an address in both would not tell which of the two is meant."""
        return all(one[1] <= other[0] for one, other in itertools.pairwise(sorted(self.known)))

    def place(self, address: int) -> tuple[int, int] | None:
        for low, high, number, offset in self.known:
            if low <= address < high:
                return number, offset + address - low
        return None


def _record(function: Callable, args: tuple) -> tuple[Any, Plan | None]:
    """What the call returns, and its plan where there can be one."""
    with _Recorder() as recorder:
        outcome = function(*args)
    single = isinstance(outcome, Tensor)
    results = (outcome,) if single else outcome
    given = [arg for arg in _flat(args) if type(arg) in PLAIN]
    bases = {each.untyped_storage().data_ptr() for each in results if each is not None}
    made = [tensor for tensor in recorder.allocated if tensor.data_ptr() in bases]
    regions, scratch = _Regions(), 0
    for tensor in recorder.allocated:
        if tensor.data_ptr() not in bases:
            regions.add(tensor, len(given), scratch)
            scratch += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    for number, tensor in (*enumerate(given), *enumerate(made, len(given) + 1)):
        regions.add(tensor, number)
    places: dict[tuple[int, int] | None, int] = {}
    values: list[Any] = []
    taken = []
    for compiled, grid, parameters in recorder.launches:
        indices = []
        for value in parameters:
            if isinstance(value, Tensor):
                indices.append((0, places.setdefault(regions.place(value.data_ptr()), len(places))))
            else:
                indices.append((1, len(values)))
                values.append(value)
        taken.append((compiled[(*grid, 1, 1)[:3]], indices))
    whole = all(tensor.numel() for tensor in given) and len(made) == len(bases) and None not in places
    if not (recorder.faithful and whole and regions.apart()):
        return outcome, None
    starts = (0, len(places))
    return outcome, Plan(
        scratch,
        [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in made],
        list(places),  # type: ignore[arg-type]
        values,
        [(kernel, itemgetter(*(starts[kind] + at for kind, at in indices))) for kernel, indices in taken],
        [None if each is None else _part(each, made) for each in results],
        single,
    )


def _part(result: Tensor, made: list[Tensor]) -> tuple[int, tuple[torch.Size, tuple[int, ...], int] | None]:
    """The allocation that ``result`` lies in, and which part of it it is, None for the whole."""
    base = result.untyped_storage().data_ptr()
    number = next(i for i, tensor in enumerate(made) if tensor.data_ptr() == base)
    whole = result.shape == made[number].shape and result.stride() == made[number].stride()
    return number, None if whole else (result.shape, result.stride(), result.storage_offset())
