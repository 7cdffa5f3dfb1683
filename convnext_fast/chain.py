"""Frozen blocks on a CPU one after another, with nothing but their kernels in between.

While a kernel runs, its data push Python's out of the caches: what a block does around its kernel takes some 0.2 ms
then, a tenth of the time of ConvNeXt-T on one image. So all that is asked of the blocks of a stage is asked before the
first kernel starts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as globally

from . import backend, compiled, onednn, ops
from .block import ConvNextBlockBase
from .memory import as_nchw
from .prepared import prepared
from .watching import has_hooks


def in_one_go(blocks: nn.Sequential | nn.ModuleList, x: Tensor) -> Tensor | None:
    """(N, C, H, W) through frozen blocks; None where they have to be called one by one."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or len(blocks) < 2:
        return None
    chain = _kernels_of(blocks, x)
    return None if chain is None else as_nchw(compiled.run_chain(chain, x.permute(0, 2, 3, 1).contiguous()))


def _kernels_of(blocks: nn.Sequential | nn.ModuleList, x: Tensor) -> list[tuple[compiled.CompiledBlock, float]] | None:
    """What the blocks run, and their epsilons; None where something else than that is to be done."""
    if not ops.wants_values(x) or x.dim() != 4 or not onednn.serves(x):
        return None
    if backend.select(x.device, x.dtype) != "aten" or _hooks_everywhere() or not _is_untouched(blocks):
        return None
    chain = []
    for block in blocks:
        if not isinstance(block, ConvNextBlockBase) or not _is_untouched(block):
            return None
        frozen = block.frozen
        if frozen is None or not block.fused or block.change() is not None or frozen.w1.dtype != x.dtype:
            return None
        kernel = prepared(x, tuple(frozen), block.act_name)
        if not isinstance(kernel, compiled.CompiledBlock) or kernel.channels != x.shape[1]:
            return None
        chain.append((kernel, block.eps))
    return chain


_FORWARDS = ConvNextBlockBase.forward, nn.Sequential.forward, nn.ModuleList.forward


def _is_untouched(module: nn.Module) -> bool:
    """Whether a call of it runs the forward of its kind and nothing else."""
    plain = type(module).forward in _FORWARDS and type(module).__call__ is nn.Module.__call__
    return plain and "forward" not in module.__dict__ and not has_hooks(module) and module._compiled_call_impl is None


def _hooks_everywhere() -> bool:
    return bool(
        globally._global_forward_hooks
        or globally._global_forward_pre_hooks
        or globally._global_backward_hooks
        or globally._global_backward_pre_hooks
    )
