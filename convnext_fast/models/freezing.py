"""Modules that compute with folded copies of their weights once they are frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Unfreezing(nn.Module):
    """A module that training mode, and a state_dict loaded into it or into a module around it, unfreeze."""

    def unfreeze(self) -> Any:
        """Undo freezing."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Any:
        """As `torch.nn.Module.train`; training mode undoes freezing."""
        if mode:
            self.unfreeze()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unfreeze()
        super()._load_from_state_dict(*args, **kwargs)


class Freezable(Unfreezing):
    """A module that `freeze` gives copies of its weights, folded for inference, as buffers outside its state_dict.

    The copies follow the module to another device. A change of dtype folds the parameters anew, as the copies have more
    than one dtype and depend on how the weights were rounded. Training mode and the loading of a state_dict, of the
    module or of one around it, drop them.
    """

    Frozen: type[NamedTuple]
    _names: tuple[str, ...]  # of the buffers that hold the fields

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "Frozen" in vars(cls):
            cls._names = tuple(f"folded_{name}" for name in cls.Frozen._fields)

    def fold(self) -> Any:
        """A ``Frozen`` made of the parameters; None where this module has nothing to fold."""
        raise NotImplementedError

    @property
    def frozen(self) -> Any:
        """The ``Frozen`` in use; None unless `freeze` was called."""
        names, buffers = self._names, self._buffers
        return self.Frozen._make(map(buffers.__getitem__, names)) if names[0] in buffers else None

    @torch.inference_mode(False)
    @torch.no_grad()
    def freeze(self) -> None:
        """Fold the parameters into copies, which the forward uses from then on."""
        folded = self.fold()
        if folded is None:
            self.unfreeze()
        else:
            for name, value in zip(self._names, folded, strict=True):
                self.register_buffer(name, value, persistent=False)

    def unfreeze(self) -> None:
        """Drop the copies."""
        for name in self._names:
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = self.frozen
        super()._apply(fn, recurse)
        if before is not None and [_dtype(a) for a in before] != [_dtype(b) for b in self.frozen]:
            self.freeze()
        return self


def _dtype(copy: Tensor | None) -> torch.dtype | None:
    return None if copy is None else copy.dtype
