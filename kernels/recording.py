"""A call of the kernels recorded as a plan: its allocations, launches and results.

A plan holds for every call of the same kind, whatever memory its tensors lie in: an address is noted as a piece of
memory and an offset into it. Memory that only the launches see comes from one allocation, in which pieces that are
never used at the same time overlap. While a call is recorded, nothing is launched and no memory is taken. Afterwards
the plan is repeated for that call, too. Where a recorded call makes calls whose plans are known, these become parts of
its own plan.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

from .launching import PLAIN, launch_hook, with_scratch_memory

_aten = torch.ops.aten
_EMPTY, _OPTIONS = _aten.empty.memory_format, {"dtype", "device", "pin_memory"}
_ALLOCATIONS = (_EMPTY, _aten.empty_like.default, _aten.empty_strided.default, _aten.new_empty.default)
_ALIGNMENT = 512  # bytes, as CUDA's allocator gives: no kernel asks for more
_FIRST, _APART = 1 << 60, 1 << 40  # addresses of what a recording allocates, above any real one


class Place(NamedTuple):
    """An address: ``offset`` bytes into a numbered piece of memory."""

    memory: int
    offset: int


class Address(int):
    """Where a tensor lies, in the place of that tensor among the parameters of a launch."""


class Launch(NamedTuple):
    """A compiled kernel, its grid, all its parameters in order, a `Place` for each pointer, and its scratch memory."""

    kernel: Any
    grid: tuple[int, int, int]
    parameters: list[Any]
    scratch: Place | None = None


class Part(NamedTuple):
    """The plan of a call within another one, and a `Place` for each of its tensors, then of its allocations."""

    plan: Plan
    places: list[Place]


class Allocation(NamedTuple):
    """A new tensor; strides in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Result(NamedTuple):
    """An allocated tensor, or the ``part`` of it that has this shape, these strides and this offset (in elements)."""

    allocation: int
    part: tuple[tuple[int, ...], tuple[int, ...], int] | None


@dataclasses.dataclass(eq=False)
class Plan:
    """A recorded call. Memory is numbered: the call's tensors in order, then the allocations.

    Attributes:
        given: how many tensors the call has.
        allocations: the scratch buffer of the launches, one tensor of bytes; then the tensors that are returned.
        launches: what is launched, in order.
        results: what is returned; None for None.
        single: whether the result is one tensor, not a tuple.
        device: the number of the tensors' device.
        native: the plan as C repeats it, once it was made (native_plan.py); None where C cannot repeat it.
    """

    given: int
    allocations: list[Allocation]
    launches: list[Launch | Part]
    results: list[Result | None]
    single: bool
    device: int
    native: Any = NotImplemented

    def repeat(self, args: tuple) -> Any:
        """The results of such a call, whose tensors are on the current device."""
        given = tensors(args)
        made = self.allocate(given[0].device)
        self.launch([t.data_ptr() for t in (*given, *made)], driver.active.get_current_stream(self.device))
        return self.outcome(made)

    def allocate(self, device: torch.device) -> list[Tensor]:
        """The allocations."""
        return [torch.empty_strided(shape, strides, dtype=t, device=device) for shape, strides, t in self.allocations]

    def launch(self, memory: Sequence[int], stream: int) -> None:
        """Launch everything; ``memory``: addresses by number."""
        for launch in self.launches:
            if isinstance(launch, Part):
                launch.plan.launch([memory[number] + offset for number, offset in launch.places], stream)
                continue
            kernel, grid, parameters, scratch = launch
            values = [Address(memory[p.memory] + p.offset) if isinstance(p, Place) else p for p in parameters]
            if scratch is None:
                kernel[grid](*values, stream=stream)
            else:  # Triton's launcher asks for its own
                with_scratch_memory(kernel[grid], *values, stream=stream)

    def outcome(self, made: Sequence[Tensor]) -> Any:
        """What is returned of the allocations ``made``."""

        def part(number: int, part: tuple | None) -> Tensor:
            whole = made[number]
            if part is None:
                return whole
            shape, strides, offset = part  # within the allocation, which in a recording begins within its storage
            return whole.as_strided(shape, strides, whole.storage_offset() + offset)

        results = [None if result is None else part(*result) for result in self.results]
        return results[0] if self.single else tuple(results)


def leaves(args: tuple) -> Iterator[Any]:
    """The arguments, and after each tuple what is in it."""
    for arg in args:
        yield arg
        if isinstance(arg, tuple):
            yield from leaves(arg)


def tensors(args: tuple) -> list[Tensor]:
    """The tensors among the arguments and in their tuples, in order."""
    found = []
    for arg in args:
        if type(arg) in PLAIN:
            found.append(arg)
        elif isinstance(arg, tuple):
            found += tensors(arg)
    return found


class _UnrecordableError(Exception):
    """A call does something else than allocate, take views and launch."""


class _Watch(TorchDispatchMode):
    """Tells this thread's recording what PyTorch is asked for."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what PyTorch wraps this for takes as long as an allocation

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.is_view or func is _aten.promote_types.default:
            return func(*args, **kwargs)
        if func not in _ALLOCATIONS:
            raise _UnrecordableError
        with torch._C._DisableTorchDispatch():
            if func is _EMPTY and kwargs.keys() <= _OPTIONS:  # as below, in half the time
                shape = tuple(args[0])
                strides = tuple(itertools.accumulate(shape[:0:-1], operator.mul, initial=1))[::-1] if shape else ()
                made = Allocation(shape, strides, kwargs.get("dtype") or torch.get_default_dtype())
            else:
                made = _allocation(func(*args, **kwargs | {"device": "meta"}))
            return launch_hook.recording.allocate(made) if 0 not in made.shape else func(*args, **kwargs)


class _Recording:
    """What a call allocates and launches. Memory is numbered: the call's tensors in order, then each allocation.

    Nothing is launched, so what is allocated has no memory: its address is its number. ``first``: of the first one.
    """

    def __init__(self, given: list[Tensor], first: int) -> None:
        self.given = sorted((*_span(tensor), number) for number, tensor in enumerate(given))
        self.starts = [low for low, *_ in self.given]
        if any(one[1] > other[0] for one, other in itertools.pairwise(self.given)) or not all(map(Tensor.numel, given)):
            raise _UnrecordableError  # tensors that share memory
        self.example, self.first = given[0], first
        self.allocations: list[Allocation] = []
        self.launches: list[Launch | Part] = []

    @property
    def end(self) -> int:
        """The address of the next allocation."""
        return self.first + _APART * len(self.allocations)

    def allocate(self, allocation: Allocation) -> Tensor:
        """A tensor without memory, to be called outside of any dispatch mode."""
        shape, strides, dtype = allocation
        offset = (self.end - _FIRST) // dtype.itemsize
        self.allocations.append(allocation)
        return _without_memory(self.example.device, dtype).as_strided(shape, strides, offset)

    def note(self, kernel: Any, grid: tuple[int, ...], parameters: Sequence[Any]) -> None:
        """Take note of a launch."""
        noted = [self.place(each.data_ptr()) if isinstance(each, Tensor) else each for each in parameters]
        asked, scratch = getattr(kernel.metadata, "global_scratch_size", 0), None
        if asked:
            scratch = self.place(self.end)
            size = asked * math.prod(grid) * kernel.metadata.num_ctas
            self.allocations.append(Allocation((size,), (1,), torch.uint8))
        self.launches.append(Launch(kernel, (*grid, 1, 1)[:3], noted, scratch))

    def include(self, plan: Plan, args: tuple) -> Any:
        """The results of a call that ``plan`` is repeated for."""
        places = [self.place(tensor.data_ptr()) for tensor in tensors(args)]
        with torch._C._DisableTorchDispatch():
            number = len(self.given) + len(self.allocations)
            made = list(map(self.allocate, plan.allocations))
            self.launches.append(Part(plan, places + [Place(number + i, 0) for i in range(len(made))]))
            return plan.outcome(made)

    def place(self, address: int) -> Place:
        """Where ``address`` lies."""
        if address >= self.first:
            number, offset = divmod(address - self.first, _APART)
            return Place(len(self.given) + number, offset)
        at = bisect.bisect_right(self.starts, address) - 1
        if at < 0 or address >= self.given[at][1]:
            raise _UnrecordableError  # a tensor that the call did not get and did not allocate
        low, _, number = self.given[at]
        return Place(number, address - low)


@functools.cache
@torch.inference_mode(False)
def _without_memory(device: torch.device, dtype: torch.dtype) -> Tensor:
    """A tensor of no elements at `_FIRST`, in whose storage there is room for all others."""
    storage = torch._C._construct_storage_from_data_pointer(_FIRST, device, _FIRST)
    return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, (0,), (1,))


def record(function: Callable, args: tuple) -> Plan | None:
    """The plan of ``function(*args)``; None where there can be none."""
    given, outer = tensors(args), launch_hook.recording
    try:
        recording = launch_hook.recording = _Recording(given, _FIRST if outer is None else outer.end)
        with _Watch() if outer is None else contextlib.nullcontext():
            outcome = function(*args)
        return _plan(recording, outcome)
    except _UnrecordableError:
        return None
    finally:
        launch_hook.recording = outer


def _plan(recording: _Recording, outcome: Any) -> Plan:
    """``outcome``: what the call returned."""
    single = isinstance(outcome, Tensor)
    results = (outcome,) if single else outcome
    if type(results) is not tuple:
        raise _UnrecordableError
    given = len(recording.given)
    homes = [None if each is None else recording.place(each.data_ptr()) for each in results]
    counts = collections.Counter(home.memory for home in homes if home is not None)
    offsets, scratch = _shared(recording, counts)
    allocations = [Allocation((scratch,), (1,), torch.uint8)] if scratch else []
    places = {number: Place(given, offset) for number, offset in offsets.items()}
    parts: list[Result | None] = []
    for home, result in zip(homes, results, strict=True):
        if home is None:
            parts.append(None)
            continue
        if home.memory < given:
            raise _UnrecordableError
        seen, whole = _allocation(result), recording.allocations[home.memory - given]
        if home.memory not in places:
            places[home.memory] = Place(given + len(allocations), 0)
            allocations.append(seen if counts[home.memory] == 1 and _size(seen) == _size(whole) else whole)
        number = places[home.memory].memory - given
        if seen.dtype != allocations[number].dtype:
            raise _UnrecordableError
        part = None if seen == allocations[number] else (seen.shape, seen.strides, home.offset // seen.dtype.itemsize)
        parts.append(Result(number, part))

    def moved(values: Sequence[Any]) -> list[Any]:
        return [
            Place(places[value.memory].memory, places[value.memory].offset + value.offset)
            if isinstance(value, Place) and value.memory >= given
            else value
            for value in values
        ]

    launches = [
        Part(launch.plan, moved(launch.places))
        if isinstance(launch, Part)
        else launch._replace(parameters=moved(launch.parameters), scratch=moved([launch.scratch])[0])
        for launch in recording.launches
    ]
    return Plan(given, allocations, launches, parts, single, recording.example.get_device())


def _shared(recording: _Recording, returned: Iterable[int]) -> tuple[dict[int, int], int]:
    """The offset of each piece of memory that is not returned, and the bytes of all: the largest are placed first."""
    used: dict[int, list[int]] = {}  # the launches that use it
    given = len(recording.given)
    outside = {*range(given), *returned}
    for index, launch in enumerate(recording.launches):
        values = launch.places if isinstance(launch, Part) else (*launch.parameters, launch.scratch)
        for value in values:
            if isinstance(value, Place) and value.memory not in outside:
                used.setdefault(value.memory, []).append(index)
    sizes = {number: _size(recording.allocations[number - given]) for number in used}
    offsets: dict[int, int] = {}
    end = 0
    for number in sorted(used, key=lambda number: -sizes[number]):
        first, last = used[number][0], used[number][-1]
        others = [other for other in offsets if used[other][0] <= last and first <= used[other][-1]]
        offset = 0
        for low, size in sorted((offsets[other], sizes[other]) for other in others):
            if offset + sizes[number] <= low:
                break
            offset = max(offset, -(-(low + size) // _ALIGNMENT) * _ALIGNMENT)
        offsets[number] = offset
        end = max(end, offset + sizes[number])
    return offsets, end


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the first byte of ``tensor`` and of the one after its last."""
    start = tensor.data_ptr()
    return start, start + (tensor.nbytes if tensor.is_contiguous() else _size(_allocation(tensor)))


def _size(allocation: Allocation) -> int:
    """Bytes."""
    shape, strides, dtype = allocation
    return dtype.itemsize * (1 + sum((side - 1) * step for side, step in zip(shape, strides, strict=True)))


def _allocation(tensor: Tensor) -> Allocation:
    return Allocation(tuple(tensor.shape), tensor.stride(), tensor.dtype)
