"""Matching the tensors of a checkpoint to those of a model, with an error that says what does not fit."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..config import ConvNextConfig
from .formats import BACKBONE_NORMS, rename

_CLASSIFIER = "head.fc"
_FINAL_NORMS = frozenset(("head.norm", "norm_pre"))
_LISTED = 20


class Checkpoint(NamedTuple):
    """A checkpoint, read and translated."""

    state_dict: dict[str, Tensor]  # under timm's names, on the CPU, memory-mapped if the file allows it
    config: ConvNextConfig
    format: str  # how it was written, one of ``formats.FORMATS``
    extra: dict[str, Tensor]  # what timm has no name for, such as a transformers backbone's ``hidden_states_norms``
    head_norm_first: bool  # whether its last norm comes before the pooling (timm's ``norm_pre``)
    global_pool: str = "avg"


class Loadable(Protocol):
    """A model that checkpoints are loaded into and saved from: a `torch.nn.Module` with these.

    checkpoint_format: one of ``formats.FORMATS``, whose names its parameters have.
    """

    checkpoint_format: str
    config: ConvNextConfig

    def initialise(self, name: str) -> None:
        """Give one of its parameters the values that a new model starts with."""

    def state_dict(self) -> dict[str, Any]:
        """As of `torch.nn.Module`."""


class Fit(NamedTuple):
    """The tensors of a checkpoint that go into a model."""

    state: dict[str, Tensor | None]  # under the model's names; None for what is newly initialised
    missing: list[str]  # the model's names that the checkpoint lacks
    unexpected: list[str]  # the checkpoint's names that the model lacks
    resized: dict[str, tuple[Any, Any]]  # different shapes in the checkpoint and in the model

    @property
    def new(self) -> list[str]:
        """The parameters that are newly initialised."""
        return [*self.missing, *self.resized]

    def info(self) -> dict[str, Any]:
        """What transformers returns with ``output_loading_info``."""
        mismatched = {(name, *shapes) for name, shapes in self.resized.items()}
        found = {"missing_keys": set(self.missing), "unexpected_keys": set(self.unexpected)}
        return {**found, "mismatched_keys": mismatched, "error_msgs": []}


def config_for(
    cls: type, config: ConvNextConfig, fields: dict[str, Any], num_labels: int | None, source: Any
) -> ConvNextConfig:
    """A checkpoint's configuration with other fields; refuses that of V1 for a class of V2, and the other way round."""
    if num_labels is not None and (num_labels != config.num_labels or "id2label" in fields):
        fields = {"num_labels": num_labels} | fields
    config = config.amended(**fields) if fields else config
    version = getattr(cls, "config_class", type(config)).version  # `ConvNext` is both
    if config.version != version:
        raise ValueError(f"{source} holds a ConvNeXt V{config.version}: expected V{version} for {cls.__name__}")
    return config


def match_tensors(
    model: Loadable, checkpoint: Checkpoint, source: str, *, ignore_mismatched_sizes: bool = False
) -> Fit:
    """The checkpoint's tensors under the model's names.

    Only the names and shapes of ``model`` matter, so it may be on the meta device. ``source``: the checkpoint's, for
    messages. See `load_model`.
    """
    cls, format = type(model).__name__, model.checkpoint_format
    expected = model.state_dict()
    names = {rename(name, format, "timm") or name: name for name in expected}
    state = {**checkpoint.state_dict, **checkpoint.extra}
    fresh, spare = _optional(_layers(names), _layers(state))
    norms = _layers(names) & _FINAL_NORMS
    if checkpoint.head_norm_first and "head.norm" in norms:
        raise ValueError(f"the checkpoint normalises before pooling (norm_pre), {cls} as it is built after pooling")
    if checkpoint.global_pool == "max" and norms and format != "timm":
        raise ValueError(f"the checkpoint uses max pooling, {cls} average pooling")
    if getattr(model, "features_only", False):
        kept = tuple(f"stages.{i}." for i in range(len(model.stages)))
        spare |= {layer for layer in _layers(state) if layer.startswith("stages.") and not layer.startswith(kept)}
    if format == "transformers":  # whose parameters of a global response norm are (1, 1, 1, K), not (K,)
        state |= {name: t[None, None, None] for name, t in state.items() if ".grn." in name and t.dim() == 1}
    dropped = [name for name in state if _layer(name) in spare]
    new = [name for name in names if _layer(name) in fresh]
    for name in dropped:
        del state[name]

    wrong, resized = {}, {}
    for name, own in names.items():
        if name in state and not state[name].is_floating_point():
            wrong[name] = f"{own} of {state[name].dtype}, expected a floating dtype"
        elif name in state and state[name].shape != expected[own].shape:
            resized[name] = state[name].shape, expected[own].shape
    changes = {n: f"{names[n]} {tuple(held)}, expected {tuple(wanted)}" for n, (held, wanted) in resized.items()}
    if not ignore_mismatched_sizes:
        wrong |= changes
    problems = {
        "missing": [own for name, own in names.items() if name not in state and name not in new],
        "unexpected": [rename(name, "timm", format) or name for name in state if name not in names],
        "of a wrong shape": list(wrong.values()),
    }
    if any(problems.values()):
        lines = [f"{source} does not fit {cls}; under the model's names:"]
        lines += [f"  {len(keys)} {kind}: {_listed(keys)}" for kind, keys in problems.items() if keys]
        if wrong and {_layer(name) for name in wrong} == {_CLASSIFIER}:
            lines.append("for another number of classes pass num_labels= and ignore_mismatched_sizes=True")
        raise ValueError("\n".join(lines))
    unexpected = [rename(name, "timm", checkpoint.format) or name for name in dropped]
    if resized:
        text = _listed(list(changes.values()))
        warnings.warn(f"{cls} newly initialises what has another size in {source}: {text}", stacklevel=4)
    if new:
        text = f"{cls} newly initialises {_listed([names[n] for n in new])}, which {source} does not hold"
        left = f"; {_listed(unexpected)} of the checkpoint are not used" if dropped else ""
        warnings.warn(text + left, stacklevel=4)
    found = {own: None if name in new or name in resized else state[name] for name, own in names.items()}
    return Fit(found, [names[name] for name in new], unexpected, {names[n]: shapes for n, shapes in resized.items()})


def _optional(wanted: set[str], held: set[str]) -> tuple[set[str], set[str]]:
    """The layers that may be newly initialised, and those that may be dropped, of those expected and held."""
    may_start = {layer for layer in wanted if layer.startswith(BACKBONE_NORMS)} | {_CLASSIFIER}
    may_go = {layer for layer in held if layer.startswith(BACKBONE_NORMS)} | {_CLASSIFIER}
    if not held & (_FINAL_NORMS | {_CLASSIFIER}):
        may_start |= _FINAL_NORMS
    if not wanted & _FINAL_NORMS:
        may_go |= _FINAL_NORMS
    return may_start & (wanted - held), may_go & (held - wanted)


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _layers(names: Iterable[str]) -> set[str]:
    return set(map(_layer, names))


def _listed(keys: Sequence[str]) -> str:
    more = f", … and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + more
