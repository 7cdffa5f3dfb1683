"""A call of the kernels recorded as a plan: its allocations, launches and results.

A plan is valid for every call of the same kind, wherever its tensors lie: an address is noted as a piece of memory and
an offset into it. Memory that only the launches use comes from one allocation, the scratch buffer, in which pieces that
are never used at the same time overlap. A call is recorded on stand-ins for its tensors (recorded_tensor.py): nothing
is launched and no memory is allocated. Then the plan is replayed for that call, too. If a recorded call makes other
replayed calls, their plans become parts of its own.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.runtime import driver

from .compiled import compiled
from .launching import PLAIN, launch_hook, with_scratch_memory
from .recorded_tensor import Place, RecordedTensor, UnrecordableError, dense, function_of, start_of

_REAL = frozenset(PLAIN)
TENSORS = _REAL | {RecordedTensor}
_RETURNED = frozenset((RecordedTensor, type(None)))
_ALIGNMENT = 512  # bytes, as CUDA's allocator gives: no kernel asks for more
_MOST = 16384
_GIVEN: dict[tuple, RecordedTensor] = {}
"""The stand-ins for tensors, by number and key: most calls of a new size have the same weights as earlier calls."""


class Address(int):
    """The address of a tensor, which replaces that tensor among the parameters of a launch."""


class Launch(NamedTuple):
    """A compiled kernel, its grid, all its parameters in order, a `Place` for each pointer, and its scratch memory."""

    kernel: Any
    grid: tuple[int, int, int]
    parameters: list[Any]
    scratch: Place | None = None


class Part(NamedTuple):
    """The plan of a call within another one, and a `Place` for each of its bases."""

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
    """A recorded call. Its bases are the call's tensors in order, then the allocations.

    Attributes:
        given: how many tensors the call has.
        allocations: the scratch buffer of the launches, one tensor of bytes; then the tensors that are returned.
        pieces: for each piece of memory that the call allocated, the number of the allocation that holds it, and its
            offset there; (0, 0) for one that nothing uses.
        launches: what is launched, in order. Their memory is numbered: the call's tensors, then the pieces.
        results: what is returned; None for None.
        single: whether the result is one tensor, not a tuple.
        device: the number of the tensors' device.
        native: the plan for C, once it was made (native_plan.py); None if C cannot replay it.
    """

    given: int
    allocations: list[Allocation]
    pieces: list[tuple[int, int]]
    launches: list[Launch | Part]
    results: list[Result | None]
    single: bool
    device: int
    native: Any = NotImplemented

    def repeat(self, args: tuple) -> Any:
        """Replay the plan for a call whose tensors are on the current device; returns the call's results."""
        given = tensors(args)
        made = self.allocate(given[0].device)
        self.launch([t.data_ptr() for t in (*given, *made)], driver.active.get_current_stream(self.device))
        return self.outcome(made)

    def allocate(self, device: torch.device) -> list[Tensor]:
        """The allocations."""
        return [torch.empty_strided(shape, strides, dtype=t, device=device) for shape, strides, t in self.allocations]

    def launch(self, bases: Sequence[int], stream: int) -> None:
        """Launch everything; ``bases``: their addresses."""
        memory = [*bases[: self.given], *(bases[self.given + number] + offset for number, offset in self.pieces)]
        for launch in self.launches:
            if isinstance(launch, Part):
                launch.plan.launch([memory[number] + offset for number, offset in launch.places], stream)
                continue
            kernel, grid, parameters, scratch = launch
            values = [Address(memory[p.memory] + p.offset) if isinstance(p, Place) else p for p in parameters]
            if scratch is None:
                kernel[grid](*values, stream=stream)
            else:  # Triton's launcher allocates its own
                with_scratch_memory(kernel[grid], *values, stream=stream)

    def outcome(self, made: Sequence[Tensor]) -> Any:
        """The results, as parts of the allocations ``made``."""

        def part(number: int, part: tuple | None) -> Tensor:
            return made[number] if part is None else made[number].as_strided(*part)

        results = [None if result is None else part(*result) for result in self.results]
        return results[0] if self.single else tuple(results)


def leaves(args: tuple) -> Iterator[Any]:
    """The arguments, and after each tuple its items."""
    for arg in args:
        yield arg
        if isinstance(arg, tuple):
            yield from leaves(arg)


def tensors(args: tuple) -> list[Tensor]:
    """The tensors among the arguments and in their tuples, in order."""
    found: list[Tensor] = []
    for arg in args:
        if type(arg) in TENSORS:
            found.append(arg)
        elif isinstance(arg, tuple):
            found += tensors(arg)
    return found


def facts_of(tensor: Tensor) -> tuple:
    """All that a call depends on in one of its tensors: everything but its values and its full address."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16


class _Watch(TorchFunctionMode):
    """Calls this thread's recording in place of PyTorch's functions."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return function_of(func)(*args, **kwargs or {})


def _standing_for(tensor: Tensor, numbered: tuple[int, Hashable]) -> RecordedTensor:
    """The stand-in for a call's tensor; ``numbered``: its number and its key."""
    number, key = numbered
    shape, strides, dtype, device, alignment = facts_of(tensor)
    if 0 in shape:
        raise UnrecordableError
    one = RecordedTensor(tuple(shape), strides, dtype, device, start_of(number), alignment)
    one.key = key if type(key) is bytes else None
    if len(_GIVEN) >= _MOST:
        _GIVEN.clear()
    _GIVEN[numbered] = one
    return one


def _with(values: tuple, given: Iterator[RecordedTensor]) -> tuple:
    """The arguments with their tensors replaced by those ``given``."""
    changed = [
        next(given) if type(value) in TENSORS else _with(value, given) if isinstance(value, tuple) else value
        for value in values
    ]
    return tuple(changed) if type(values) is tuple else type(values)._make(changed)  # type: ignore[attr-defined]


class _Recording:
    """What a call allocates and launches. Memory is numbered: the call's tensors in order, then each piece allocated.

    Nothing is launched and nothing has memory: ``args`` are the call's arguments with stand-ins for its tensors.
    """

    def __init__(self, args: tuple, keys: Sequence[Hashable]) -> None:
        numbered = list(enumerate(keys))
        self.given = list(map(_GIVEN.get, numbered))
        if type(None) in map(type, self.given):
            self.given = [_standing_for(*each) for each in zip(tensors(args), numbered, strict=True)]
        self.args = _with(args, iter(self.given))
        self.device = self.given[0].device
        self.pieces: list[RecordedTensor] = []
        self.launches: list[Launch | Part] = []
        self.used: dict[int, list[int]] = {}  # for each piece, the first and the last launch that use it

    def allocate(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> RecordedTensor:
        """A new tensor."""
        if 0 in shape:
            raise UnrecordableError
        new = RecordedTensor(shape, strides, dtype, self.device, start_of(len(self.given) + len(self.pieces)))
        self.pieces.append(new)
        return new

    def launch(self, kernel: Any, grid: tuple[int, ...], args: tuple, meta: dict[str, Any]) -> None:
        """Note ``kernel[grid](*args, **meta)``."""
        noted = self.places(args)
        noted += (None,) * (len(kernel.params) - len(args))  # constants, which the compiled kernel has
        self.note(compiled(kernel, args, meta, self._where), grid, noted)

    @functools.cached_property
    def _where(self) -> Hashable:
        """What else a kernel is compiled for."""
        return driver.active, driver.active.get_current_device()

    def places(self, args: Iterable[Any]) -> list[Any]:
        """The arguments of the next launch with places instead of tensors."""
        given, index, noted = len(self.given), len(self.launches), []
        for arg in args:
            if type(arg) is RecordedTensor:
                place = arg.place
                if place[0] >= given:
                    self.used.setdefault(place[0], [index, index])[1] = index
                noted.append(place)
            elif type(arg) in _REAL:
                raise UnrecordableError  # a tensor that the call neither got nor allocated; a key would keep it alive
            else:
                noted.append(arg)
        return noted

    def note(self, kernel: Any, grid: tuple[int, ...], noted: list[Any]) -> None:
        """Note a launch of a compiled kernel, whose parameters are ``noted`` by `places`."""
        bytes_asked, scratch = getattr(kernel.metadata, "global_scratch_size", 0), None
        if bytes_asked:
            size = bytes_asked * math.prod(grid) * kernel.metadata.num_ctas
            (scratch,) = self.places([self.allocate((size,), (1,), torch.uint8)])
        self.launches.append(Launch(kernel, (*grid, 1, 1)[:3], noted, scratch))

    def include(self, plan: Plan, args: tuple) -> Any:
        """Note a call that has a ``plan``; returns stand-ins for its results."""
        made = [self.allocate(*each) for each in plan.allocations]
        self.launches.append(Part(plan, self.places([*tensors(args), *made])))

        def result(number: int, part: tuple | None) -> RecordedTensor:
            return made[number] if part is None else made[number].as_strided(*part)

        results = [None if each is None else result(*each) for each in plan.results]
        return results[0] if plan.single else tuple(results)


def record(function: Callable, args: tuple, keys: Sequence[Hashable] | None = None) -> Plan | None:
    """The plan of ``function(*args)``; None if it cannot be recorded.

    keys: for each of its tensors, a key that determines its `facts_of`.
    """
    outer = launch_hook.recording
    try:
        keys = list(map(facts_of, tensors(args))) if keys is None else keys
        recording = launch_hook.recording = _Recording(args, keys)
        with _Watch() if outer is None else contextlib.nullcontext():
            outcome = function(*recording.args)
        return _plan(recording, outcome)
    except UnrecordableError:
        return None
    except (AttributeError, TypeError) as error:  # from code that needs a tensor of PyTorch's
        name = getattr(function, "__name__", "a function")
        warnings.warn(f"calls of {name} are not recorded, which is slow: {error!r}", RuntimeWarning, stacklevel=2)
        return None
    finally:
        launch_hook.recording = outer


def _plan(recording: _Recording, outcome: Any) -> Plan:
    """``outcome``: what the call returned."""
    single = type(outcome) is RecordedTensor
    results = (outcome,) if single else outcome
    if type(results) is not tuple or not _RETURNED.issuperset(map(type, results)):
        raise UnrecordableError
    given, pieces = len(recording.given), recording.pieces
    returned = [each.place.memory for each in results if each is not None]
    offsets, scratch = _shared(recording, set(returned))
    allocations = [Allocation((scratch,), (1,), torch.uint8)] if scratch else []
    places = {number: (0, offset) for number, offset in offsets.items()}  # in the allocations
    parts: list[Result | None] = []
    for result in results:
        if result is None:
            parts.append(None)
            continue
        memory, offset = result.place
        if memory < given:
            raise UnrecordableError
        if memory not in places:
            whole = pieces[memory - given]
            if result is not whole and returned.count(memory) == 1 and _size(result) == _size(whole):
                whole = result
            places[memory] = len(allocations), 0
            allocations.append(Allocation(whole.shape, whole.strides, whole.dtype))
        number = places[memory][0]
        seen, allocation = (result.shape, result.strides, result.dtype), allocations[number]
        if result.dtype != allocation.dtype:
            raise UnrecordableError
        part = None if seen == allocation else (*seen[:2], offset // result.dtype.itemsize)
        parts.append(Result(number, part))
    moved = [places.get(number, (0, 0)) for number in range(given, given + len(pieces))] if allocations else []
    return Plan(given, allocations, moved, recording.launches, parts, single, recording.given[0].get_device())


def _shared(recording: _Recording, returned: Collection[int]) -> tuple[dict[int, int], int]:
    """The offset of each piece of memory that is not returned, and their total bytes. The largest are placed first."""
    given, used = len(recording.given), recording.used
    sizes = {number: _size(recording.pieces[number - given]) for number in used if number not in returned}
    placed: list[tuple[int, int, int, int]] = []  # offset, end, first and last launch
    offsets: dict[int, int] = {}
    for number in sorted(sizes, key=sizes.__getitem__, reverse=True):
        (first, last), size, offset = used[number], sizes[number], 0
        for low, high, begun, ended in placed:
            if begun <= last and first <= ended:
                if offset + size <= low:
                    break
                offset = max(offset, -(-high // _ALIGNMENT) * _ALIGNMENT)
        offsets[number] = offset
        bisect.insort(placed, (offset, offset + size, first, last))
    return offsets, max((high for _, high, *_ in placed), default=0)


def _size(tensor: RecordedTensor) -> int:
    """Its bytes."""
    shape, strides = tensor.shape, tensor.strides
    if strides == dense(shape):
        return tensor.dtype.itemsize * math.prod(shape)
    return tensor.dtype.itemsize * (1 + sum((side - 1) * step for side, step in zip(shape, strides, strict=True)))
