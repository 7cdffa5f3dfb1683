"""Training steps as CUDA graphs: `graphed`."""

from __future__ import annotations

import operator
import types
import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .freezing import is_frozen
from .layer_changes import has_hooks

Model = TypeVar("Model", bound=nn.Module)
_values = dict.values


def graphed(model: Model, example: Tensor) -> Model:
    """Make the forward and the backward pass of ``model`` run as one CUDA graph each, and return the model.

    For training on an NVIDIA GPU with batches so small that the GPU waits for the CPU::

        model = fuse(model.cuda().train()).model
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            graphed(model, images)
        for images, labels in loader:
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    It calls the model on ``example`` a few times and captures with `torch.cuda.make_graphed_callables`. Weights and
    gradients do not change. The graphs keep the present autocast state. Drop path drops different samples in each
    replay: a graph registers its device's random generator, and each replay advances it. Gradient accumulation,
    GradScaler and optimizers work as before. Wrap the model in DistributedDataParallel afterwards. Call backward before
    the next forward, because the two graphs share memory.

    Calls in evaluation mode, and with inputs unlike ``example``, run without a graph. So do copies and pickles of the
    model. After a parameter is moved, replaced, frozen or unfrozen, the next call warns, and all calls run without a
    graph: call `graphed` again.

    Args:
        model: in training mode, on a CUDA device; takes one tensor. Modules in it may be fused. Every parameter with
            ``requires_grad`` has to be used.
        example: a tensor with the shape, dtype and ``requires_grad`` of the batches. Its values do not matter.

    Raises:
        TypeError: ``model`` is not a module, or ``example`` is not a tensor.
        ValueError: the model is not as above, has hooks inside, or is frozen; ``example`` is on another device; or
            autocast caches weights.
    """
    _check(model, example)
    _forget(model)
    plain, by_graph = model.forward, _capture(model, example)
    model.forward = _Forward(model, plain, by_graph, example)
    return model


def _capture(model: nn.Module, example: Tensor) -> Callable:
    plain, outputs = model.forward, []

    def forward(x: Tensor) -> Any:
        result = tree_map_only(Tensor, lambda y: y.clone() if y._is_view() else y, plain(x))
        outputs[:] = tree_leaves(result)
        return result

    model.forward = forward
    try:
        torch.cuda.make_graphed_callables(model, (example,))
        by_graph = model.forward
    finally:
        del model.forward
        if plain != model.forward:
            model.forward = plain
    for output in outputs:
        # Otherwise the captured nodes stay alive, and later backward passes accumulate gradients on the capture stream.
        if isinstance(output, Tensor):
            output.detach_()
    return by_graph


class _Forward:
    """The forward of a graphed model. A copy or a pickle of the model gets the forward of its class."""

    def __init__(self, model: nn.Module, plain: Callable, by_graph: Callable, example: Tensor):
        self._model, self._plain, self._by_graph = model, plain, by_graph
        self._kind = _kind_of(example)
        self._holders = [d for m in model.modules() for d in (m._parameters, m._modules)]
        self._parameters = list(model.parameters())
        self._seen = self._state()
        self._own: list[Tensor | None] = [None] * len(self._parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        takes = self._model.training and len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        if not takes or _kind_of(args[0]) != self._kind or torch.cuda.is_current_stream_capturing():
            return self._plain(*args, **kwargs)
        (held, *others), (seen, *before) = self._state(), self._seen
        if len(held) != len(seen) or not all(map(operator.is_, held, seen)) or others != before:
            _forget(self._model)
            reason = f"the CUDA graphs of {type(self._model).__name__} are dropped: its layers or parameters changed"
            warnings.warn(reason, RuntimeWarning, stacklevel=3)
            return self._plain(*args)
        self._keep_gradients()
        return tree_map_only(Tensor, Tensor.clone, self._by_graph(*args))

    def _state(self) -> list[list]:
        held = list(chain.from_iterable(map(_values, self._holders)))
        addresses = list(map(Tensor.data_ptr, self._parameters))
        return [held, addresses, [p.requires_grad for p in self._parameters]]

    def _keep_gradients(self) -> None:
        """Copy gradients out of the graph's memory: autograd leaves them there, and the next replay overwrites it."""
        for i, parameter in enumerate(self._parameters):
            gradient = parameter.grad
            if gradient is not None and gradient is not self._own[i]:
                gradient = parameter.grad = gradient.clone()
            self._own[i] = gradient

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable:
        return _forward_of(memo[id(self._model)])

    def __reduce__(self) -> Any:
        return _forward_of, (self._model,)


def _forward_of(model: nn.Module) -> Callable:
    return types.MethodType(type(model).forward, model)


def _forget(model: nn.Module) -> None:
    """Undo `graphed`, if it was called."""
    forward = vars(model).get("forward")
    if isinstance(forward, _Forward):
        del model.forward
        if forward._plain != model.forward:
            model.forward = forward._plain


def _kind_of(x: Tensor) -> tuple:
    return x.shape, x.dtype, x.device, x.requires_grad


def _check(model: Any, example: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: expected a torch.nn.Module")
    if not isinstance(example, Tensor):
        raise TypeError(f"example is a {type(example).__name__}: expected a tensor")
    for name, module in model.named_modules():
        where = name or "the model itself"
        if is_frozen(module):
            raise ValueError(f"{where} is frozen: expected a model to train (see unfreeze)")
        if has_hooks(module):
            raise ValueError(f"hooks on {where}, which a graph does not call: expected none (register them afterwards)")
    if not model.training:
        raise ValueError("the model is in evaluation mode: expected model.train()")
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) != 1 or not devices[0].startswith("cuda"):
        raise ValueError(f"the model is on {', '.join(devices) or 'no device'}: expected one CUDA device")
    if str(example.device) != devices[0]:
        raise ValueError(f"example is on {example.device}: expected the model's {devices[0]}")
    if torch.is_autocast_enabled("cuda") and torch.is_autocast_cache_enabled():
        raise ValueError("autocast caches converted weights: expected torch.autocast(…, cache_enabled=False)")
