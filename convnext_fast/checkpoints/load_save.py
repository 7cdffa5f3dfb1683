"""Loading and saving models in any of the four formats, completely or not at all."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import ConvNextConfig
from ..files import json_writer, local_path, write_files
from .config_json import SavedConfig, config_fields, read_config, warn_of_losses
from .formats import from_sparse, from_timm, infer_config, recognise, to_timm
from .matching import Checkpoint, Loadable, fit
from .tensor_files import (
    INDEX,
    SAFETENSORS,
    WEIGHT_SUFFIXES,
    read_weights,
    size_in_bytes,
    tensor_writers,
)

Model = TypeVar("Model", bound=Loadable)


def load_checkpoint(source: str | Path, *, use_ema: bool = False, config: ConvNextConfig | None = None) -> Checkpoint:
    """Read the tensors and the configuration of a folder, a file or a Hugging Face hub id.

    Tensors and configuration are not yet compared: `matching.fit` does that.

    Args:
        source: folder or hub id with weights and, unless ``config`` is given, a ``config.json`` (of transformers, timm
            or `save_model`); or file (.safetensors, .bin, .pth, .pt, or the index of shards), whose configuration is
            inferred from the shapes.
        use_ema: take the averaged weights out of a training checkpoint.
        config: to be used instead of the checkpoint's.

    Raises:
        FileNotFoundError: there is no such source, no weights or no configuration in it, or a shard is missing.
        ValueError: a file is damaged or would run code; or it holds another architecture.
        ImportError: a hub id was given and huggingface_hub is not installed.
    """
    if config is not None and not isinstance(config, ConvNextConfig):
        raise TypeError(f"config is a {type(config).__name__}: expected a convnext_fast.ConvNextConfig")
    path = local_path(source)
    bare = path.is_file() or path.suffix in WEIGHT_SUFFIXES
    saved = SavedConfig(config, {}) if bare or config is not None else read_config(source)
    tensors = read_weights(source, use_ema=use_ema)
    try:
        tensors = from_sparse(tensors)
        format = recognise(tensors)
        named, extra = to_timm(tensors, format)
        if saved.config is None:
            config = infer_config(named, format)
            if len(saved.amendments.get("id2label", ())) != config.num_labels:
                saved.amendments.pop("id2label", None)
            config = config.amended(**saved.amendments)
        else:
            config = saved.config
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None
    return Checkpoint(named, config, format, extra, "norm_pre.weight" in named, saved.global_pool)


def load_model(
    cls: type[Model],
    source: str | Path,
    *,
    config: ConvNextConfig | None = None,
    num_labels: int | None = None,
    ignore_mismatched_sizes: bool = False,
    use_ema: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> Model:
    """A model of class ``cls`` with the weights of a checkpoint, in evaluation mode.

    Every parameter comes from the checkpoint and every tensor of the checkpoint has its place, except: a model without
    a classifier or final norm leaves the checkpoint's out, as every model does the decoder of V2's sparse pre-training;
    and a classifier, a backbone's ``hidden_states_norms``, or (with no classifier either) a final norm that the
    checkpoint lacks is newly initialised, with a warning.

    Args:
        cls: ``ConvNext`` or one of the transformers-named models.
        source: folder, file or hub id, as for `load_checkpoint`.
        config: instead of the checkpoint's configuration.
        num_labels: another number of classes than the configuration's.
        ignore_mismatched_sizes: initialise a new classifier, with a warning, if the checkpoint's has another size.
        use_ema: take the averaged weights out of a training checkpoint.
        device: of the parameters; None is the CPU.
        dtype: of the parameters, or its name; None and "auto" keep the checkpoint's (the widest, where it mixes them).
        **options: arguments of ``cls``, such as ``fused``; fields of `ConvNextConfig`, in the place of the
            checkpoint's; and under transformers' names ``torch_dtype`` for ``dtype`` and ``device_map`` for ``device``.

    Raises:
        FileNotFoundError, ImportError: as `load_checkpoint`.
        ValueError: as `load_checkpoint`; or the checkpoint does not fit the model, with all keys that are missing,
            unexpected or of a wrong shape.
    """
    if not (isinstance(cls, type) and hasattr(cls, "checkpoint_format")):
        raise TypeError(f"cls is {cls!r}: expected a model class of convnext_fast")
    model_options, fields = _sorted_options(cls, options)
    dtype = _dtype(dtype if options.get("torch_dtype") is None else options["torch_dtype"])
    device = _device(options.get("device_map"), device)
    checkpoint = load_checkpoint(source, use_ema=use_ema, config=config)
    config = checkpoint.config
    if num_labels is not None and (num_labels != config.num_labels or "id2label" in fields):
        fields = {"num_labels": num_labels} | fields
    if fields:
        config = config.amended(**fields)
    version = getattr(cls, "config_class", type(config)).version  # `ConvNext` is both
    if config.version != version:
        raise ValueError(f"{source} holds a ConvNeXt V{config.version}: expected V{version} for {cls.__name__}")
    if cls.checkpoint_format == "timm":
        own = {"head_norm_first": checkpoint.head_norm_first, "global_pool": checkpoint.global_pool}
        model_options = own | model_options
    model = cls(config, device="meta", dtype=dtype, **model_options)
    state, new = fit(model, checkpoint, str(source), ignore_mismatched_sizes=ignore_mismatched_sizes)
    dtype = dtype or _common_dtype(state.values())
    # Tensors of a mapped file are copied: they would change with the file, and are not aligned, which changes sums.
    filled = {
        name: torch.empty(skeleton.shape, dtype=dtype, device=device)
        if state[name] is None
        else state[name].to(device=device, dtype=dtype, copy=True)
        for name, skeleton in model.state_dict().items()
    }
    model.load_state_dict(filled, strict=True, assign=True)
    for name in dict.fromkeys(name.rpartition(".")[0] for name in new):
        model.initialise(model.get_submodule(name))
    return model.eval()


def save_model(
    model: Loadable,
    directory: str | Path,
    *,
    format: str | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write ``config.json`` and ``model.safetensors`` into a folder, each file atomically.

    Args:
        model: any model of this package.
        directory: made if it is missing.
        format: one of ``formats.FORMATS``; None is the model's own.
        max_shard_size: in the transformers format, weights beyond this many bytes are split into several files.

    Raises:
        TypeError: the model is not one of this package.
        ValueError: the format is unknown, or cannot hold the model.
    """
    if isinstance(model, type) or not hasattr(model, "checkpoint_format"):
        raise TypeError(
            f"model is a {type(model).__name__}: expected a model of convnext_fast (of a wrapped one, the model within)"
        )
    tensors, own = model.state_dict(), model.checkpoint_format
    pool = getattr(getattr(model, "head", None), "pool_type", "avg")
    options = {"head_norm_first": "norm_pre.weight" in tensors, "global_pool": pool}
    if format is not None and format != own:
        named, extra = to_timm(tensors, own)
        tensors = from_timm(named, format, extra, pool)
    write_folder(Path(directory), model.config, format or own, tensors, options, max_shard_size)


def _sorted_options(cls: type, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of ``cls`` among the options, and the fields of a configuration."""
    of_model, of_config = ({*inspect.signature(kind).parameters} for kind in (cls, ConvNextConfig))
    fields = (of_config - of_model - {"extra"}) | {"output_hidden_states", "return_dict"}
    unknown = options.keys() - of_model - fields - {"torch_dtype", "device_map"}
    if unknown:
        raise TypeError(
            f"from_pretrained got {', '.join(sorted(unknown))}: expected arguments of {cls.__name__}, "
            f"{', '.join(sorted(of_model))}, or fields of its configuration"
        )
    return tuple({name: options[name] for name in options if name in kind} for kind in (of_model, fields))


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = None if dtype == "auto" else getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if found is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise TypeError(f"dtype is {dtype!r}: expected a floating torch.dtype, or None to keep the checkpoint's")
    return found


def _device(device_map: Any, device: torch.device | str | None) -> torch.device | str | int | None:
    if device_map is None:
        return device
    if isinstance(device_map, Mapping) and list(device_map) == [""]:
        device_map = device_map[""]
    if isinstance(device_map, (str, int, torch.device)) and device_map not in ("auto", "balanced", "sequential"):
        return device_map
    raise ValueError(f"device_map is {device_map!r}: expected the one device of the whole model")


def _common_dtype(tensors: Any) -> torch.dtype:
    """The narrowest dtype that can represent all of them."""
    dtypes = list(dict.fromkeys(tensor.dtype for tensor in tensors if tensor is not None))
    try:
        found = functools.reduce(torch.promote_types, dtypes)
        if found.itemsize > 1:
            return found
        raise ValueError(f"the checkpoint is of {found}, in which PyTorch cannot compute: pass dtype= to choose")
    except RuntimeError:
        raise ValueError(f"the checkpoint mixes {', '.join(map(str, dtypes))}: pass dtype= to choose") from None


def write_folder(
    directory: Path,
    config: ConvNextConfig,
    format: str,
    tensors: dict[str, Tensor],
    options: Mapping[str, Any],
    max_shard_size: int | str,
) -> None:
    """Write ``config.json`` and the weights into a folder, which is made if it is missing, each file atomically.

    Weights of an earlier save there are removed. ``options``: ``head_norm_first`` and ``global_pool`` of a timm model.
    """
    limit = size_in_bytes(max_shard_size)
    warn_of_losses(config, format, with_config=True)
    dtype = str(_common_dtype(tensors.values())).removeprefix("torch.")
    writers = tensor_writers("model", tensors, limit if format == "transformers" else math.inf)
    writers["config.json"] = json_writer(config_fields(config, format, tensors, dtype, options))
    directory = local_path(directory)
    write_files(directory, writers, _stale(directory, writers))


def _stale(directory: Path, written: Mapping[str, Any]) -> list[str]:
    """Weights of an earlier save in the folder, which a reader could mistake for the new ones."""
    pattern = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    weights = [name for name in names if name in (SAFETENSORS, INDEX) or pattern.fullmatch(name)]
    return [name for name in weights if name not in written]
