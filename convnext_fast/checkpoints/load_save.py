"""Loading and saving models in any of the four formats."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import ConvNextConfig
from ..files import json_writer, local_path, write_files
from ..huggingface.hub import ANYWHERE, Loading, split_loading
from .config_json import SavedConfig, config_fields, read_config, warn_of_lost_fields
from .formats import from_sparse, from_timm, infer_config, recognise, to_timm
from .loading_options import sorted_options, spread
from .matching import Checkpoint, Loadable, config_for, match_tensors
from .tensor_files import WEIGHT_SUFFIXES, read_weights, with_variant
from .weight_files import part_writers, pickle_writer, safetensors_writer, size_in_bytes, stale_files

Model = TypeVar("Model", bound=Loadable)


def load_checkpoint(
    source: str | Path | None,
    *,
    use_ema: bool = False,
    config: Any = None,
    loading: Loading = ANYWHERE,
    state_dict: Mapping[str, Tensor] | None = None,
) -> Checkpoint:
    """Read the tensors and the configuration of a folder, a file or a Hugging Face hub id.

    Tensors and configuration are not yet compared: `matching.match_tensors` does that.

    Args:
        source: folder or hub id with weights and, unless ``config`` is given, a ``config.json`` (of transformers, timm
            or `save_model`); or file (.safetensors, .bin, .pth, .pt, .h5, or the index of shards), whose configuration
            is inferred from the shapes. None if ``state_dict`` is given.
        use_ema: take the averaged weights out of a training checkpoint.
        config: used instead of the checkpoint's: a configuration of this package or of transformers, or its path.
        loading: where to look.
        state_dict: tensors to use instead of those of ``source``, in any of the formats.

    Raises:
        FileNotFoundError: there is no such source, no weights or no configuration in it, or a shard is missing.
        ValueError: a file is damaged or would run code; or it holds another architecture.
        ImportError: a hub id was given and huggingface_hub is not installed.
    """
    config = None if config is None else _own_config(config, loading)
    bare = source is None or local_path(source).is_file() or local_path(source).suffix in WEIGHT_SUFFIXES
    saved = SavedConfig(config, {}) if bare or config is not None else read_config(source, loading)
    if state_dict is not None:
        tensors: Mapping[str, Tensor] = state_dict
    elif source is None:
        raise TypeError("source is None: expected a path or a Hugging Face hub id, or a state_dict")
    else:
        tensors = read_weights(source, use_ema=use_ema, loading=loading)
    try:
        tensors = from_sparse(tensors)
        format = recognise(tensors)
        named, extra = to_timm(tensors, format)
        if saved.config is None:
            config = infer_config(named, format)
            if len(saved.overrides.get("id2label", ())) != config.num_labels:
                saved.overrides.pop("id2label", None)
            config = config.amended(**saved.overrides)
        else:
            config = saved.config
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source or 'state_dict'}: {error}") from None
    config.name_or_path = source or ""
    return Checkpoint(named, config, format, extra, "norm_pre.weight" in named, saved.global_pool)


def _own_config(config: Any, loading: Loading) -> ConvNextConfig:
    if isinstance(config, (str, Path)):
        return ConvNextConfig.from_pretrained(config, **loading._asdict())
    if isinstance(config, ConvNextConfig):
        return config.amended()
    if hasattr(config, "to_dict") and getattr(config, "model_type", None) in ConvNextConfig.kinds:
        return ConvNextConfig.from_dict(config.to_dict())
    raise TypeError(f"config is a {type(config).__name__}: expected a convnext_fast.ConvNextConfig")


def load_model(
    cls: type[Model],
    source: str | Path | None,
    *,
    config: Any = None,
    num_labels: int | None = None,
    ignore_mismatched_sizes: bool = False,
    use_ema: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    output_loading_info: bool = False,
    **options: Any,
) -> Any:
    """A model of class ``cls`` with the weights of a checkpoint, in evaluation mode.

    Every parameter comes from the checkpoint and every tensor of the checkpoint is used, with these exceptions. A model
    without a classifier or final norm ignores the checkpoint's, and every model the decoder of V2's sparse
    pre-training. A classifier, a backbone's ``hidden_states_norms``, or (with no classifier either) a final norm that
    the checkpoint lacks is newly initialised, with a warning.

    Args:
        cls: ``ConvNext`` or one of the transformers-named models.
        source, use_ema, config, state_dict: as for `load_checkpoint`.
        num_labels: another number of classes than the configuration's.
        ignore_mismatched_sizes: newly initialise, with a warning, what has another size in the checkpoint.
        device: of the parameters; None is PyTorch's default device.
        dtype: of the parameters, or its name; None and "auto" keep the checkpoint's (of several, the widest).
        output_loading_info: return (model, dictionary of ``missing_keys``, ``unexpected_keys``, ``mismatched_keys``
            and ``error_msgs``), as transformers does.
        **options: arguments of ``cls``, such as ``fused``; fields of `ConvNextConfig`, to replace the
            checkpoint's; those of `hub.Loading`; and under transformers' names ``torch_dtype`` for ``dtype``, and
            ``device_map``: a device, "auto", or devices by module (through accelerate, with ``max_memory``).

    Raises:
        FileNotFoundError, ImportError: as `load_checkpoint`.
        ValueError: as `load_checkpoint`; an option asks for something unsupported; or the checkpoint does not fit the
            model. The message lists all keys that are missing, unexpected or of a wrong shape.
    """
    if not (isinstance(cls, type) and hasattr(cls, "checkpoint_format")):
        raise TypeError(f"cls is {cls!r}: expected a model class of convnext_fast")
    loading, options = split_loading(options)
    chosen = sorted_options(cls, options, dtype, device)
    checkpoint = load_checkpoint(source, use_ema=use_ema, config=config, loading=loading, state_dict=state_dict)
    config = config_for(cls, checkpoint.config, chosen.fields, num_labels, source)
    model_options = chosen.model
    if cls.checkpoint_format == "timm":
        own = {"head_norm_first": checkpoint.head_norm_first, "global_pool": checkpoint.global_pool}
        model_options = own | model_options
    if "device" in inspect.signature(cls).parameters:
        model = cls(config, device="meta", dtype=chosen.dtype, **model_options)
    else:  # a user's subclass, in transformers' style
        with torch.device("meta"):
            model = cls(config, **model_options)
    name = "state_dict" if source is None else str(source)
    found = match_tensors(model, checkpoint, name, ignore_mismatched_sizes=ignore_mismatched_sizes)
    dtype = config.dtype = chosen.dtype or _common_dtype(found.state.values())
    # Tensors of a mapped file are copied: they would change with the file, and are not aligned, which changes sums.
    filled = {
        name: torch.empty(skeleton.shape, dtype=dtype, device=chosen.device)
        if found.state[name] is None
        else found.state[name].to(device=chosen.device, dtype=dtype, copy=True)
        for name, skeleton in model.state_dict().items()
    }
    model.load_state_dict(filled, strict=True, assign=True)
    for name in found.new:
        model.initialise(name)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # or the post_init of a model of transformers that holds it overwrites it
    model.eval()
    if chosen.device_map is not None:
        spread(model, chosen.device_map, chosen.max_memory)
    return (model, found.info()) if output_loading_info else model


def save_model(
    model: Loadable,
    directory: str | Path,
    *,
    format: str | None = None,
    max_shard_size: int | str = "5GB",
    state_dict: Mapping[str, Tensor] | None = None,
    safe_serialization: bool = True,
    variant: str | None = None,
) -> None:
    """Write ``config.json`` and ``model.safetensors`` into a folder, each file atomically.

    Args:
        model: any model of this package.
        directory: made if it is missing.
        format: one of ``formats.FORMATS``; None is the model's own.
        max_shard_size: in the transformers format, weights beyond this many bytes are split into several files.
        state_dict: tensors instead of the model's, under its names.
        safe_serialization: False writes ``pytorch_model.bin``.
        variant: such as "fp16", for ``model.fp16.safetensors``.

    Raises:
        TypeError: the model is not one of this package.
        ValueError: the format is unknown, or cannot hold the model; or ``directory`` is a file.
    """
    if isinstance(model, type) or not hasattr(model, "checkpoint_format"):
        raise TypeError(
            f"model is a {type(model).__name__}: expected a model of convnext_fast (of a wrapper, the model inside)"
        )
    tensors, own = dict(model.state_dict() if state_dict is None else state_dict), model.checkpoint_format
    pool = getattr(getattr(model, "head", None), "pool_type", "avg")
    options = {"head_norm_first": "norm_pre.weight" in tensors, "global_pool": pool}
    if format is not None and format != own:
        named, extra = to_timm(tensors, own)
        tensors = from_timm(named, format, extra, pool)
    files = {"max_shard_size": max_shard_size, "safe_serialization": safe_serialization, "variant": variant}
    write_folder(directory, model.config, format or own, tensors, options, **files)


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
    directory: str | Path,
    config: ConvNextConfig,
    format: str,
    tensors: dict[str, Tensor],
    options: Mapping[str, Any],
    max_shard_size: int | str = "5GB",
    safe_serialization: bool = True,
    variant: str | None = None,
) -> None:
    """Write ``config.json`` and the weights into a folder, see `save_model`; weights of an earlier save are removed.

    ``options``: ``head_norm_first`` and ``global_pool`` of a timm model.
    """
    directory = local_path(directory)
    if directory.is_file():
        raise ValueError(f"directory {directory} is a file: expected a folder")
    warn_of_lost_fields(config, format, with_config=True)
    found = _common_dtype(tensors.values()) if tensors else config.dtype or torch.get_default_dtype()
    dtype = str(found).removeprefix("torch.")
    safe, pickled = (with_variant(name, variant) for name in ("model.safetensors", "pytorch_model.bin"))
    file, write = (safe, safetensors_writer) if safe_serialization else (pickled, pickle_writer)
    limit = size_in_bytes(max_shard_size)
    writers = part_writers(tensors, limit if format == "transformers" else math.inf, file, write)
    writers["config.json"] = json_writer(config_fields(config, format, tensors, dtype, options))
    write_files(directory, writers, stale_files(directory, {safe, file}, writers))
