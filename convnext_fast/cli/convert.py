"""Checkpoints rewritten under the names of another library."""

from __future__ import annotations

from pathlib import Path

from ..checkpoints.config_json import warn_of_lost_fields
from ..checkpoints.formats import from_timm
from ..checkpoints.load_save import load_checkpoint, write_folder
from ..checkpoints.matching import match_tensors
from ..checkpoints.tensor_files import WEIGHT_SUFFIXES
from ..checkpoints.tensorflow import h5_writer
from ..checkpoints.weight_files import pickle_writer, safetensors_writer
from ..files import local_path, write_files
from ..models.convnext import ConvNext


def convert_checkpoint(source: str | Path, destination: str | Path, to: str, *, use_ema: bool = False) -> None:
    """Write the checkpoint ``source``, see `load_checkpoint`, to ``destination`` in the format ``to``.

    A ``destination`` that ends in .safetensors, .pth, .pt, .bin or, for transformers' TensorFlow models, .h5 is a file
    of only the tensors (under ``model`` in an official .pth). Others are folders for ``config.json`` and
    ``model.safetensors``. A ValueError names tensors that do not fit the configuration, or that ``to`` cannot hold.
    """
    checkpoint = load_checkpoint(source, use_ema=use_ema)
    config, state = checkpoint.config, checkpoint.state_dict
    layers = {name.rpartition(".")[0] for name in state}
    skeleton = ConvNext(
        config if "head.fc" in layers else config.amended(num_labels=0),
        head_norm_first=checkpoint.head_norm_first,
        features_only=not layers & {"head.fc", "head.norm", "norm_pre"},
        device="meta",
    )
    match_tensors(skeleton, checkpoint, str(source))
    tensors = from_timm(state, to, checkpoint.extra, checkpoint.global_pool)
    path = local_path(destination)
    if path.suffix in WEIGHT_SUFFIXES:
        warn_of_lost_fields(config, to, with_config=False)
        if path.suffix == ".h5" and to != "transformers":
            raise ValueError(f"{path} would hold the names of transformers' TensorFlow models: expected that format")
        nest = "model" if to == "official" else None
        writers = {".safetensors": safetensors_writer, ".h5": h5_writer}
        writer = writers[path.suffix](tensors) if path.suffix in writers else pickle_writer(tensors, nest)
        write_files(path.parent, {path.name: writer})
        return
    options = {"head_norm_first": checkpoint.head_norm_first, "global_pool": checkpoint.global_pool}
    write_folder(path, config, to, tensors, options)
