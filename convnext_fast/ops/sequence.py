"""Steps of a frozen model, run one after another without calls of modules in between.

On a CPU, a kernel's data push Python's out of the caches. The Python code around the kernel of a block or a
downsampling layer then takes 0.2 to 0.5 ms; a kernel of ConvNeXt-T on one image takes 2 ms. So everything about the
modules is looked up before the first kernel starts.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.nn.modules import module as globally

from ..backends import choose
from ..backends.cpu import llvm, onednn
from ..backends.cpu.packed_weights import kernels_for
from ..backends.steps import Kind, Step, shapes_after
from . import call, functions
from .arguments import check_block, check_downsample, check_stem
from .cuda_graphs import Graphs
from .folded_weights import Folded, Signature, flat_block, folded, signature, watch_data
from .views import as_nchw

MOST_SHAPES = 256
"""The most kinds of inputs that a sequence remembers."""

kind_of = operator.attrgetter("shape", "dtype", "device")
"""What a check of a tensor depends on."""


def backend_for(x: Tensor) -> choose.Name | None:
    """The backend for steps on x (N, C, H, W); None if they cannot run.

    Under a compiler they cannot run for export, nor, where an op is not one operator, with gradients or autocast.
    """
    if not isinstance(x, Tensor) or x.dim() != 4 or _hooks_everywhere():
        return None
    backend = choose.select(x.device, call.compute_dtype(x))
    if torch.compiler.is_compiling():
        served = backend == "triton" or (x.dtype == torch.float32 and x.device.type == "cpu" and backend == "aten")
        plain = choose.is_whole(x.device) or not (call.wants_gradient(x) or call.autocasts(x))
        return backend if plain and served and not choose.is_exporting() else None
    return None if backend == "reference" else backend


class FrozenSequence:
    """Steps that run one after another on weights that are folded once, and again when they change.

    Only the first may be a stem, whose live weights are used. With ``cuda_graph``, several steps on a GPU are captured
    and replayed (see `cuda_graphs`).
    """

    def __init__(self, steps: Sequence[Step], cuda_graph: bool = False):
        self._steps = list(steps)
        self._stem = [w for w in steps[0].weights if w is not None] if steps[0].kind == Kind.STEM else []
        self._weights = [w for step in steps if step.kind != Kind.STEM for w in step.weights if w is not None]
        self._signature: Signature = None
        self._folded: list[Folded] = []
        self._plan: tuple = ()
        self._graphs = Graphs() if cuda_graph and len(steps) > 1 else None
        self._kernels: list[llvm.Kernel] | None = None
        self._shapes: dict[tuple, list[tuple[int, ...]]] = {}

    def __call__(self, x: Tensor, ends: Sequence[int], backend: choose.Name) -> list[Tensor]:
        """The outputs of the steps ``ends``, (N, C', H', W') each, for x (N, C, H, W); ``backend``: x's `backend_for`.

        ends: indices of steps in ascending order, including the last step. Autocast is off.

        Raises:
            TypeError, ValueError: as the ops do.
        """
        x = x if self._stem else x.permute(0, 2, 3, 1)
        self._notice_changes(x)
        shapes = self._checked(x)
        # Plain: no mode observes operations on x.
        plain = type(x) is Tensor and call.is_plain(x) and not call.wants_gradient(x, *self._stem)
        if plain and backend == "cpu" and onednn.supports(x):
            kernels = self._kernels_for()
            if kernels is not None:
                eps = [step.eps for step in self._steps]
                return list(map(as_nchw, run_kernels(kernels, eps, shapes, x.contiguous(), ends)))
        if plain and backend == "triton" and not x.is_neg():
            given = x if self._stem else x.contiguous()
            run = choose.module("triton").steps if self._graphs is None else self._graphs
            return list(map(as_nchw, run(given, self._plan, tuple(ends), x.dtype)))
        results = []
        for i, (step, weights) in enumerate(zip(self._steps, self._folded, strict=True)):
            x = _run_step(step, weights, x)
            if i in ends:
                results.append(as_nchw(x))
                x = results[-1].permute(0, 2, 3, 1)
        return results

    def _notice_changes(self, x: Tensor) -> None:
        now = signature(self._weights)
        if now is None or now != self._signature:
            check_steps(self._steps, x)
            self._folded = list(map(folded, self._steps))
            self._plan = tuple(
                (weights, step.eps, step.act) for weights, step in zip(self._folded, self._steps, strict=True)
            )
            self._kernels, self._shapes = None, {}
            self._signature = now if watch_data(self._weights) else None  # set last: other threads read it first

    def _checked(self, x: Tensor) -> list[tuple[int, ...]]:
        """`steps.shapes_after`; raises the ops' errors. Tensors like those that passed are not checked again."""
        seen = (kind_of(x), *map(kind_of, self._stem))
        shapes = self._shapes.get(seen)
        if shapes is None:
            shapes = check_steps(self._steps, x)
            if len(self._shapes) >= MOST_SHAPES:
                self._shapes.clear()
            self._shapes[seen] = shapes
        return shapes

    def _kernels_for(self) -> list[llvm.Kernel] | None:
        """Kernels with packed weights; None if a step has no kernel. A stem's weights are packed on every call."""
        if self._kernels is None:
            rest = slice(1 if self._stem else 0, None)
            self._kernels = kernels_for(self._folded[rest], [step.act for step in self._steps[rest]])
        if self._kernels is None or not self._stem:
            return self._kernels
        first = llvm.prepare_stem(*self._steps[0].weights)
        return None if first is None else [first, *self._kernels]


def compiled(steps: Sequence[Step], x: Tensor, ends: Sequence[int], frozen: bool) -> list[Tensor] | None:
    """As `FrozenSequence` in a compiler's graph, as one operator; None if that is impossible.

    frozen: False to use the live weights.
    """
    acts = {step.act for step in steps if step.act}
    weights = list(chain.from_iterable(step.weights for step in steps))
    if len(acts) > 1 or (not frozen and any(w is not None and w.dtype != x.dtype for w in weights)):
        return None
    from . import sequence_operator  # imported late: it imports PyTorch's compiler

    x = x if steps[0].kind == Kind.STEM else x.permute(0, 2, 3, 1)
    check_steps(steps, x)
    kinds, eps, tokens = [int(step.kind) for step in steps], [s.eps for s in steps], [step.token for step in steps]
    run = sequence_operator.frozen_steps if frozen else sequence_operator.live_steps
    results = run(x, weights, tokens, kinds, eps, "".join(acts), list(ends))
    return [y.permute(0, 3, 1, 2) for y in results]


def run_kernels(
    kernels: list[llvm.Kernel], eps: list[float], shapes: list[tuple[int, ...]], x: Tensor, ends: Sequence[int]
) -> list[Tensor]:
    """`llvm.run`, without its preparations if there is only one kernel."""
    return [kernels[0](x, eps[0])] if len(kernels) == 1 else llvm.run(kernels, eps, shapes, x, ends)


def check_steps(steps: Sequence[Step], x: Tensor) -> list[tuple[int, ...]]:
    """`steps.shapes_after`; raises the ops' errors for steps that do not fit x, (N, H, W, C) or a stem's image."""
    shapes = []
    for step in steps:
        if step.kind == Kind.BLOCK:
            check_block(x, flat_block(step.weights), None, step.act, 2)
        else:
            (check_stem if step.kind == Kind.STEM else check_downsample)(x, step.weights)
        shapes += shapes_after([step], x.shape)
        if shapes[-1] != tuple(x.shape):
            x = x.new_empty(1).expand(shapes[-1])
    return shapes


def _run_step(step: Step, weights: Folded, x: Tensor) -> Tensor:
    if step.kind == Kind.BLOCK:
        return functions.frozen_block(x, *weights, eps=step.eps, act=step.act)
    function = functions.patchify_stem if step.kind == Kind.STEM else functions.frozen_downsample
    return function(x, *weights, eps=step.eps)


def _hooks_everywhere() -> bool:
    return bool(
        globally._global_forward_hooks
        or globally._global_forward_pre_hooks
        or globally._global_backward_hooks
        or globally._global_backward_pre_hooks
    )
