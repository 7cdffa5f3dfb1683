"""A stand-in for CUDA's driver, for plans that C replays on CPU tensors."""

import ctypes
import operator
import struct
import traceback

import torch
from convnext_fast.kernels.native_plan import FORMATS, Driver

_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    *[ctypes.c_uint] * 7,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)
_DEVICE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int))


class StandIn:
    """``driver``, whose launches call ``launch(function, grid, threads, shared, stream, parameters)``.

    ``device`` is the current one (a CPU's is −1), ``stream`` the current stream. An exception in ``launch`` is printed
    and becomes an error of the driver, which C raises.
    """

    def __init__(self, launch, allocate=None, function_of=operator.attrgetter("function")):
        self.launch, self.device, self.stream = launch, -1, 0
        self._callbacks = _LAUNCH(self._launch), _DEVICE(self._device)
        addresses = (ctypes.cast(each, ctypes.c_void_p).value for each in self._callbacks)
        self.driver = Driver(*addresses, function_of, lambda device: self.stream, allocate or _allocate)

    def _launch(self, function, x, y, z, threads, threads_y, threads_z, shared, stream, parameters, extra):
        try:
            assert (threads_y, threads_z, extra) == (1, 1, None)
            self.launch(function, (x, y, z), threads, shared, stream or 0, parameters)
        except BaseException:
            traceback.print_exc()
            return 1
        return 0

    def _device(self, device):
        device[0] = self.device
        return 0


def _allocate(shape, strides, dtype):
    return torch.empty_strided(shape, strides, dtype=dtype)


def values_of(kernel, parameters):
    """The parameters of a launch as Python numbers; None for constants that the kernel was compiled with."""
    values = []
    for kind in kernel.src.signature.values():
        if kind == "constexpr":
            values.append(None)
            continue
        code = "Q" if kind.startswith("*") else FORMATS[kind]
        address = parameters[sum(value is not None for value in values)]
        values.append(struct.unpack(code, ctypes.string_at(address, struct.calcsize(code)))[0])
    return values
