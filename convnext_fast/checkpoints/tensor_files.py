"""Tensors in files: read without running any code that is in them."""

from __future__ import annotations

import argparse
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..files import local_path, read_json
from ..huggingface.hub import ANYWHERE, Loading, find_file
from .tensorflow import MODEL_H5, from_tensorflow, pytorch_name, read_h5

# In the order of preference that transformers has.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pth",
    MODEL_H5,
    f"{MODEL_H5}.index.json",
)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".h5")
MOST_TENSORS = 1 << 16
_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel and DataParallel; torch.compile


def read_weights(source: str | Path, *, use_ema: bool = False, loading: Loading = ANYWHERE) -> dict[str, Tensor]:
    """The tensors of a file, folder or hub id, on the CPU, under the names they have there; see `load_checkpoint`.

    Files are memory-mapped if their format allows it. In a training checkpoint they are under ``model`` or
    ``state_dict`` (with ``use_ema``, ``model_ema`` or ``state_dict_ema``). Prefixes that DistributedDataParallel and
    torch.compile add are removed.
    """
    path = local_path(source)
    if path.suffix in WEIGHT_SUFFIXES and not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.is_file():
        source, file = path.parent, path
    else:
        safe = loading.use_safetensors
        names = [name for name in _WEIGHT_FILES if safe is None or safe == (".safetensors" in name)]
        file = find_file(source, *(with_variant(name, loading.variant) for name in names), loading=loading)
    content = _read_shards(source, file, loading) if file.name.endswith(".index.json") else _read_file(file)
    return _state_dict(content, file, use_ema)


def with_variant(name: str, variant: str | None) -> str:
    """The name of a weights file of a variant, before its last suffix."""
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def _read_shards(source: str | Path, index: Path, loading: Loading = ANYWHERE) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} is not an index of a sharded checkpoint: expected a 'weight_map' from keys to files")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise ValueError(f"{index} names the file {name!r}: expected the name of a file next to it")
    tensors: dict[str, Tensor] = {}
    promised: dict[str, list[str]] = {}
    for key, name in weight_map.items():
        promised.setdefault(name, []).append(key)
    for name, keys in sorted(promised.items()):
        try:
            file = find_file(source, name, loading=loading)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{index} names the shard {name}, which is missing: {error}") from error
        shard = _read_file(file)
        absent = [key for key in keys if pytorch_name(key) not in shard]
        if absent:
            raise ValueError(f"{index} places {', '.join(absent[:5])} in {name}, which does not hold them")
        tensors.update(shard)
    return tensors


def _read_file(path: Path) -> dict[str, Any]:
    if path.suffix == ".h5":
        return from_tensorflow(read_h5(path))
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is not a mapping)
            return from_tensorflow(tensors)
        except (MemoryError, FileNotFoundError):
            raise
        except Exception as error:  # a dtype that PyTorch lacks can raise anything
            raise ValueError(f"{path} is not a safetensors file, or is truncated or damaged: {error}") from error
    if path.suffix == ".json":
        raise ValueError(f"{path} holds no weights: give the folder, or a file of {', '.join(WEIGHT_SUFFIXES)}")
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected a dict of tensors")
    return content


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote: plain values and tensors, on the CPU. No code in the file is run.

    Tensors are memory-mapped if the file allows it. Each must be dense and no larger than its bytes in the file, so
    that a small file cannot take a large amount of memory. A ValueError tells what is wrong with the file.
    """
    if not path.stat().st_size:
        raise _damaged(path, "it is empty")
    _check_archive(path)
    try:
        # Training scripts keep their command-line arguments in the file; a Namespace holds attributes, not code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:  # its text advises to run the code in the file
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise ValueError(
                f"{path} is a pickle that would run or build {refused[1]}, which is refused: "
                "expected a file of tensors only (save model.state_dict())"
            ) from error
        raise ValueError(f"{path} is not a PyTorch checkpoint, or is damaged") from error
    except Exception as error:  # a damaged file can raise anything, OSError included
        raise _damaged(path, f"{error!r:.200}") from error
    _check_tensors(path, content)
    return content


def _damaged(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is not a PyTorch checkpoint, or is truncated or damaged: {reason}")


def _check_archive(path: Path) -> None:
    """Refuse a zip archive whose directory claims more bytes than the file has; `torch.save` compresses nothing."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries, size = archive.infolist(), path.stat().st_size
    except Exception as error:
        raise _damaged(path, f"{error!r:.200}") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"{path} is a compressed archive: expected one as torch.save writes it")
    promised = sum(entry.file_size for entry in entries)
    if promised > size:
        raise ValueError(f"{path} has {size:,} bytes, and its directory claims {promised:,}: it is damaged")


def _check_tensors(path: Path, content: Any) -> None:
    """Refuse tensors that are not plain, or larger than their bytes in the file."""
    waiting = [("", content)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(str(key), item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [(name, item) for item in value]
        elif isinstance(value, Tensor):
            kind = _kind(value)
            if kind:
                raise ValueError(f"{path}: {name:.100} is {kind}: expected a plain tensor")
            size, held = math.prod(value.shape) * value.element_size(), value.untyped_storage().nbytes()
            if size > held:
                shape = f"has shape {tuple(value.shape)}"
                raise ValueError(f"{path}: {name:.100} {shape}, {size:,} bytes, of which the file holds {held:,}")


def _kind(tensor: Tensor) -> str:
    """What a tensor is instead of a plain one, in words; an empty string for a plain one."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.is_nested:
        return "a nested tensor"
    if tensor.layout != torch.strided:
        return f"a tensor of the layout {tensor.layout}"
    if tensor.device.type != "cpu":
        return f"on the device {tensor.device.type!r}, without values"
    return "quantised" if tensor.is_quantized else ""


def _state_dict(content: dict[str, Any], path: Path, use_ema: bool) -> dict[str, Tensor]:
    """The state dict in what a file holds."""
    plain, averaged = ("model", "state_dict"), ("model_ema", "state_dict_ema")
    nested = {key: value for key, value in content.items() if isinstance(value, Mapping)}
    chosen = [nested[key] for key in (averaged if use_ema else plain) if key in nested]
    if chosen:
        content = dict(chosen[0])
    elif use_ema:
        raise ValueError(f"{path} holds no averaged weights for use_ema=True: expected {' or '.join(averaged)}")
    elif any(key in nested for key in averaged):
        raise ValueError(f"{path} holds only averaged weights: pass use_ema=True to load them")
    strange = [key for key, value in content.items() if not isinstance(value, Tensor) or not isinstance(key, str)]
    if strange:
        held = f"{strange[0]!r}, a {type(content[strange[0]]).__name__}"
        raise ValueError(f"{path} holds {held}: expected tensors by name, at the top or under {' or '.join(plain)}")
    if len(content) > MOST_TENSORS:
        raise ValueError(f"{path} holds {len(content):,} tensors: expected at most {MOST_TENSORS:,}")
    while content and any(all(key.startswith(prefix) for key in content) for prefix in _WRAPPERS):
        content = {key.partition(".")[2]: value for key, value in content.items()}
    return {key: value.detach() for key, value in content.items()}
