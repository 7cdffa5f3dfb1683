"""A call of the kernels recorded as a plan: its allocations, launches and results.

A plan holds for every call of the same kind, whatever memory its tensors lie in: an address is noted as a piece of
memory and an offset into it. Memory that only the launches see comes from one allocation, in which pieces that are
never used at the same time overlap. A recorded call may repeat other plans: their launches become part of its own.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

from .launching import PLAIN, launch_hook, with_scratch_memory

_aten = torch.ops.aten
_ALLOCATIONS = (_aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default)
_ALIGNMENT = 512  # bytes, as CUDA's allocator gives: no kernel asks for more


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


class Allocation(NamedTuple):
    """A new tensor; strides in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Result(NamedTuple):
    """An allocated tensor, or the ``part`` of it that has this shape, these strides and this offset (in elements)."""

    allocation: int
    part: tuple[tuple[int, ...], tuple[int, ...], int] | None


class Plan(NamedTuple):
    """A recorded call. Memory is numbered: the call's tensors in order, then the allocations.

    Attributes:
        given: how many tensors the call has.
        allocations: the scratch buffer of the launches, one tensor of bytes; then the tensors that are returned.
        launches: what is launched, in order.
        results: what is returned; None for None.
        single: whether the result is one tensor, not a tuple.
    """

    given: int
    allocations: list[Allocation]
    launches: list[Launch]
    results: list[Result | None]
    single: bool

    def repeat(self, args: tuple) -> Any:
        """The results of such a call, whose tensors are on the current device."""
        given = tensors(args)
        device = given[0].device
        made = [torch.empty_strided(shape, strides, dtype=t, device=device) for shape, strides, t in self.allocations]
        memory = [tensor.data_ptr() for tensor in (*given, *made)]
        stream = driver.active.get_current_stream(given[0].get_device())
        for kernel, grid, parameters, scratch in self.launches:
            values = [Address(memory[p.memory] + p.offset) if isinstance(p, Place) else p for p in parameters]
            if scratch is None:
                kernel[grid](*values, stream=stream)
            else:  # Triton's launcher asks for its own
                with_scratch_memory(kernel[grid], *values, stream=stream)
            if launch_hook.listener is not None:
                launch_hook.listener(kernel, grid, values)

        def part(number: int, part: tuple | None) -> Tensor:
            return made[number] if part is None else made[number].as_strided(*part)

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
    return [arg for arg in leaves(args) if type(arg) in PLAIN]


class _Recorder(TorchDispatchMode):
    """Records what a call allocates and launches; ``recordable`` as long as the call does nothing else.

    Memory is numbered in order: the call's tensors, then each allocation. No tensor is kept alive, so an address may
    have been an earlier allocation's: it is the newest one's.
    """

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.spans: list[tuple[int, int]] = []
        self.starts: list[int] = []  # of the newest spans, in order, and their numbers
        self.numbers: list[int] = []
        self.recordable = all(tensor.numel() for tensor in given)
        for tensor in given:
            self.add(_span(tensor))
        self.recordable &= len(self.starts) == len(given)  # they lie apart
        self.allocations: dict[int, Allocation] = {}
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS and out.numel():
            self.allocations[len(self.spans)] = _allocation(out)
            self.add(_span(out))
        elif not func.is_view:
            self.recordable = False
        return out

    def __enter__(self):
        self.before, launch_hook.listener = launch_hook.listener, self.note
        launch_hook.recordings += 1
        return super().__enter__()

    def __exit__(self, *error):
        launch_hook.listener = self.before
        launch_hook.recordings -= 1
        return super().__exit__(*error)

    def note(self, kernel: Any, grid: tuple[int, ...], parameters: Sequence[Any]) -> None:
        """A launch that was made."""
        noted = [
            self.place(each.data_ptr()) if isinstance(each, Tensor)
            else self.place(each) if isinstance(each, Address)
            else each
            for each in parameters
        ]  # fmt: skip
        asked = getattr(kernel.metadata, "global_scratch_size", 0)
        scratch = Place(len(self.spans) - 1, 0) if asked else None  # the newest allocation: Triton asked for it
        self.launches.append(Launch(kernel, (*grid, 1, 1)[:3], noted, scratch))
        if self.before is not None:
            self.before(kernel, grid, parameters)

    def add(self, span: tuple[int, int]) -> None:
        """Number a span of addresses; earlier ones that it overlaps are no more."""
        low, high = span
        first = bisect.bisect_right(self.starts, low)
        if first and self.spans[self.numbers[first - 1]][1] > low:
            first -= 1
        last = bisect.bisect_left(self.starts, high)
        self.starts[first:last], self.numbers[first:last] = [low], [len(self.spans)]
        self.spans.append(span)

    def place(self, address: int) -> Place:
        """Where ``address`` lies."""
        at = bisect.bisect_right(self.starts, address) - 1
        number = self.numbers[at] if at >= 0 else -1
        if number >= 0 and address < self.spans[number][1]:
            return Place(number, address - self.spans[number][0])
        self.recordable = False  # as with tensors that the call did not get and did not allocate
        return Place(-1, address)


def record(function: Callable, args: tuple) -> tuple[Any, Plan | None]:
    """What ``function(*args)`` returns, and its plan where there can be one."""
    given = tensors(args)
    with _Recorder(given) as recorder:
        outcome = function(*args)
    single = isinstance(outcome, Tensor)
    results = (outcome,) if single else outcome
    if type(results) is not tuple:
        return outcome, None
    homes = [None if each is None else recorder.place(each.untyped_storage().data_ptr()).memory for each in results]
    if not recorder.recordable or any(home is not None and home < len(given) for home in homes):
        return outcome, None
    return outcome, _plan(recorder, len(given), results, homes, single)


def _plan(recorder: _Recorder, given: int, results: tuple, homes: list[int | None], single: bool) -> Plan:
    """``homes``: the memory that each result lies in, as the recorder numbers it."""
    offsets, scratch = _shared(recorder, given, homes)
    allocations = [Allocation((scratch,), (1,), torch.uint8)] if scratch else []
    places = {number: Place(given, offset) for number, offset in offsets.items()}
    parts: list[Result | None] = []
    for home, result in zip(homes, results, strict=True):
        if home is None:
            parts.append(None)
            continue
        if home not in places:
            places[home] = Place(given + len(allocations), 0)
            whole = homes.count(home) == 1 and _span(result) == recorder.spans[home]
            allocations.append(_allocation(result) if whole else recorder.allocations[home])
        number, seen = places[home].memory - given, _allocation(result)
        part = None if seen == allocations[number] else (seen.shape, seen.strides, result.storage_offset())
        parts.append(Result(number, part))

    def moved(value: Any) -> Any:
        if not isinstance(value, Place) or value.memory < given:
            return value
        place = places[value.memory]
        return Place(place.memory, place.offset + value.offset)

    launches = [
        Launch(kernel, grid, [moved(value) for value in parameters], moved(scratch))
        for kernel, grid, parameters, scratch in recorder.launches
    ]
    return Plan(given, allocations, launches, parts, single)


def _shared(recorder: _Recorder, given: int, homes: list[int | None]) -> tuple[dict[int, int], int]:
    """The offset of each piece of memory that is not returned, and the bytes of all: the largest are placed first."""
    used: dict[int, list[int]] = {}  # the launches that use it
    for index, launch in enumerate(recorder.launches):
        for value in (*launch.parameters, launch.scratch):
            if isinstance(value, Place) and value.memory >= given and value.memory not in homes:
                used.setdefault(value.memory, []).append(index)
    sizes = {number: recorder.spans[number][1] - recorder.spans[number][0] for number in used}
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
    elements = 1 + sum((side - 1) * step for side, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()


def _allocation(tensor: Tensor) -> Allocation:
    return Allocation(tuple(tensor.shape), tensor.stride(), tensor.dtype)
