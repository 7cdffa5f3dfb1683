"""Shapes and checks of the pointwise MLP, shared by the interpreter tests and the executed-machine-code tests."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from convnext_fast.kernels.folding import fold_bwd, fold_fwd
from convnext_fast.kernels.mlp import mlp_bwd, mlp_fwd
from convnext_fast.kernels.mlp.grn import Grn
from convnext_fast.kernels.statistics import stats_block
from convnext_fast.kernels.weights import BlockWeights
from kernel_support import assert_as_good_as_eager, eager_products, layer_norm_reference
from statistics_cases import partial_statistics

from convnext_fast.backends import reference

EPS = 1e-6
PARAMETERS = ("w1", "b1", "ln_weight", "ln_bias", "w2", "b2", "gamma", "grn_weight", "grn_bias")
ACTS = {
    "gelu": F.gelu,
    "gelu_new": lambda a: F.gelu(a, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "selu": F.selu,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """``samples`` images of ``pixels`` pixels each; ``full``: with all optional operands, not without; ``grn``: with
    a global response norm.

    With few numbers an error is a matter of luck, ours and eager's, so ``draws`` of the inputs are taken together.
    ``offset``: the deviation of a pixel's mean over the channels, in units of the deviation about it.
    """

    samples: int
    pixels: int
    channels: int
    hidden: int
    dtype: torch.dtype
    residual_dtype: torch.dtype | None = None
    full: bool = True
    act: str = "gelu"
    draws: int = 1
    offset: float = 0.5
    grn: bool = False

    def __str__(self) -> str:
        kind = "full" if self.full else "plain"
        far = f"-offset{self.offset:g}" if self.offset != 0.5 else ""
        kind += "-grn" if self.grn else ""
        return f"{self.samples}x{self.pixels}-C{self.channels}-K{self.hidden}-{self.act}-{kind}-{self.dtype}{far}"


def inputs(case: Case, draw: int = 0) -> dict[str, torch.Tensor | None]:
    """Operands of a case: u, residual, dy, drop_scale and the float32 parameters. Every second sample is dropped."""
    shape = (case.samples, case.pixels, case.channels, case.hidden)
    g = torch.Generator().manual_seed((hash(shape) + draw) % 2**31)
    P, C, K = case.samples * case.pixels, case.channels, case.hidden

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    residual_dtype = case.residual_dtype or case.dtype
    made = {
        "u": (normal(P, C) + case.offset * normal(P, 1)).to(case.dtype),
        "residual": normal(P, C).to(residual_dtype),
        "dy": normal(P, C).to(residual_dtype),
        "drop_scale": 1.25 * (torch.arange(case.samples) % 2 == 0).float(),
        "w1": normal(K, C) / C**0.5,
        "b1": normal(K),
        "ln_weight": 1 + 0.3 * normal(C),
        "ln_bias": normal(C),
        "w2": normal(C, K) / K**0.5,
        "b2": normal(C),
        "gamma": normal(C),
        "grn_weight": normal(K) if case.grn else None,
        "grn_bias": normal(K) if case.grn else None,
    }
    if not case.full:
        made |= dict.fromkeys(("residual", "drop_scale", "b1", "ln_weight", "ln_bias", "b2", "gamma"))
        made["dy"] = made["dy"].to(case.dtype)
    return made


def mlp_reference(case: Case, given: dict, dtype: torch.dtype, off: float = 0.0) -> dict[str, torch.Tensor]:
    """y and every gradient by autograd, all arithmetic in ``dtype``, the residual added in the wider type.

    x̂ is too large by ``off``·u·eps^-½.
    """
    leaves = {n: given[n].to(dtype).detach().requires_grad_() for n in ("u", *PARAMETERS) if given[n] is not None}
    p = {n: leaves.get(n) for n in PARAMETERS}
    n = layer_norm_reference(leaves["u"], p["ln_weight"], p["ln_bias"], EPS) if case.full else leaves["u"]
    if case.full and off:
        n = n + leaves["u"].detach() * (off * EPS**-0.5) * p["ln_weight"]
    h = ACTS[case.act](F.linear(n, p["w1"], p["b1"]))
    if case.grn:
        images = h.view(case.samples, case.pixels, 1, case.hidden)
        h = reference.global_response_norm(images, p["grn_weight"], p["grn_bias"]).view(h.shape)
    z = F.linear(h, p["w2"], p["b2"])
    if case.full:
        z = z * p["gamma"] * given["drop_scale"].to(dtype).repeat_interleave(case.pixels)[:, None]
        wide = dtype if dtype == torch.float64 else given["residual"].dtype
        y = given["residual"].to(wide) + z.to(wide)
    else:
        y = z
    grads = torch.autograd.grad(y, list(leaves.values()), given["dy"].to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def weights_of(given: dict) -> BlockWeights:
    return BlockWeights(None, None, *(given[name] for name in BlockWeights._fields[2:]))


def grn_of(case: Case, given: dict) -> Grn | None:
    return Grn(given["grn_weight"], given["grn_bias"], case.samples) if case.grn else None


def run_forward(case: Case, given: dict, forward, save_hidden: bool = False):
    stats = partial_statistics(given["u"].float(), stats_block(case.channels, case.dtype)) if case.full else None
    folded = fold_fwd(weights_of(given), case.dtype, layer_scale=False)
    rest = (*folded, given["b2"], given["gamma"], given["drop_scale"], EPS, case.act, save_hidden, grn_of(case, given))
    return *forward(given["u"], stats, given["residual"], *rest), stats


def eager_reference(case: Case, given: dict) -> dict[str, torch.Tensor]:
    """The results of eager operators in the case's dtype.

    One channel minus its mean is zero, and rstd is eps^-½. Eager subtracts first, which is exact; most kernels multiply
    first, so that x̂ is a difference of equal terms u·rstd, each rounded by up to 2⁻²⁴ of it. So it is here, too.
    """
    with eager_products(case.dtype):
        return mlp_reference(case, given, case.dtype, off=2.0**-24 if case.channels == 1 else 0.0)


def assert_each_as_good_as_eager(results: list[tuple[dict, dict, dict]], terms: int = 1) -> None:
    """Check each result by name, in all draws together; ``results``: (ours, eager's, float64's) of each draw."""
    for name in results[0][0]:
        assert_as_good_as_eager(
            *(torch.stack([kind[name] for kind in kinds]) for kinds in zip(*results, strict=True)), name, terms=terms
        )


def check_forward(case: Case, forward=mlp_fwd) -> None:
    results = []
    for draw in range(case.draws):
        given = inputs(case, draw)
        y, a, *_ = run_forward(case, given, forward, save_hidden=True)
        assert y.dtype == (given["residual"].dtype if case.full else case.dtype)
        assert a.shape == (case.samples * case.pixels, case.hidden)
        assert a.dtype == case.dtype
        assert not a.isnan().any()
        results.append(({"y": y}, eager_reference(case, given), mlp_reference(case, given, torch.float64)))
    assert_each_as_good_as_eager(results)


def check_result_in_two_dtypes(case: Case, forward) -> None:
    """y in float32 of a residual in 16 bits, as of one in float32, and its copy in 16 bits."""
    given = inputs(case)
    expected, *_ = run_forward(case, given | {"residual": given["residual"].float()}, forward)
    out = torch.empty_like(expected), torch.empty_like(expected, dtype=case.dtype)
    y, *_ = run_forward(case, given, lambda *arguments: forward(*arguments, out))
    assert y is out[0]
    assert torch.equal(y, expected)
    assert torch.equal(out[1], expected.to(case.dtype))


def check_backward(case: Case, backward=mlp_bwd, save_hidden: bool = False, again: bool = False) -> None:
    """Every gradient as good as eager autograd's; ``again``: and bit-for-bit equal in a second run."""
    results = []
    for draw in range(case.draws):
        given = inputs(case, draw)
        grads = gradients(case, given, backward, save_hidden)
        if again:
            for name, grad in gradients(case, given, backward, save_hidden).items():
                assert torch.equal(grads[name], grad), name
        assert grads["du"].dtype == case.dtype
        assert grads.keys() == {f"d{name}" for name in ("u", *PARAMETERS) if given[name] is not None}
        results.append((grads, eager_reference(case, given), mlp_reference(case, given, torch.float64)))
    # With a norm, tiles end where samples do, so that float32 sums over the pixels have another order than eager's.
    assert_each_as_good_as_eager(results, terms=case.samples * case.pixels if case.grn else 1)


def gradients(case: Case, given: dict, backward, save_hidden: bool) -> dict[str, torch.Tensor]:
    """Every gradient that the kernels make, by the name of its tensor."""
    _, a, stats = run_forward(case, given, mlp_fwd, save_hidden)
    folded = fold_fwd(weights_of(given), case.dtype, layer_scale=True)
    rest = (given["dy"], given["u"], stats, a, *folded, given["drop_scale"], EPS, case.act)
    du, sums = backward(*rest, grn_of(case, given))
    found = {"du": du, **{f"d{name}": grad for name, grad in fold_bwd(sums, weights_of(given))._asdict().items()}}
    return {name: grad for name, grad in found.items() if grad is not None}


AWKWARD = [
    Case(1, 9, 1, 1, torch.float32, draws=8),
    Case(1, 9, 1, 1, torch.float16, draws=8),
    Case(1, 9, 1, 1, torch.float16, full=False, draws=8),
    Case(3, 50, 37, 77, torch.float32, draws=4),
    Case(3, 50, 37, 77, torch.float16),
    Case(3, 50, 37, 77, torch.float16, full=False),
    Case(3, 49, 40, 160, torch.float16),
    Case(1, 130, 96, 96, torch.float32),
]
FAR = [Case(1, 50, 37, 77, torch.float32, offset=offset) for offset in (5.0, 50.0)]
EMPTY = [Case(0, 49, 40, 160, torch.float16), Case(0, 49, 40, 160, torch.float32)]
GRN = [
    Case(3, 9, 8, 32, torch.float32, grn=True),
    Case(3, 50, 37, 77, torch.float32, grn=True),
    Case(3, 50, 37, 77, torch.float16, full=False, grn=True),
    Case(5, 1, 8, 32, torch.float16, draws=2, grn=True),
    Case(3, 49, 40, 160, torch.float16, grn=True),
    Case(2, 130, 24, 96, torch.float16, act="relu", grn=True),
]
OTHER_ACTS = [Case(1, 33, 17, 40, torch.float32, act=act) for act in ACTS if act != "gelu"]
OTHER_ACTS_BACKWARD = [dataclasses.replace(case, dtype=torch.float16) for case in OTHER_ACTS]


def half_autocast_reference(given: dict, pixels: int, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Every gradient by autograd as autocast computes it in ``dtype``, layer scale and residual in float32; None: all
    in float64.
    """
    leaves = {n: given[n].detach().to(dtype or torch.float64).requires_grad_() for n in ("u",)}
    names = [name for name in PARAMETERS if given[name] is not None]
    leaves |= {n: given[n].detach().to(torch.float32 if dtype else torch.float64).requires_grad_() for n in names}
    p = {n: leaf if dtype is None else leaf.to(dtype) for n, leaf in leaves.items()}
    wide = torch.float32 if dtype else torch.float64
    n = F.layer_norm(leaves["u"].to(wide), (given["u"].shape[1],), leaves["ln_weight"], leaves["ln_bias"], EPS)
    z = F.linear(F.gelu(F.linear(n.to(p["w1"].dtype), p["w1"], p["b1"])), p["w2"], p["b2"])
    z = z * leaves["gamma"] * given["drop_scale"].to(wide).repeat_interleave(pixels)[:, None]
    grads = torch.autograd.grad(z, list(leaves.values()), given["dy"].to(z.dtype))
    return {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def check_small_layer_scale(case: Case, layer_scale: float, loss_scale: float, backward=mlp_bwd) -> None:
    """γ as at the start of training, or large, with gradients as a loss scale makes them."""
    given = inputs(case)
    given["gamma"] = given["gamma"] * layer_scale
    given["dy"] = given["dy"] * loss_scale
    ours = gradients(case, given, backward, save_hidden=False)
    eager = half_autocast_reference(given, case.pixels, case.dtype)
    exact = half_autocast_reference(given, case.pixels, None)
    assert_each_as_good_as_eager([(ours, eager, exact)])
