"""Shapes and checks of the pointwise MLP, shared by the interpreter tests and the executed-machine-code tests."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from convnext_fast.kernels.parameters import fold_bwd, fold_fwd
from convnext_fast.kernels.pointwise_mlp import mlp_fwd
from convnext_fast.kernels.pointwise_mlp_bwd import mlp_bwd
from convnext_fast.kernels.statistics import stats_block
from kernel_support import INTERPRETING, assert_as_good_as_eager, eager_products, layer_norm_reference
from statistics_cases import partial_statistics

EPS = 1e-6
PARAMETERS = ("w1", "b1", "ln_weight", "ln_bias", "w2", "b2", "gamma")
ACTS = {
    "gelu": F.gelu,
    "gelu_new": lambda a: F.gelu(a, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "selu": F.selu,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """``samples`` images of ``pixels`` pixels each; ``full`` has every optional operand, else none."""

    samples: int
    pixels: int
    channels: int
    hidden: int
    dtype: torch.dtype
    residual_dtype: torch.dtype | None = None
    full: bool = True
    act: str = "gelu"

    def __str__(self) -> str:
        kind = "full" if self.full else "plain"
        return f"{self.samples}x{self.pixels}-C{self.channels}-K{self.hidden}-{self.act}-{kind}-{self.dtype}"


def inputs(case: Case) -> dict[str, torch.Tensor | None]:
    """Operands of a case: u, residual, dy, drop_scale and the float32 parameters."""
    g = torch.Generator().manual_seed(hash((case.samples, case.pixels, case.channels, case.hidden)) % 2**31)
    P, C, K = case.samples * case.pixels, case.channels, case.hidden

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    residual_dtype = case.residual_dtype or case.dtype
    made = {
        "u": (normal(P, C) + 0.5 * normal(P, 1)).to(case.dtype),
        "residual": normal(P, C).to(residual_dtype),
        "dy": normal(P, C).to(residual_dtype),
        "drop_scale": 1.25 * (torch.rand(case.samples, generator=g) < 0.7).float(),
        "w1": normal(K, C) / C**0.5,
        "b1": normal(K),
        "ln_weight": 1 + 0.3 * normal(C),
        "ln_bias": normal(C),
        "w2": normal(C, K) / K**0.5,
        "b2": normal(C),
        "gamma": normal(C),
    }
    if not case.full:
        made |= dict.fromkeys(("residual", "drop_scale", "b1", "ln_weight", "ln_bias", "b2", "gamma"))
        made["dy"] = made["dy"].to(case.dtype)
    return made


def mlp_reference(case: Case, given: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """y and every gradient by autograd, all arithmetic in ``dtype``, the residual added in the wider type."""
    leaves = {n: given[n].to(dtype).detach().requires_grad_() for n in ("u", *PARAMETERS) if given[n] is not None}
    p = {n: leaves.get(n) for n in PARAMETERS}
    n = layer_norm_reference(leaves["u"], p["ln_weight"], p["ln_bias"], EPS) if case.full else leaves["u"]
    z = F.linear(ACTS[case.act](F.linear(n, p["w1"], p["b1"])), p["w2"], p["b2"])
    if case.full:
        z = z * p["gamma"] * given["drop_scale"].to(dtype).repeat_interleave(case.pixels)[:, None]
        wide = dtype if dtype == torch.float64 else given["residual"].dtype
        y = given["residual"].to(wide) + z.to(wide)
    else:
        y = z
    grads = torch.autograd.grad(y, list(leaves.values()), given["dy"].to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def run_forward(case: Case, given: dict, forward, save_hidden: bool = False):
    stats = partial_statistics(given["u"].float(), stats_block(case.channels, case.dtype)) if case.full else None
    folded = fold_fwd(*(given[name] for name in ("w1", "b1", "ln_weight", "ln_bias", "w2")), None, case.dtype)
    rest = (*folded, given["b2"], given["gamma"], given["drop_scale"], EPS, case.act, save_hidden)
    return *forward(given["u"], stats, given["residual"], *rest), stats


def eager_reference(case: Case, given: dict) -> dict[str, torch.Tensor]:
    """What eager operators give in the case's dtype."""
    with eager_products(case.dtype):
        return mlp_reference(case, given, case.dtype)


def check_forward(case: Case, forward=mlp_fwd) -> None:
    given = inputs(case)
    y, a, *_ = run_forward(case, given, forward, save_hidden=True)
    want = mlp_reference(case, given, torch.float64)
    eager = eager_reference(case, given)
    assert y.dtype == (given["residual"].dtype if case.full else case.dtype)
    assert_as_good_as_eager(y, eager["y"], want["y"], "y")
    assert a.shape == (case.samples * case.pixels, case.hidden)
    assert a.dtype == case.dtype
    assert not a.isnan().any()


def check_backward(case: Case, backward=mlp_bwd, save_hidden: bool = False) -> None:
    """Every gradient as good as eager autograd's, and of executed machine code a second run equal to the bit."""
    given = inputs(case)
    _, a, stats = run_forward(case, given, mlp_fwd, save_hidden)
    parameters = {name: given[name] for name in ("ln_weight", "ln_bias", "w1", "b1", "w2", "b2", "gamma")}

    def run() -> tuple[torch.Tensor | None, ...]:
        folded = fold_fwd(*(given[name] for name in ("w1", "b1", "ln_weight", "ln_bias", "w2", "gamma")), case.dtype)
        du, sums = backward(given["dy"], given["u"], stats, a, *folded, given["drop_scale"], EPS, case.act)
        return du, *fold_bwd(sums, *parameters.values())[2:]

    grads = run()
    want = mlp_reference(case, given, torch.float64)
    eager = eager_reference(case, given)
    assert grads[0].dtype == case.dtype
    for name, grad in zip(("u", *parameters), grads, strict=True):
        if given[name] is None:
            assert grad is None
            continue
        assert_as_good_as_eager(grad, eager[f"d{name}"], want[f"d{name}"], f"d{name}")
    if INTERPRETING:
        return
    for first, second in zip(grads, run(), strict=True):
        assert first is second or torch.equal(first, second)


AWKWARD = [
    Case(1, 9, 1, 1, torch.float32),
    Case(1, 9, 1, 1, torch.float16, full=False),
    Case(3, 50, 37, 77, torch.float32),
    Case(3, 50, 37, 77, torch.float16),
    Case(3, 50, 37, 77, torch.float16, full=False),
    Case(3, 49, 40, 160, torch.float16),
    Case(1, 130, 96, 96, torch.float32),
]
EMPTY = [Case(0, 49, 40, 160, torch.float16), Case(0, 49, 40, 160, torch.float32)]
OTHER_ACTS = [Case(1, 33, 17, 40, torch.float32, act=act) for act in ACTS if act != "gelu"]
OTHER_ACTS_BACKWARD = [dataclasses.replace(case, dtype=torch.float16) for case in OTHER_ACTS]
