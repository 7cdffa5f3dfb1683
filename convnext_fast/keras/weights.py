"""Checkpoints of the Keras models, loaded from every format and saved as by transformers 4."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import torch
from torch import Tensor

from ..checkpoints.config_json import config_fields, warn_of_lost_fields
from ..checkpoints.load_save import load_checkpoint
from ..checkpoints.loading_options import sorted_options
from ..checkpoints.matching import config_for, match_tensors
from ..checkpoints.tensorflow import MODEL_H5, h5_part_writer, h5_writer, to_tensorflow
from ..checkpoints.weight_files import part_writers, safetensors_writer, size_in_bytes, stale_files
from ..files import json_writer, local_path, write_files
from ..huggingface.hub import split_loading
from .fused import ON_TORCH, order_of

SAFETENSORS = "model.safetensors"


def load_pretrained(
    cls: type,
    pretrained_model_name_or_path: str | Path,
    *,
    config: Any = None,
    num_labels: int | None = None,
    ignore_mismatched_sizes: bool = False,
    use_ema: bool = False,
    from_pt: bool = False,
    output_loading_info: bool = False,
    **options: Any,
) -> Any:
    """A model of class ``cls`` with the weights of a checkpoint; arguments and errors as in `load_save.load_model`.

    Args:
        cls: one of the TFConvNext classes.
        pretrained_model_name_or_path: folder, file or hub id: transformers' of TensorFlow (h5, safetensors, in parts)
            and PyTorch, timm's, torchvision's, the official repository's, or an .h5 file of keras.applications.
        from_pt: has no effect: the format is recognised.
        **options: arguments of ``cls``, such as ``dtype``, a policy of Keras; fields of `ConvNextConfig`; and those of
            `hub.Loading`.

    Raises:
        ValueError: also for ``torch_dtype``, ``device_map`` and ``max_memory``, which only the PyTorch models have.
    """
    for name in ("torch_dtype", "device_map", "max_memory"):
        if options.get(name) is not None:
            raise ValueError(f"{name} is {options[name]!r:.80}: expected Keras's own dtype or device scope")
    source = pretrained_model_name_or_path
    loading, options = split_loading(options)
    chosen = sorted_options(cls, options, None)
    checkpoint = load_checkpoint(source, use_ema=use_ema, config=config, loading=loading)
    model = cls(config_for(cls, checkpoint.config, chosen.fields, num_labels, source), **chosen.model)
    named = list(_named(model))
    shapes = {name: torch.empty([v.shape[i] for i in order], device="meta") for name, order, v in named}
    # What `match_tensors` needs of a model; the `state_dict` of a Keras model on PyTorch has other names.
    skeleton = type(cls.__name__, (SimpleNamespace,), {})(
        checkpoint_format="transformers", config=model.config, state_dict=lambda: shapes
    )
    found = match_tensors(skeleton, checkpoint, str(source), ignore_mismatched_sizes=ignore_mismatched_sizes)
    for name, order, variable in named:
        value = found.state[name]
        if value is not None:
            value = value.float() if value.dtype == torch.bfloat16 else value  # NumPy has no bfloat16
            variable.assign(value.permute(*np.argsort(order)).numpy())
    return (model, found.info()) if output_loading_info else model


def save_pretrained(
    model: Any,
    save_directory: str | Path,
    *,
    safe_serialization: bool = False,
    saved_model: bool = False,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write ``config.json`` and the weights, in files that transformers 4 reads, into a folder, each file atomically.

    Args:
        model: a TFConvNext model.
        save_directory: made if it is missing; weights of an earlier save there are removed.
        safe_serialization: write ``model.safetensors`` instead of ``tf_model.h5``, with TensorFlow's names.
        saved_model: also write a program for TensorFlow as ``saved_model/1`` (TensorFlow and JAX backends).
        max_shard_size: weights beyond this many bytes, or such as "200MB", are split into several files.

    Raises:
        ValueError: ``max_shard_size`` is not a size, the model is quantised, h5 cannot hold its dtype, or PyTorch's
            backend is to write a SavedModel.
        ImportError: h5py is missing.
    """
    if saved_model and ON_TORCH:
        raise ValueError("saved_model: Keras writes a SavedModel on TensorFlow or JAX, not on PyTorch")
    state = state_of(model)
    warn_of_lost_fields(model.config, "transformers", with_config=True)
    limit, tensors = size_in_bytes(max_shard_size), to_tensorflow(state)
    if safe_serialization:
        writers = part_writers(tensors, limit, SAFETENSORS, partial(safetensors_writer, framework="tf"))
    else:
        writers = part_writers(tensors, limit, MODEL_H5, h5_part_writer)
        writers = {MODEL_H5: h5_writer(state)} if MODEL_H5 in writers else writers
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    writers["config.json"] = json_writer(config_fields(model.config, "transformers", state, dtype, {}))
    folder = local_path(save_directory)
    write_files(folder, writers, stale_files(folder, (SAFETENSORS, "pytorch_model.bin", MODEL_H5), writers))
    if saved_model:
        model.export(str(folder / "saved_model" / "1"))


def state_of(model: Any) -> dict[str, Tensor]:
    """The weights as a state dict of the PyTorch model, on the CPU; LoRA is merged into them."""
    return {name: _value(variable).permute(order).contiguous() for name, order, variable in _named(model)}


def _named(model: Any) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """(name in transformers' PyTorch model, the axes in PyTorch's order, variable) of each weight."""
    main = model.main_layer
    prefix = "" if getattr(model, "classifier", model) is model else f"{model.base_model_prefix}."
    layers = {f"{prefix}embeddings.patch_embeddings": main.embeddings.patch_embeddings}
    layers[f"{prefix}embeddings.layernorm"] = main.embeddings.layernorm
    for i, stage in enumerate(main.encoder.stages):
        at = f"{prefix}encoder.stages.{i}"
        layers |= {f"{at}.downsampling_layer.{k}": layer for k, layer in enumerate(stage.downsampling_layer)}
        for j, block in enumerate(stage.layers):
            for name in ("dwconv", "layernorm", "pwconv1", "pwconv2"):
                layers[f"{at}.layers.{j}.{name}"] = getattr(block, name)
            if block.grn is not None:
                yield f"{at}.layers.{j}.grn.weight", (0, 1, 2, 3), block.grn.weight
                yield f"{at}.layers.{j}.grn.bias", (0, 1, 2, 3), block.grn.bias
            if block.gamma is not None:
                yield f"{at}.layers.{j}.layer_scale_parameter", (0,), block.gamma
    layers |= {} if main.layernorm is None else {f"{prefix}layernorm": main.layernorm}
    layers |= {"classifier": model.classifier} if prefix and model.classifier is not None else {}
    for name, layer in layers.items():
        if layer.quantization_mode is not None:
            raise ValueError(f"{name} is quantised ({layer.quantization_mode}): expected a model with plain weights")
        if isinstance(layer, keras.layers.LayerNormalization):
            yield f"{name}.weight", (0,), layer.gamma
            yield f"{name}.bias", (0,), layer.beta
        else:
            yield f"{name}.weight", order_of(layer), layer.kernel
            yield f"{name}.bias", (0,), layer.bias


def _value(variable: Any) -> Tensor:
    """The value on the CPU, in the variable's dtype and Keras's shape."""
    array = keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(variable))
    if array.dtype.name == "bfloat16":  # NumPy cannot pass it to PyTorch
        return torch.from_numpy(array.astype("float32")).bfloat16()
    return torch.from_numpy(array)
