"""Reads the checkpoints of `torch.distributed.checkpoint` without running what is in them.

Such a checkpoint has an index, ``.metadata``, that PyTorch unpickles without any restriction, and entries of other
kinds than tensors, which it unpickles too. Here the index may name only the types that an index of tensors is made of.
"""

from __future__ import annotations

import pickle
import re
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

_METADATA = "torch.distributed.checkpoint.metadata"
_TYPES = {
    _METADATA: {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}
_FILE = re.compile(r"__\d+_\d+\.distcp")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = name in _TYPES.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        )
        if not allowed:
            raise ValueError(f"the index would run or build {module}.{name}, which loading refuses")
        return super().find_class(module, name)


class ShardedReader(FileSystemReader):
    """Reads only tensors, from files beside the index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index; a ValueError if it names other types, other entries than tensors, or files elsewhere."""
        with open(self.path / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError("the index is of another kind")
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise ValueError(f"the index has {name}, a {type(entry).__name__}: expected only tensors")
        for place in metadata.storage_data.values():
            if not _FILE.fullmatch(place.relative_path) or getattr(place, "transform_descriptors", None):
                raise ValueError(f"the index names the file {place.relative_path!r}: expected one beside it")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
