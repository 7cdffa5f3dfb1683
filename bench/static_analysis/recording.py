"""Record what a model launches on a target, forward or forward and backward, without running anything.

    made = record("tiny", torch.bfloat16, mode="training", recompute=1, target="sm_90")
    made.launches       # Triton launches, in order, with their exact arguments
    made.operators      # PyTorch's own operators between them; made.steps holds both, in order
    made.saved          # bytes kept for the backward pass

Tensors are fake: they have shapes, strides and storages, but no values. Launches of Triton kernels are listed with a
`Buffer` in place of each tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from convnext_fast.kernels.targets import planned_for
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.static_analysis.compilation import Launch, Specialised, specialise
from convnext_fast import ConvNext, ConvNextConfig
from convnext_fast.backends import environment, gpu
from convnext_fast.backends.steps import Step
from convnext_fast.config import VARIANTS
from convnext_fast.models import whole_runs
from convnext_fast.ops import block_group, call, folded_weights, sequence

MODES = ("inference", "training")
# Prefixes of operators that move no data, and of operators that do not read what they write to.
RESIDENT = ("empty", "new_empty", "detach", "lift_fresh", "alias", "_unsafe_view", "_reshape_alias")
OVERWRITING = ("fill_", "zero_", "copy_", "bernoulli_")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A tensor argument: what a compiler and a count of bytes need to know about it, and its place in memory.

    ``offset`` and ``size``: first byte and bytes spanned within storage number ``storage``, of ``storage_size`` bytes.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int
    storage_size: int
    offset: int
    size: int

    def data_ptr(self) -> int:
        """An address with the tensor's alignment: allocations are aligned, so the offset decides."""
        return self.offset

    def ptr_range(self) -> int:
        """Bytes of the storage, which decide the width of AMD's offsets."""
        return self.storage_size

    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Operator:
    """One of PyTorch's own operators that moves data: one or more kernel launches that are not ours.

    ``read`` and ``written`` count each byte of its tensors once; ``flops`` are those of matrix products; ``storages``
    are written to.
    """

    name: str
    read: int
    written: int
    flops: int
    storages: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Recording:
    """What one pass over ``batch`` images launches, in order, and the bytes that it saves for the backward.

    ``given`` numbers the storages of the parameters and the images.
    """

    steps: list[Launch | Operator]
    saved: int
    batch: int
    given: frozenset[int]

    @property
    def launches(self) -> list[Launch]:
        """Launches of Triton kernels."""
        return [step for step in self.steps if isinstance(step, Launch)]

    @property
    def operators(self) -> list[Operator]:
        """PyTorch's own operators."""
        return [step for step in self.steps if isinstance(step, Operator)]


class _Storages:
    """Numbers storages. It keeps them alive, so that no number is given twice."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, Any]] = {}

    def buffer(self, tensor: torch.Tensor) -> Buffer:
        storage = tensor.untyped_storage()
        number, _ = self._known.setdefault(storage._cdata, (len(self._known), storage))
        dims = [(side, step) for side, step in zip(tensor.shape, tensor.stride(), strict=True) if step]
        span = 1 + sum((side - 1) * step for side, step in dims) if tensor.numel() else 0
        item = tensor.element_size()
        return Buffer(
            tuple(tensor.shape), tensor.dtype, number, storage.nbytes(), tensor.storage_offset() * item, span * item
        )


def unique_bytes(buffers: Iterable[Buffer]) -> int:
    """Bytes that the buffers cover; bytes that they share count once."""
    total = 0
    reach: dict[int, int] = {}
    for buffer in sorted(buffers, key=lambda b: (b.storage, b.offset)):
        start = max(buffer.offset, reach.get(buffer.storage, 0))
        end = max(buffer.offset + buffer.size, start)
        total += end - start
        reach[buffer.storage] = end
    return total


class _Recorder(TorchDispatchMode):
    """Lists operators, and runs the bodies of ours, so that the operators and launches in them are listed too."""

    def __init__(self) -> None:
        super().__init__()
        self.storages = _Storages()
        self.steps: list[Launch | Operator] = []

    def numbers(self, tensors: Iterable[torch.Tensor]) -> frozenset[int]:
        """Storages of the tensors."""
        return frozenset(self.storages.buffer(tensor).storage for tensor in tensors)

    def wrap(self, kernel: Any) -> Any:
        """Stands in for ``torch.library.wrap_triton``: ``wrap(kernel)[grid](...)`` lists a launch."""

        class _Wrapped:
            def __getitem__(_, grid: tuple[int, ...]) -> Callable[..., None]:
                return lambda *args, **meta: self._launch(kernel, grid, args, meta)

        return _Wrapped()

    def _launch(self, kernel: Any, grid: tuple[int, ...], args: tuple, meta: dict[str, Any]) -> None:
        names = [parameter.name for parameter in kernel.params]
        bound = {p.name: p.default for p in kernel.params if p.has_default}
        bound |= dict(zip(names, args, strict=False)) | {k: v for k, v in meta.items() if k in names}
        for name, value in bound.items():
            if isinstance(value, torch.Tensor):
                bound[name] = self.storages.buffer(value)
        options = {name: value for name, value in meta.items() if name not in names}
        self.steps.append(Launch(kernel, tuple(grid), {name: bound[name] for name in names}, options))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        own = OPDEFS.get(f"{func.namespace}::{name}")
        with self:
            if own is not None:
                return own._init_fn(*args, **kwargs)
            parts = func.decompose(*args, **kwargs) if func.namespace == "aten" else NotImplemented
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        if func.namespace == "aten" and not func.is_view and not name.startswith(RESIDENT):
            self._operator(func, name, args, kwargs, out)
        return out

    def _operator(self, func: Any, name: str, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if func._schema.is_mutable:
            results = tensors[:1]
            tensors = tensors[1:] if name in OVERWRITING else tensors
        count = flop_registry.get(func.overloadpacket)
        flops = count(*args, **kwargs, out_val=out) if count else 0
        sources, targets = ([self.storages.buffer(t) for t in group] for group in (tensors, results))
        storages = frozenset(buffer.storage for buffer in targets)
        self.steps.append(Operator(name, unique_bytes(sources), unique_bytes(targets), flops, storages))


@contextlib.contextmanager
def _as_on_cuda() -> Iterator[None]:
    """Fake CPU tensors take the paths of real CUDA ones (PyTorch's CPU build cannot make fake CUDA tensors)."""

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(FakeTensor, "is_cuda", property(lambda _: True), create=True))
        stack.enter_context(mock.patch.object(FakeTensor, "is_cpu", property(lambda _: False), create=True))
        stack.enter_context(mock.patch.object(call, "is_plain", return_value=True))
        stack.enter_context(mock.patch.object(gpu, "description", return_value=None))
        stack.enter_context(mock.patch.object(environment, "REQUEST", "triton"))
        # Weights without values are folded once, as real ones are.
        stack.enter_context(mock.patch.object(whole_runs, "_are_plain", return_value=True))
        stack.enter_context(mock.patch.object(sequence, "signature", return_value=([], [])))
        yield


def _noting(tensors: list[torch.Tensor]) -> Callable[[Step], tuple]:
    """`folded_weights.folded`, which also appends its results to ``tensors``."""

    def call(step: Step) -> tuple:
        made = folded_weights.folded(step)
        tensors.extend(tensor for tensor in made if tensor is not None)
        return made

    return call


def record(
    variant: str,
    dtype: torch.dtype,
    *,
    mode: str,
    recompute: int = 1,
    target: str = "sm_90",
    batch: int = 128,
    side: int = 224,
    drop_path: float = 0.0,
    autocast: torch.dtype | None = None,
    shallow: bool = False,
) -> Recording:
    """What `ConvNext` with parameters and images in ``dtype`` launches on ``target``.

    Args:
        variant: one of ``config.VARIANTS``.
        mode: "inference" (frozen, no gradients) or "training" (forward and backward down to the parameters, without
            the loss and without the optimiser; ``drop_path`` is the drop-path rate of the last block).
        recompute: 0, 1 or 2: what the backward recomputes.
        target: one of ``targets.TARGETS``.
        batch, side: number of images, and their height and width in pixels.
        autocast: the dtype of autocast around the forward, or None for no autocast. With it, PyTorch's own operators
            run in the dtypes that a CPU's autocast gives them.
        shallow: at most three blocks per stage, or four in two groups if a stage has more than one group. The kernels
            are those of the whole model: of a stage's blocks only the first can have a drop-path rate of 0, and under
            autocast the first and the last of a group differ in the dtype of x and in the copy of y.

    Raises:
        ValueError: ``mode`` is not one of ``MODES``.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}: expected one of {', '.join(MODES)}")
    depths = VARIANTS[variant][0]
    depths = [min(depth, 3 + (depth > block_group.MOST)) for depth in depths] if shallow else depths
    config = ConvNextConfig.from_variant(variant, depths=depths, drop_path_rate=drop_path)
    model = ConvNext(config, device="meta", dtype=dtype)
    model.recompute = recompute
    recorder = _Recorder()
    saved: list[Buffer] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            saved.append(recorder.storages.buffer(tensor))
        return tensor

    with contextlib.ExitStack() as stack:
        stack.enter_context(_as_on_cuda())
        stack.enter_context(mock.patch.object(block_group, "MOST", 3 if shallow else block_group.MOST))
        stack.enter_context(planned_for(target))
        stack.enter_context(mock.patch.object(torch.library, "wrap_triton", recorder.wrap))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model.to_empty(device="cpu")
        image = torch.empty(batch, model.config.num_channels, side, side, dtype=dtype)
        casting = torch.autocast("cpu", autocast, enabled=autocast is not None)
        if mode == "inference":
            model.freeze()
            with mock.patch.object(sequence, "folded", _noting(folded := [])), torch.inference_mode(), casting:
                model(image)
            recorder.steps.clear()
            with recorder, torch.inference_mode(), casting:
                model(image)
            given = (*model.parameters(), *model.buffers(), *folded, image)
            return Recording(recorder.steps, 0, batch, recorder.numbers(given))
        model.train()
        given = recorder.numbers((*model.parameters(), image))
        with recorder:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), casting:
                logits = model(image)
            logits.backward(torch.empty_like(logits))
    kept = unique_bytes(buffer for buffer in saved if buffer.storage not in given)
    return Recording(recorder.steps, kept, batch, given)


def unique(recording: Recording, target: str) -> dict[str, tuple[Specialised, list[Launch]]]:
    """The kernels that Triton compiles for a recording on ``target``, each with its launches, by key."""
    found: dict[str, tuple[Specialised, list[Launch]]] = {}
    for launch in recording.launches:
        specialised = specialise(launch, target)
        found.setdefault(specialised.key, (specialised, []))[1].append(launch)
    return found
