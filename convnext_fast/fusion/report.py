"""What `fuse` did to a model, and freezing of what it fused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..models.freezing import check_has_graphs, freeze, is_frozen, state_of, unfreeze
from ..models.plan import ChainPlan, PatchPlan, holder_of
from ..models.switches import ConvNextSwitches


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did. Calling it calls the model, so that ``torch.compile(fuse(model))`` compiles the model.

    Attributes:
        model: the model.
        fused: names of the blocks that run on the fused ops.
        patch_layers: names of the stems and downsampling layers that do.
        left_alone: names of the other blocks and patch layers, each with the reason.
    """

    model: nn.Module
    fused: tuple[str, ...]
    patch_layers: tuple[str, ...]
    left_alone: dict[str, str]

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the blocks and patch layers that are frozen now."""
        return tuple(name for name, module in self._parts() if is_frozen(module))

    def freeze(self, cuda_graph: bool = False) -> FuseReport:
        """Prepare the model for inference, and return the report.

        Sets evaluation mode. The fused blocks and patch layers then compute with folded copies of their weights and
        give them no gradients: LayerNorm's affine and the layer scale are folded into the linear layers, and for an x86
        CPU the weights are packed. A container that only calls its modules one after another runs them as one sequence.
        Keys, names and values of the parameters do not change. If a parameter is replaced, changed in place, moved or
        converted, the next call folds again (see `ConvNext.freeze` for the limits). Training mode and a loaded
        ``state_dict`` undo it for the modules that they reach.

        Args:
            cuda_graph: on NVIDIA GPUs, capture and replay each such sequence as CUDA graphs (see `ConvNext.freeze`).
                What the model itself computes in between is not captured.

        Raises:
            ValueError: nothing in the model can be frozen; or, with ``cuda_graph``, it is not on a CUDA device.
        """
        modules = [module for module in self.model.modules() if state_of(module) is not None]
        if not any(not isinstance(state_of(module).plan, ChainPlan) for module in modules):
            raise ValueError(f"freeze() found nothing that runs on the fused ops:\n{self}")
        if cuda_graph:
            check_has_graphs(self.model)
        self.model.eval()
        if isinstance(self.model, ConvNextSwitches):
            self.model.freeze(cuda_graph)
            return self
        for module in modules:
            freeze(module, cuda_graph)
        return self

    def unfreeze(self) -> FuseReport:
        """Undo `freeze`, except that the mode stays evaluation; return the report."""
        if isinstance(self.model, ConvNextSwitches):
            self.model.unfreeze()
        for module in self.model.modules():
            unfreeze(module)
        return self

    def _parts(self) -> Iterator[tuple[str, nn.Module]]:
        """The blocks and patch layers, under the names by which they are reported."""
        for name, module in self.model.named_modules():
            state = state_of(module)
            if state is not None and not isinstance(state.plan, ChainPlan):
                holder = holder_of(state.plan) if isinstance(state.plan, PatchPlan) else ()
                yield ".".join(filter(None, (name, *holder))), module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``model(*args, **kwargs)``."""
        return self.model(*args, **kwargs)

    def __str__(self) -> str:
        """The counts, then what was left alone, grouped by reason."""
        counts = [(len(self.fused), "blocks"), (len(self.patch_layers), "patch layers (stem, downsampling)")]
        done = len(self.fused) + len(self.patch_layers)
        if not done and not self.left_alone:
            return f"{type(self.model).__name__}: no ConvNeXt block found"
        kinds = ", ".join(f"{count} {what}" for count, what in counts if count)
        lines = [f"{type(self.model).__name__}: {done} of {done + len(self.left_alone)} fused: {kinds or 'none'}"]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_alone.items():
            reasons.setdefault(reason, []).append(name or "the model itself")
        lines += [f"left alone: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
        frozen = set(self.frozen)
        if frozen:
            lines.append(f"frozen: {len(frozen)} of {done}")
        return "\n".join(lines)
