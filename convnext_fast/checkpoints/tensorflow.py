"""TensorFlow's checkpoints: ``tf_model.h5`` of transformers, its safetensors, and the files of keras.applications.

TensorFlow keeps the kernel of a convolution as (height, width, in, out) and of a linear layer as (in, out), and calls
LayerNorm's weight and bias gamma and beta. Readers give PyTorch's shapes, under transformers' names or, for
keras.applications, the official repository's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..console import needing

MODEL_H5 = "tf_model.h5"
_NAME = re.compile(r"(?:.*/)?(convnext(?:v2)?/(?:embeddings|encoder|layernorm)/.+|classifier/(?:kernel|bias)):0")
_APPLICATION = re.compile(r"(?:.*/)?(?:convnext_\w+?_)?(\w+)/(kernel|bias|gamma|beta|[Vv]ariable\w*)(?::0)?")
_LEAVES = {"kernel": "weight", "gamma": "weight", "beta": "bias"}
# Layers of keras.applications after the model's name, and what the official repository calls them.
_LAYERS = (
    (r"stem_conv", "downsample_layers.0.0"),
    (r"stem_layernorm", "downsample_layers.0.1"),
    *((rf"downsampling_layernorm_{i - 1}", f"downsample_layers.{i}.0") for i in (1, 2, 3)),
    *((rf"downsampling_conv_{i - 1}", f"downsample_layers.{i}.1") for i in (1, 2, 3)),
    (r"stage_(\d+)_block_(\d+)_depthwise_conv", r"stages.\1.\2.dwconv"),
    (r"stage_(\d+)_block_(\d+)_layernorm", r"stages.\1.\2.norm"),
    (r"stage_(\d+)_block_(\d+)_pointwise_conv_([12])", r"stages.\1.\2.pwconv\3"),
    (r"stage_(\d+)_block_(\d+)_layer_scale", r"stages.\1.\2.gamma"),
    (r"head_layernorm|layer_normalization\w*", "norm"),
    (r"head_dense", "head"),
)
_MOST_ATTRIBUTE_BYTES = 64_512  # HDF5's limit; Keras splits what is longer


def pytorch_name(name: str) -> str:
    """PyTorch's name for a tensor of a TensorFlow checkpoint; other names do not change."""
    found = _NAME.fullmatch(name)
    if found is not None:
        *layer, leaf = found[1].split("/")
        return ".".join((*layer, _LEAVES.get(leaf, leaf)))
    found = _APPLICATION.fullmatch(name)
    for pattern, template in _LAYERS if found is not None else ():
        match = re.fullmatch(pattern, found[1])
        if match is not None:
            layer = match.expand(template)
            return layer if layer.endswith("gamma") else f"{layer}.{_LEAVES.get(found[2], found[2])}"
    return name


def from_tensorflow(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a TensorFlow checkpoint with PyTorch's names and shapes; others do not change."""
    state = {}
    for name, tensor in tensors.items():
        key = pytorch_name(name)
        is_kernel = key != name and re.fullmatch(r".*/kernel(:0)?", name)
        state[key] = pytorch_layout(tensor).contiguous() if is_kernel else tensor
    return state


def to_tensorflow(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `from_tensorflow` for a state dict under transformers' names, with or without ``convnext.``."""
    tensors = {}
    model = "convnextv2" if any(".grn." in key for key in state) else "convnext"
    for key, tensor in state.items():
        layer, _, leaf = key.rpartition(".")
        is_grn = layer.endswith(".grn")
        if leaf == "weight" and not is_grn:
            leaf = "kernel" if tensor.dim() > 1 else "gamma"
        elif leaf == "bias" and state[f"{layer}.weight"].dim() == 1:
            leaf = "beta"
        # The dots before numbers stay: "encoder/stages.0/layers.0/dwconv".
        path = re.sub(r"\.(?!\d)", "/", key if key.startswith((f"{model}.", "classifier.")) else f"{model}.{key}")
        tensors[f"{path.rpartition('/')[0]}/{leaf}:0"] = tensor if is_grn else tensorflow_layout(tensor)
    return tensors


def pytorch_layout(kernel: Tensor) -> Tensor:
    """A view of TensorFlow's kernel, (h, w, in, out) or (in, out), as (out, in, h, w) or (out, in)."""
    return kernel.permute(3, 2, 0, 1) if kernel.dim() == 4 else kernel.t() if kernel.dim() == 2 else kernel


def tensorflow_layout(weight: Tensor) -> Tensor:
    """The inverse of `pytorch_layout`."""
    return weight.permute(2, 3, 1, 0) if weight.dim() == 4 else weight.t() if weight.dim() == 2 else weight


def read_h5(path: Path) -> dict[str, Tensor]:
    """Every tensor in an HDF5 file by its path there.

    Each must be in this file and not compressed, so that a small file cannot take a large amount of memory. A
    ValueError tells what is wrong with the file, an ImportError that h5py is missing.
    """
    h5py = _h5py()
    tensors: dict[str, Tensor] = {}

    def visit(group: Any, prefix: str) -> None:
        for key in group:
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise ValueError(f"{prefix}{key} is a link to another place")
            item = group[key]
            if not isinstance(item, h5py.Dataset):
                visit(item, f"{prefix}{key}/")
                continue
            if item.shape is None:
                raise ValueError(f"{prefix}{key} is an empty dataset: expected an array of floats")
            if item.external or item.is_virtual or item.id.get_storage_size() != item.nbytes or item.dtype.kind != "f":
                raise ValueError(f"{prefix}{key} is not a plain array of floats: {item}")
            tensors[prefix + key] = torch.from_numpy(item[()].reshape(item.shape))

    try:
        with h5py.File(path, "r") as file:
            visit(file, "")
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{path} is not a Keras checkpoint, or is truncated or damaged: {error}") from error
    return tensors


def h5_writer(state: Mapping[str, Tensor]) -> Callable[[Path], None]:
    """A writer of a ``tf_model.h5`` of a state dict under transformers' names, for `write_files`."""
    if any(name.startswith("hidden_states_norms.") for name in state):
        raise ValueError("hidden_states_norms, a backbone's, are not written as h5: expected safetensors")
    tensors = to_tensorflow(state)
    h5py = _h5py_for(tensors)
    layers = dict.fromkeys(name.partition("/")[0] for name in tensors)
    kind = "for_image_classification" if "classifier" in layers else "model"
    model = f"tf_conv_next_{'v2_' if 'convnextv2' in layers else ''}{kind}"

    def write(path: Path) -> None:
        with h5py.File(path, "w") as file:
            file.attrs["backend"], file.attrs["keras_version"] = "tensorflow", "2.15.0"
            _set_names(file, "layer_names", list(layers))
            file.create_group("top_level_model_weights").attrs["weight_names"] = []
            for layer in layers:
                group = file.create_group(layer)
                own = {f"{model}/{n}": t for n, t in tensors.items() if n.partition("/")[0] == layer}
                _set_names(group, "weight_names", list(own))
                for name, tensor in own.items():
                    group.create_dataset(name, data=tensor.detach().cpu().numpy())

    return write


def h5_part_writer(tensors: Mapping[str, Tensor]) -> Callable[[Path], None]:
    """A writer of one of several h5 files, as transformers writes those: tensors of TensorFlow by their names."""
    h5py = _h5py_for(tensors)

    def write(path: Path) -> None:
        with h5py.File(path, "w") as file:
            for name, tensor in tensors.items():
                file.create_dataset(name, data=tensor.detach().cpu().numpy())
            _set_names(file, "layer_names", list(tensors))

    return write


def _set_names(group: Any, attribute: str, names: list[str]) -> None:
    """Write names as Keras does: strings of one length, in several attributes if one would be too long."""
    width = max(map(len, names))
    count = _MOST_ATTRIBUTE_BYTES // width
    if len(names) <= count:
        group.attrs[attribute] = [name.encode() for name in names]
    else:
        for i in range(0, len(names), count):
            group.attrs[f"{attribute}{i // count}"] = [name.encode() for name in names[i : i + count]]


def _h5py_for(tensors: Mapping[str, Tensor]) -> Any:
    if any(tensor.dtype not in (torch.float16, torch.float32, torch.float64) for tensor in tensors.values()):
        raise ValueError("HDF5 has no bfloat16: expected tensors of float32, or safetensors")
    return _h5py()


def _h5py() -> Any:
    with needing("files of Keras (.h5) need h5py", "keras"):
        import h5py
    return h5py
