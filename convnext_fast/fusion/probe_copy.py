"""Copies of modules to run, to see what they compute without reading or changing the originals."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn


def probe_copy(module: nn.Module, copies: dict[int, object] | None = None) -> nn.Module:
    """A copy of ``module`` to run, without hooks, and with random floating tensors in float32 on the CPU.

    None of the original's memory is read, only shapes: it may be on the meta device, or sharded.
    """
    copies = {} if copies is None else copies
    if id(module) in copies:
        return copies[id(module)]  # type: ignore[return-value]
    copy = copies[id(module)] = object.__new__(type(module))
    for name, value in vars(module).items():
        value = value.copy() if type(value) in (list, dict, set) else value  # a forward may append to it
        copy.__dict__[name] = OrderedDict() if "hooks" in name else value
    for name in ("_parameters", "_buffers"):
        tensors = {}
        for key, tensor in getattr(module, name).items():
            if tensor is not None and id(tensor) not in copies:
                copies[id(tensor)] = _random_like(tensor)
            tensors[key] = None if tensor is None else copies[id(tensor)]
        copy.__dict__[name] = tensors
    children = module._modules.items()
    copy.__dict__["_modules"] = {key: None if m is None else probe_copy(m, copies) for key, m in children}
    return copy


def _random_like(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    fan_in = tensor[0].numel() if tensor.dim() > 1 and tensor.shape[0] else 1
    value = torch.randn(tensor.shape, dtype=torch.float32, device="cpu") / fan_in**0.5
    return nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value
