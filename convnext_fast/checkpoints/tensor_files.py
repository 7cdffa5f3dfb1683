"""Tensors in files: read without running what else is in them, and written for `files.write_files`."""

from __future__ import annotations

import argparse
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import find_file, json_writer, local_path, read_json

SAFETENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# In the order of preference that transformers has.
WEIGHT_FILES = (SAFETENSORS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json", "model.pth")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
MOST_TENSORS = 1 << 16
_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel and DataParallel; torch.compile


def read_weights(source: str | Path, *, use_ema: bool = False) -> dict[str, Tensor]:
    """The tensors of a file, folder or hub id, on the CPU, under the names they have there; see `load_checkpoint`.

    Files are mapped into memory where their kind allows. Checkpoints of a training run are looked into (``model`` or
    ``state_dict``; ``model_ema`` or ``state_dict_ema`` with ``use_ema``), and the prefixes that DistributedDataParallel
    and torch.compile add are taken off.
    """
    path = local_path(source)
    if path.suffix in WEIGHT_SUFFIXES and not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.is_file():
        source, file = path.parent, path
    else:
        file = find_file(source, *WEIGHT_FILES)
    content = _read_shards(source, file) if file.name.endswith(".index.json") else _read_file(file)
    return _state_dict(content, file, use_ema)


def tensor_writers(name: str, tensors: Mapping[str, Tensor], max_bytes: float) -> dict[str, Callable[[Path], None]]:
    """Writers of tensors as ``name``.safetensors or, beyond ``max_bytes``, as shards of at most that and an index.

    A tensor larger than that gets a shard of its own.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return {f"{name}.safetensors": safetensors_writer(tensors)}
    names = [f"{name}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    total = sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {key: file for file, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    writers = {file: safetensors_writer(shard) for file, shard in zip(names, shards, strict=True)}
    return writers | {f"{name}.safetensors.index.json": json_writer(index)}


def safetensors_writer(tensors: Mapping[str, Tensor]) -> Callable[[Path], None]:
    """A writer of a .safetensors file, for `write_files`."""
    return lambda path: save_file(_packed(tensors), path, metadata={"format": "pt"})


def pickle_writer(tensors: Mapping[str, Tensor], key: str | None) -> Callable[[Path], None]:
    """A writer of a .pth file, for `write_files`; the state dict nests under ``key`` where one is given."""
    return lambda path: torch.save(_packed(tensors) if key is None else {key: _packed(tensors)}, path)


def size_in_bytes(size: int | str) -> int:
    """A number of bytes, given as one or as "5GB", "200MB", "1.5GiB"; K, M and G are powers of 1000, of 1024 with i."""
    units = {"": 1, **{f"{u}{b}": base**p for p, u in enumerate("KMGT", 1) for b, base in (("", 1000), ("I", 1024))}}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(size).upper())
    count = int(float(match[1]) * units[match[2]]) if match and match[2] in units else 0
    if isinstance(size, bool) or count < 1:
        raise ValueError(f"the size is {size!r}: expected a number of bytes, or such as '5GB' or '200MB'")
    return count


def _packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, each with its own storage: the formats refuse shared storage or write all of it."""
    packed, storages = {}, set()
    for key, tensor in tensors.items():
        if tensor.device.type == "meta":
            raise ValueError(f"{key} is on the meta device and has no values to write")
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage()
        if tensor.numel() and (storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages):
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        packed[key] = tensor
    return packed


def _read_shards(source: str | Path, index: Path) -> dict[str, Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} is not an index of a sharded checkpoint: expected a 'weight_map' from keys to files")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name:
            raise ValueError(f"{index} names the file {name!r}: expected the name of a file beside it")
    tensors: dict[str, Tensor] = {}
    promised: dict[str, list[str]] = {}
    for key, name in weight_map.items():
        promised.setdefault(name, []).append(key)
    for name, keys in sorted(promised.items()):
        try:
            file = find_file(source, name)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{index} names the shard {name}, which is missing: {error}") from error
        shard = _read_file(file)
        absent = [key for key in keys if key not in shard]
        if absent:
            raise ValueError(f"{index} places {', '.join(absent[:5])} in {name}, which does not hold them")
        tensors.update(shard)
    return tensors


def _read_file(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is not a mapping)
        except (MemoryError, FileNotFoundError):
            raise
        except Exception as error:  # dtypes that PyTorch lacks raise as they please
            raise ValueError(f"{path} is not a safetensors file, or is truncated or damaged: {error}") from error
    if path.suffix == ".json":
        raise ValueError(f"{path} holds no weights: give the folder, or a file of {', '.join(WEIGHT_SUFFIXES)}")
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: expected a dict of tensors")
    return content


def read_pickle(path: Path) -> Any:
    """What `torch.save` wrote: plain values and tensors, on the CPU. Nothing in the file is run.

    Tensors are mapped into memory where the file allows it. Each is dense and no larger than what the file holds of it,
    so that a small file cannot stand for a large amount of memory. A ValueError tells what is wrong with the file.
    """
    if not path.stat().st_size:
        raise ValueError(f"{path} is not a PyTorch checkpoint, or is truncated or damaged: it is empty")
    _check_archive(path)
    try:
        # Training scripts keep their command-line arguments in the file; a Namespace holds attributes, not code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:  # whose text advises to run what is in the file
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise ValueError(
                f"{path} is a pickle that would run or build {refused[1]}, which is refused: "
                "expected a file of tensors only (save model.state_dict())"
            ) from error
        raise ValueError(f"{path} is not a PyTorch checkpoint, or is damaged") from error
    except Exception as error:  # a damaged file can raise anything, OSError included
        raise ValueError(f"{path} is not a PyTorch checkpoint, or is truncated or damaged: {error!r:.200}") from error
    _check_tensors(path, content)
    return content


def _check_archive(path: Path) -> None:
    """Refuse a zip archive whose directory promises more than the file holds; `torch.save` compresses nothing."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries, size = archive.infolist(), path.stat().st_size
    except Exception as error:
        raise ValueError(f"{path} is not a PyTorch checkpoint, or is truncated or damaged: {error!r:.200}") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"{path} is a compressed archive: expected one as torch.save writes it")
    promised = sum(entry.file_size for entry in entries)
    if promised > size:
        raise ValueError(f"{path} has {size:,} bytes, and its directory promises {promised:,}: it is damaged")


def _check_tensors(path: Path, content: Any) -> None:
    """Refuse tensors that are not plain, or larger than what the file holds of them."""
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
