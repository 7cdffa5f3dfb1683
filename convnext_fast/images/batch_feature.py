"""`BatchFeature`: what the image processor returns, and the tensors in it."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch

FRAMEWORKS = ("np", "pt", "jax", "tf")
"""What ``return_tensors`` may be: numpy, PyTorch, JAX or TensorFlow."""


class BatchFeature(dict[str, Any]):
    """What the processor returns: a dictionary whose entries are also attributes, for ``model(**batch)``."""

    @property
    def data(self) -> BatchFeature:
        """The dictionary itself, which transformers' batches keep under this name."""
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no entry {name!r}: this batch holds {', '.join(self) or 'nothing'}") from None

    def to(self, *args: Any, device: Any = None, dtype: Any = None, non_blocking: bool = False) -> BatchFeature:
        """Move every tensor to a device and cast the floating ones to a dtype, in place; returns ``self``.

        Args:
            *args: a device (``torch.device``, string or index), a ``torch.dtype``, or both in this order.
            device, dtype: the same by name.
            non_blocking: do not wait for copies from pinned memory.

        Raises:
            TypeError: an argument is neither, or no entry holds a torch tensor, so there is nothing to move.
        """
        for number, arg in enumerate(args):
            if isinstance(arg, torch.dtype):
                dtype = arg
            elif isinstance(arg, (str, int, torch.device)) and number == 0:
                device = arg
            else:
                raise TypeError(
                    f"cannot move a batch to {args}: expected a device, a torch.dtype, or both in this order"
                )
        moved = []

        def move(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(move(item) for item in value)
            if not isinstance(value, torch.Tensor):
                return value
            moved.append(value)
            # Labels and masks are moved, not cast.
            kept = dtype if value.is_floating_point() else None
            return value.to(device=device, dtype=kept, non_blocking=non_blocking)

        values = {name: move(value) for name, value in self.items()}
        if not moved:
            raise TypeError("this batch holds no torch tensor to move: ask the processor for return_tensors='pt'")
        self.update(values)
        return self


def to_framework(batch: np.ndarray, framework: str) -> Any:
    """``batch`` as an array or tensor of one of ``FRAMEWORKS``; "np" and "pt" share its memory."""
    if framework in ("np", "pt"):
        return batch if framework == "np" else torch.from_numpy(batch)
    module, convert = {"jax": ("jax.numpy", "asarray"), "tf": ("tensorflow", "convert_to_tensor")}[framework]
    try:
        return getattr(importlib.import_module(module), convert)(batch)
    except ImportError:
        package = module.partition(".")[0]
        raise ImportError(f"return_tensors={framework!r} needs {package}, which is not installed") from None
