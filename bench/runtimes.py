"""ONNX Runtime and OpenVINO on a CPU, in float32, with as many threads as PyTorch has."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

Run = Callable[[np.ndarray], np.ndarray]


def load(runtime: str, model: nn.Module, image: Tensor) -> Run:
    """The model in ``runtime``, "onnxruntime" or "openvino", for inputs of ``image``'s shape (N, C, H, W).

    Raises:
        ImportError: a package is missing; the message says how to install it.
    """
    module = _import(runtime)
    _import("onnxscript")
    with tempfile.TemporaryDirectory() as folder:
        path = _export(model, image, Path(folder))
        return (_onnxruntime if runtime == "onnxruntime" else _openvino)(module, path, image)


def _import(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"needs {package}: pip install -e '.[bench]' ({error})") from error


def _export(model: nn.Module, image: Tensor, folder: Path) -> Path:
    path = folder / "model.onnx"
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(model.eval(), (image,), path, dynamo=True, external_data=False, verbose=False)
    finally:
        logger.setLevel(level)
    return path


def _onnxruntime(module: ModuleType, path: Path, image: Tensor) -> Run:
    options = module.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Otherwise its threads keep spinning after a call and slow the next contender.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = module.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda array: session.run(None, {name: array})[0]


def _openvino(module: ModuleType, path: Path, image: Tensor) -> Run:
    # Without the hint OpenVINO computes in bfloat16 where the processor can.
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = module.Core().compile_model(str(path), "CPU", settings)
    return lambda array: compiled([array])[0]
