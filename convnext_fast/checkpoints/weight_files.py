"""Tensors written to files: one or several, as .safetensors or pickles, for `files.write_files`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..files import json_writer

Writer = Callable[[Path], None]


def part_writers(
    tensors: Mapping[str, Tensor], limit: float, file: str, write: Callable[[Mapping[str, Tensor]], Writer]
) -> dict[str, Writer]:
    """Writers of ``file`` or, beyond ``limit`` bytes, of several files of at most that size and their index.

    A larger tensor gets its own file.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return {file: write(tensors)}
    stem, _, suffix = file.rpartition(".")
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.{suffix}" for i in range(len(shards))]
    total = sum(tensor.nbytes for tensor in tensors.values())
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return {name: write(shard) for name, shard in zip(names, shards, strict=True)} | {_index(file): json_writer(index)}


def stale_files(directory: Path, files: Iterable[str], written: Mapping[str, Any]) -> list[str]:
    """``files`` of an earlier save in the folder, with their parts and indexes, that are not ``written`` now.

    A reader could load them by mistake.
    """
    found = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    old: set[str] = set()
    for file in files:
        stem, _, suffix = file.rpartition(".")
        pattern = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.{re.escape(suffix)}")
        old |= {name for name in found if pattern.fullmatch(name) or name == _index(file)}
    return sorted(old - written.keys())


def _index(file: str) -> str:
    """``model.safetensors.index.fp16.json`` of ``model.fp16.safetensors``."""
    name, *variant, suffix = file.split(".")
    return ".".join((name, suffix, "index", *variant, "json"))


def safetensors_writer(tensors: Mapping[str, Tensor], framework: str = "pt") -> Writer:
    """A writer of a .safetensors file, for `write_files`; it tells transformers the ``framework`` of the names."""
    return lambda path: save_file(_packed(tensors), path, metadata={"format": framework})


def pickle_writer(tensors: Mapping[str, Tensor], key: str | None = None) -> Writer:
    """A writer of a .pth file, for `write_files`; the state dict is nested under ``key`` if one is given."""
    return lambda path: torch.save(_packed(tensors) if key is None else {key: _packed(tensors)}, path)


def size_in_bytes(size: int | str) -> int:
    """A number of bytes, also given as "5GB", "200MB" or "1.5GiB": powers of 1000 and, with i, of 1024."""
    units = {"": 1, **{f"{u}{b}": base**p for p, u in enumerate("KMGT", 1) for b, base in (("", 1000), ("I", 1024))}}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(size).upper())
    count = int(float(match[1]) * units[match[2]]) if match and match[2] in units else 0
    if isinstance(size, bool) or count < 1:
        raise ValueError(f"the size is {size!r}: expected a number of bytes, or one like '5GB' or '200MB'")
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
