"""A model as an ONNX file, checked with onnxruntime."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path

import torch

from ..console import needing
from ..files import write_files
from ..models.convnext import ConvNext
from ..models.switches import check_image


def export_onnx(model: ConvNext, path: Path, height: int, width: int) -> float:
    """Write ``model`` as ONNX and return the error of onnxruntime's logits, relative to the largest.

    The file maps ``pixel_values`` (N, num_channels, height, width) float32, for any N, to ``logits`` (N, num_classes).
    It is self-contained and uses only standard operators. The model is put into evaluation mode.

    Raises:
        ImportError: the extra ``export`` is not installed.
        ValueError: ``path`` does not end in .onnx, the model has no classifier, or the file computes other logits.
    """
    if path.suffix != ".onnx":
        raise ValueError(f"the file is {path}: expected a name that ends in .onnx")
    if not model.num_classes:
        raise ValueError("the model has no classifier (num_classes is 0): expected one with classes")
    with needing("ONNX needs more packages", "export"):
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it, with a less clear error)
    images = torch.randn(2, model.config.num_channels, height, width)
    check_image(images, model.config, "the image")
    # PyTorch reports missing operators of torchvision, which a ConvNeXt does not use, and warns about its own calls.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.onnx.export(
            model.eval(),
            (images,),
            dynamo=True,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            verbose=False,
        )

    with torch.no_grad():
        images = torch.randn(3, *images.shape[1:])
        expected = model(images)
    error = math.nan

    def write(file: Path) -> None:
        nonlocal error
        program.save(file, external_data=False)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"pixel_values": images.numpy()})
        error = float((torch.from_numpy(logits) - expected).abs().max() / expected.abs().max())
        if not error < 1e-3:
            raise ValueError(f"onnxruntime gives other logits than the model, by {error:.1e} of the largest")

    write_files(path.parent, {path.name: write})
    return error
