"""Arguments of every operator that is registered, for `torch.library.opcheck`."""

from __future__ import annotations

import torch
from block_cases import activations, block_parameters
from torch import Tensor

from convnext_fast.ops.operators import OPERATORS

ON_CPU = (
    "block_bwd",
    "block_fwd",
    "dwconv_layernorm_bwd",
    "dwconv_layernorm_fwd",
    "frozen_block_fwd",
    "pointwise_mlp_bwd",
    "pointwise_mlp_fwd",
)
"""What a CPU runs as well, and calls in a compiled model as ``<name>_cpu``."""
KERNELS_ALONE = ("downsample_bwd", "downsample_fwd", "frozen_downsample_fwd", "patchify_stem_bwd", "patchify_stem_fwd")
WITHOUT_GRADIENT = ("test_schema", "test_faketensor", "test_autograd_registration")
"""What opcheck can see of an operator that has no gradient."""
EPS, ACT = 1e-6, "gelu"


def registered() -> set[str]:
    """The operators of the namespace ``convnext_fast``."""
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    return {name for namespace, name in names if namespace == "convnext_fast"}


def forward_cases(dtype: torch.dtype) -> dict[str, list[tuple]]:
    """By operator: arguments, a gradient wanted of every tensor; at first all that is optional, at last none of it."""
    x, image = (activations(shape, dtype, "contiguous") for shape in ((2, 5, 4, 8), (2, 3, 9, 8)))
    scale = torch.tensor([0.0, 1.25])
    full = list(block_parameters(8, 24, 7, dtype).values())
    full += [None, None]
    bare = [full[0], None, None, None, *full[4:8], None, None, None]

    def parameters(*shape):
        return torch.randn(shape, dtype=dtype).requires_grad_(), torch.randn(shape[0], dtype=dtype).requires_grad_()

    stem, down, affine = parameters(8, 3, 4, 4), parameters(12, 8, 2, 2), full[2:4]
    return {
        "block_fwd": [
            *((x, *full, scale, EPS, ACT, recompute, dtype) for recompute in (0, 1, 2)),
            (x, *bare, None, EPS, "silu", 1, dtype),
        ],
        "dwconv_layernorm_fwd": [(x, *full[:4], EPS, dtype), (x, full[0], None, *affine, EPS, dtype)],
        "pointwise_mlp_fwd": [
            (x, x.detach().clone(), *full[4:9], scale, "silu", 0, dtype),
            (x, None, *full[4:8], None, None, ACT, 1, dtype),
        ],
        "patchify_stem_fwd": [(image, *w, *affine, EPS, dtype, dtype) for w in (stem, (stem[0], None))],
        "downsample_fwd": [(x, *affine, *w, EPS, dtype) for w in (down, (down[0], None))],
    }


@torch.no_grad()
def cases(name: str, dtype: torch.dtype) -> list[tuple]:
    """Arguments of an operator; those of a backward come out of a forward that runs now, as autograd gives them."""
    forward = forward_cases(dtype)
    if name in forward:
        return forward[name]
    if name == "frozen_block_fwd":
        x, *full = _detached(forward["block_fwd"][0])
        return [(x, *full[:2], full[4], torch.randn(2, 24), *full[6:8], None, EPS, ACT, dtype)]
    if name == "frozen_downsample_fwd":
        x, _, _, weight, bias, *_ = _detached(forward["downsample_fwd"][0])
        return [(x, weight, bias.float(), EPS, dtype)]
    return [_backward(name, *_detached(arguments)) for arguments in forward[name.replace("_bwd", "_fwd")]]


def _backward(name: str, x: Tensor, *rest: object) -> tuple:
    result = OPERATORS[name.replace("_bwd", "_fwd")](x, *rest)
    y, *kept = result if isinstance(result, tuple) else (result,)
    kept = [None if t.shape == (0,) else t for t in kept]
    dy = torch.randn_like(y)
    if name == "block_bwd":
        *tensors, eps, act, recompute, dtype = rest
        return dy, x, *kept, *tensors, eps, act, dtype, True, recompute > 0
    if name == "pointwise_mlp_bwd":
        _, *tensors, act, _, dtype = rest
        return dy, x, *kept, *tensors, act, dtype
    if name == "patchify_stem_bwd":
        return dy, x, *rest[:-1], True
    if name == "downsample_bwd":
        return dy, x, *rest, True, True, rest[3] is not None
    return dy, x, *kept, *rest


def _detached(arguments: tuple) -> list:
    return [value.detach() if isinstance(value, Tensor) else value for value in arguments]
