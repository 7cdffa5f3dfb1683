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
    if torch.is_grad_enabled() or len(blocks) < 2 or not _serves(x) or not all(map(_serves_as_it_is, blocks)):
        return None
    if _hooks_everywhere() or not _is_untouched(blocks):
        return None
    nhwc, values = x.permute(0, 2, 3, 1), not torch.compiler.is_compiling()
    for block in blocks:
        if block.frozen is None or block.act_name != blocks[0].act_name:
            return None
        if block.frozen.w1.dtype != x.dtype:
            return None
        ops.check_frozen_block(values, nhwc, *block.frozen)
    if torch.compiler.is_compiling():
        from .frozen_ops import frozen_blocks

        weights = [x.new_empty(0) if weight is None else weight for block in blocks for weight in block.frozen]
        return frozen_blocks(nhwc, weights, [block.eps for block in blocks], blocks[0].act_name).permute(0, 3, 1, 2)
    chain = [(prepared(x, tuple(block.frozen), block.act_name), block.eps) for block in blocks]
    if not all(isinstance(kernel, compiled.CompiledBlock) for kernel, _ in chain):
        return None
    return as_nchw(compiled.run_chain(chain, nhwc.contiguous()))


def _serves(x: Tensor) -> bool:
    """Whether the path for CPUs takes x, and nothing but a compiler looks on."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    if torch.compiler.is_compiling():
        looked_at = backend.autocasts(x)
    else:
        looked_at = not ops.wants_values(x) or not onednn.serves(x)
    return not looked_at and backend.select(x.device, x.dtype) == "aten"


def _serves_as_it_is(block: nn.Module) -> bool:
    """Whether the block computes with its frozen weights, and a call of it does nothing else."""
    ours = isinstance(block, ConvNextBlockBase) and _is_untouched(block)
    return ours and block.fused and block.change() is None


_CALL = nn.Module.__call__
_FORWARDS = ConvNextBlockBase.forward, nn.Sequential.forward, nn.ModuleList.forward


def _is_untouched(module: nn.Module) -> bool:
    """Whether a call of it runs the forward of its kind and nothing else."""
    plain = type(module).forward in _FORWARDS and type(module).__call__ is _CALL
    return plain and "forward" not in module.__dict__ and not has_hooks(module) and module._compiled_call_impl is None


def _hooks_everywhere() -> bool:
    return bool(
        globally._global_forward_hooks
        or globally._global_forward_pre_hooks
        or globally._global_backward_hooks
        or globally._global_backward_pre_hooks
    )
