"""The stand-in for a tensor while a call is recorded (recording.py): it has all that a launcher needs, but no memory.

PyTorch's own tensors would do, but their views and allocations take ten times as long. Operations that are not defined
here run on a tensor of the meta device, which gives the shape, the strides and the offset.
"""

# ruff: noqa: D102 (the methods are those of torch.Tensor)

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .copying import MOST_DIMENSIONS, copy
from .launching import launch_hook


class UnrecordableError(Exception):
    """A call does something other than allocate, take views and launch."""


class Place(NamedTuple):
    """An address: ``offset`` bytes into a numbered piece of memory."""

    memory: int
    offset: int


@functools.lru_cache(4096)
def start_of(memory: int) -> Place:
    """Where a piece of memory begins."""
    return Place(memory, 0)


class RecordedTensor:
    """A view of a numbered piece of memory.

    Args:
        shape, strides: the latter in elements.
        place: where it begins.
        alignment: of that piece of memory, its address modulo 16.

    Attributes:
        specialised: all its properties that a kernel may be compiled for.
        key: its part of a call's key, once native_plan.py has made it.
    """

    __slots__ = ("alignment", "device", "dtype", "key", "place", "shape", "specialised", "strides")
    is_meta = requires_grad = False

    def __init__(
        self,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        place: Place,
        alignment: int = 0,
    ) -> None:
        self.shape, self.strides, self.dtype, self.device = shape, strides, dtype, device
        self.place, self.alignment = place, alignment
        self.specialised = dtype, (alignment + place.offset) % 16
        self.key: bytes | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return function_of(func)(*args, **kwargs or {})

    def __getattr__(self, name: str) -> Any:
        method = getattr(Tensor, name)
        if not callable(method) or name.endswith("_"):
            raise UnrecordableError
        return functools.partial(_view_on_meta, method, self)

    def __getitem__(self, index: Any) -> RecordedTensor:
        if type(index) is not int or not 0 <= index < self.shape[0]:
            return _view_on_meta(Tensor.__getitem__, self, index)
        return self._view(self.shape[1:], self.strides[1:], index * self.strides[0])

    def __iter__(self) -> Iterator[RecordedTensor]:
        return map(self.__getitem__, range(self.shape[0]))

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def data_ptr(self) -> int:
        """The address as far as it is known: modulo 16."""
        return self.alignment + self.place.offset

    def stride(self) -> tuple[int, ...]:
        return self.strides

    def storage_offset(self) -> int:
        return self.place.offset // self.dtype.itemsize

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def element_size(self) -> int:
        return self.dtype.itemsize

    def get_device(self) -> int:
        return -1 if self.device.index is None else self.device.index

    def is_neg(self) -> bool:
        return False

    def is_contiguous(self) -> bool:
        expected = dense(self.shape)
        return self.strides == expected or all(
            side == 1 or step == other for side, step, other in zip(self.shape, self.strides, expected, strict=True)
        )

    def contiguous(self) -> RecordedTensor:
        if self.is_contiguous():
            return self
        if self.dim() > MOST_DIMENSIONS:
            raise UnrecordableError
        copy(self, new := self.new_empty(self.shape))
        return new

    def view(self, *sizes: Any) -> RecordedTensor:
        shape = tuple(sizes[0]) if isinstance(sizes[0], tuple) else sizes
        if self.strides == dense(self.shape) and not isinstance(sizes[0], torch.dtype):
            size = math.prod(self.shape)
            if -1 in shape:
                shape = tuple(-size // math.prod(shape) if side == -1 else side for side in shape)
            if math.prod(shape) == size:
                return self._view(shape, dense(shape), 0)
        return _view_on_meta(Tensor.view, self, *sizes)

    def as_strided(self, shape: Sequence[int], strides: Sequence[int], storage_offset: int) -> RecordedTensor:
        return self._view(tuple(shape), tuple(strides), storage_offset - self.storage_offset())

    def new_empty(self, *size: Any, dtype: torch.dtype | None = None) -> RecordedTensor:
        shape = size if len(size) != 1 or type(size[0]) is int else tuple(size[0])
        return launch_hook.recording.allocate(shape, dense(shape), dtype or self.dtype)

    def _view(self, shape: tuple[int, ...], strides: tuple[int, ...], skipped: int) -> RecordedTensor:
        place = Place(self.place.memory, self.place.offset + skipped * self.dtype.itemsize)
        return RecordedTensor(shape, strides, self.dtype, self.device, place, self.alignment)


def _refuse(*_: Any) -> Any:
    raise UnrecordableError


_COMPARISONS = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}
for _name in set(dir(Tensor)) - set(dir(RecordedTensor)) | _COMPARISONS:  # Python looks up operators in the class
    if _name.startswith("__") and callable(getattr(Tensor, _name)):
        setattr(RecordedTensor, _name, _refuse)


@functools.lru_cache(4096)
def dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return (*itertools.accumulate(shape[:0:-1], operator.mul, initial=1),)[::-1] if shape else ()


def _empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None) -> RecordedTensor:
    _check_device(device)
    return RecordedTensor.new_empty(launch_hook.recording.given[0], *size, dtype=dtype or torch.get_default_dtype())


def _check_device(device: Any) -> None:
    own = launch_hook.recording.device
    if device is not None and device is not own and torch.device(device) != own:
        raise UnrecordableError


def _empty_like(tensor: RecordedTensor, dtype: torch.dtype | None = None) -> RecordedTensor:
    strides = tensor.strides
    if strides != dense(tensor.shape):
        strides = _on_meta(tensor, lambda like: torch.empty_like(like).stride())
    return launch_hook.recording.allocate(tensor.shape, strides, dtype or tensor.dtype)


def _empty_strided(shape: Any, strides: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> RecordedTensor:
    _check_device(device)
    return launch_hook.recording.allocate(tuple(shape), tuple(strides), dtype or torch.get_default_dtype())


_FUNCTIONS: dict[Any, Callable] = {
    torch.empty: _empty,
    torch.empty_like: _empty_like,
    torch.empty_strided: _empty_strided,
    torch.promote_types: torch.promote_types,
}


def function_of(func: Any) -> Callable:
    """The function that replaces PyTorch's in a recording."""
    return _FUNCTIONS.get(func) or functools.partial(_view_on_meta, func)


def _on_meta(tensor: RecordedTensor, ask: Callable[[Tensor], Any]) -> Any:
    """The result of ``ask`` for a tensor of the meta device like this one."""
    with torch._C.DisableTorchFunction(), torch.inference_mode(False):
        return ask(torch.empty_strided(tensor.shape, tensor.strides, dtype=tensor.dtype, device="meta"))


def _view_on_meta(func: Callable, tensor: Any = None, *args: Any, **kwargs: Any) -> RecordedTensor:
    """The view that ``func`` takes of its first argument."""
    if type(tensor) is not RecordedTensor:
        raise UnrecordableError

    def view(whole: Tensor) -> RecordedTensor:
        try:
            result = func(whole, *args, **kwargs)
        except Exception as error:  # when the call then runs unrecorded, it raises the error itself
            raise UnrecordableError from error
        if whole._version or not isinstance(result, Tensor) or _storage(result) != _storage(whole):
            raise UnrecordableError  # its values are written or read
        place = Place(tensor.place.memory, tensor.place.offset + result.storage_offset() * result.element_size())
        shape, strides = tuple(result.shape), result.stride()
        return RecordedTensor(shape, strides, result.dtype, tensor.device, place, tensor.alignment)

    return _on_meta(tensor, view)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
