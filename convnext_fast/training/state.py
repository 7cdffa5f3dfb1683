"""A run's checkpoint: written atomically, and readable by any number of processes.

One process writes ``checkpoint.pt``, which can be read without running code. It keeps the weights under ``model`` and
their average under ``model_ema``, as the official repository does, so that `load_save.load_checkpoint` reads it too.
If the parameters are split over processes, each writes its part into a folder ``checkpoint-<step>`` in the format of
`torch.distributed.checkpoint`. Either kind is loaded into a model that is split or whole.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Union

import torch
import torch.distributed as dist
from torch import Tensor

from ..checkpoints.tensor_files import read_pickle
from ..files import json_writer, read_json, write_files
from .distributed import barrier, from_all_processes

CHECKPOINT, HISTORY, FACTS, LOCK = "checkpoint.pt", "history.json", "run.json", ".lock"
FOLDER = re.compile(r"checkpoint-\d{8}(-2)?")
_TEMPORARY = re.compile(
    rf"\.((checkpoint\.pt|(history|pictures|config|preprocessor_config)\.json|model[\w.-]*)\.[0-9a-f]{{8}}|{FOLDER.pattern})"
    r"\.tmp"
)
TENSORS = ("model", "model_ema", "optimizer")
"""Names of the groups of tensors in a checkpoint."""
ENTRIES = {"step": int, "epoch": dict, "history": list, "scaler": dict, "identity": dict}
"""Its other entries, plain values that JSON can keep, with their types."""

Tree = Mapping[str, Union[Tensor, "Tree"]]


def find_checkpoint(directory: Path) -> Path | None:
    """The latest complete checkpoint of a run, or None."""
    file, folder = directory / CHECKPOINT, max(_folders(directory), default=None)
    if folder is None or not file.exists():
        return folder or (file if file.exists() else None)
    # Both kinds exist only if a run was killed between writing one and removing the other.
    return folder if load_facts(folder)["step"] > load_facts(file)["step"] else file


def save_state(directory: Path, tensors: Tree, facts: Mapping[str, Any]) -> None:
    """Write a run's state to ``directory``/checkpoint.pt, and its history beside it; for one process.

    ``tensors``: `TENSORS`, none of them split over processes; ``facts``: `ENTRIES`. After an OSError, for a state that
    cannot be written, the checkpoint before it is untouched.
    """
    state, history = {**tensors, **facts}, json_writer({"epochs": facts["history"]})
    write_files(directory, {CHECKPOINT: lambda path: torch.save(state, path), HISTORY: history})
    _remove_folders(directory)


def save_sharded_state(directory: Path, tensors: Tree, facts: Mapping[str, Any]) -> None:
    """As `save_state`, to ``directory``/checkpoint-<step>, of tensors split over processes, which all call it."""
    import torch.distributed.checkpoint as dcp

    first = dist.get_rank() == 0
    target = directory / f"checkpoint-{facts['step']:08d}"
    if from_all_processes(target.exists())[0]:  # saved by an error at the end of an epoch, before the epoch's record
        target = target.with_name(f"{target.name}-2")
    temporary = directory / f".{target.name}.tmp"
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
    barrier()
    try:
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(temporary, sync_files=True))
    except dcp.api.CheckpointException as error:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"cannot write {target}, is the disk full? ({_reason(error)})") from error
    if first:
        write_files(temporary, {FACTS: json_writer(facts)})
        os.replace(temporary, target)
        write_files(directory, {HISTORY: json_writer({"epochs": facts["history"]})}, stale=[CHECKPOINT])
        _remove_folders(directory, but=target)
    barrier()


def load_facts(path: Path) -> dict[str, Any]:
    """The `ENTRIES` of the checkpoint that `find_checkpoint` found."""
    content = read_json(path / FACTS) if path.is_dir() else _read_file(path)
    if set(ENTRIES) - set(content):
        raise ValueError(f"{path} is not a checkpoint of a training run")
    for name, kind in ENTRIES.items():
        if type(content[name]) is not kind:
            found = type(content[name]).__name__
            raise ValueError(f"{path} is damaged: its {name} is a {found}, expected a {kind.__name__}")
    return {name: content[name] for name in ENTRIES}


def load_tensors(path: Path, tensors: Tree) -> None:
    """Fill `TENSORS`, whole or split over processes, with those of the checkpoint that `find_checkpoint` found.

    Runs no code from it. A ValueError tells if it is truncated, something else, or of another model.
    """
    if not path.is_dir():
        _fill(tensors, _read_file(path), str(path))
        return
    # PyTorch's distributed checkpoints take a second to import.
    import torch.distributed.checkpoint as dcp

    from .sharded_reader import ShardedReader

    alone = not dist.is_initialized()
    try:
        with warnings.catch_warnings():
            if alone:
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
            reader = ShardedReader(path)
            reader.read_metadata()  # PyTorch 2.9 drops what this raises within `load`
            dcp.load(dict(tensors), storage_reader=reader, no_dist=alone)
    except MemoryError:
        raise
    except (Exception, dcp.api.CheckpointException) as error:  # a damaged index can make it raise anything
        raise ValueError(f"{path} is not a complete checkpoint: {_reason(error)}") from error


def lock_folder(directory: Path) -> IO[str]:
    """Lock a run's folder against other runs until this process ends or closes a handle of the lock file.

    A ValueError if another process has locked it. Has no effect on file systems without locks.
    """
    file = (directory / LOCK).open("a", encoding="utf-8")
    try:
        # Unlike other locks, this one ends with the process and is not inherited by forked loader processes.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise ValueError(f"another run is writing to {directory}: expected one at a time") from None
    return file


def remove_temporary_files(directory: Path) -> None:
    """Delete temporary files that killed processes left in a run's folder."""
    for path in directory.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = read_pickle(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} holds no {path.name}") from None
    if not isinstance(content, dict) or {*TENSORS, *ENTRIES} - set(content):
        raise ValueError(f"{path} is not a checkpoint of a training run")
    return content


@torch.no_grad()
def _fill(target: Tree, source: Tree, name: str) -> None:
    """Copy whole tensors into ``target``'s, by name; of one that is split, this process's part."""
    for key, value in target.items():
        if key not in source:
            raise ValueError(f"{name} lacks {key}")
        nested = isinstance(value, Mapping)
        if not isinstance(source[key], Mapping if nested else Tensor):
            expected = "a dict" if nested else "a tensor"
            raise ValueError(f"{name}: {key} is a {type(source[key]).__name__}: expected {expected}")
        if nested:
            _fill(value, source[key], f"{name}: {key}")
            continue
        if value.shape != source[key].shape:
            raise ValueError(f"{name}: {key} has shape {tuple(source[key].shape)}: expected {tuple(value.shape)}")
        if hasattr(value, "placements"):
            from torch.distributed.tensor import distribute_tensor

            # Every process has read the file, so none has to send it.
            mine = source[key].to(value.device)
            value.copy_(distribute_tensor(mine, value.device_mesh, value.placements, src_data_rank=None))
        else:
            value.copy_(source[key])


def _folders(directory: Path) -> list[Path]:
    """The complete checkpoints that are folders; their names sort by step."""
    return [path for path in directory.glob("checkpoint-*") if FOLDER.fullmatch(path.name)]


def _remove_folders(directory: Path, but: Path | None = None) -> None:
    for path in _folders(directory):
        if path != but:
            shutil.rmtree(path)


def _reason(error: BaseException) -> str:
    """The error inside the one that `torch.distributed.checkpoint` raises."""
    failures = getattr(error, "failures", {})
    first = next(iter(failures.values()), None)
    return str(first[0] if first else error)
