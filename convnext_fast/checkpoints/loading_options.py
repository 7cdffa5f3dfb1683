"""The options of ``from_pretrained`` other than the hub's: dtypes, devices, fields of the configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..config import ConvNextConfig, checks
from ..config.base import near_fields

_COMMON_FIELDS = {"output_hidden_states", "output_attentions", "return_dict"}
_WITHOUT_EFFECT = {
    "_fast_init",
    "adapter_name",
    "attn_implementation",
    "generation_config",
    "low_cpu_mem_usage",
    "offload_buffers",
    "offload_state_dict",
}
"""Options that change nothing here: loading copies each tensor once anyway, and there is no attention."""
_NOT_SERVED = {
    "from_flax",
    "from_tf",
    "gguf_file",
    "key_mapping",
    "load_in_4bit",
    "load_in_8bit",
    "offload_folder",
    "quantization_config",
    "tp_plan",
    "use_kernels",
}


class Options(NamedTuple):
    """The options of loading a model, sorted."""

    model: dict[str, Any]  # arguments of the class
    fields: dict[str, Any]  # of its configuration
    dtype: torch.dtype | None  # of the parameters; None for the checkpoint's
    device: torch.device  # of the parameters, until ``device_map`` spreads them
    device_map: str | dict[str, Any] | None  # "auto", or devices by module; None if all goes to ``device``
    max_memory: dict[Any, Any] | None  # in bytes by device, for "auto"


def sorted_options(
    cls: type, options: Mapping[str, Any], dtype: torch.dtype | str | None, device: Any = None
) -> Options:
    """The options of ``from_pretrained`` by what they are for; an error names one that is unknown or unsupported."""
    of_model, of_config = ({*inspect.signature(kind).parameters} for kind in (cls, ConvNextConfig))
    of_config = (of_config - of_model - {"extra"}) | _COMMON_FIELDS
    for name in options.keys() & _NOT_SERVED:
        if options[name]:
            raise ValueError(f"{name} is {options[name]!r:.80}: this package does not support that option")
    if not options.get("weights_only", True):
        raise ValueError("weights_only is False: expected True, because no code in a file is run")
    known = {"torch_dtype", "device_map", "max_memory", "weights_only", *_WITHOUT_EFFECT, *_NOT_SERVED}
    given = {name for name, value in options.items() if value is not None}
    unknown = sorted(given - of_model - of_config - known)
    if unknown:
        near = [field for name in unknown for field in near_fields(ConvNextConfig, name)]
        raise TypeError(
            f"from_pretrained got {', '.join(unknown)}: expected arguments of {cls.__name__}, "
            f"{', '.join(sorted(of_model))}, or fields of its configuration"
            + (f" (is {' or '.join(near)} meant?)" if near else "")
        )
    model, fields = ({name: options[name] for name in options if name in kind} for kind in (of_model, of_config))
    dtype = dtype if options.get("torch_dtype") is None else options["torch_dtype"]
    device, device_map = _placement(options.get("device_map"), device)
    return Options(model, fields, checks.floating("dtype", dtype), device, device_map, options.get("max_memory"))


def _placement(device_map: Any, device: Any) -> tuple[torch.device, Any]:
    """The device on which to load, and the map by which to spread the model from there, if any."""
    if isinstance(device_map, Mapping) and list(device_map) == [""]:
        device_map = device_map[""]
    if isinstance(device_map, (str, int, torch.device)) and device_map not in _AUTOMATIC:
        device, device_map = device_map, None
    if device_map is not None and not isinstance(device_map, Mapping) and device_map not in _AUTOMATIC:
        raise TypeError(f"device_map is {device_map!r:.80}: expected a device, 'auto', or devices by module")
    where = "cpu" if device_map is not None else torch.get_default_device() if device is None else device
    where = checks.device("device", where)
    if where.type == "meta":
        raise ValueError("device is meta, where tensors have no values: expected one to load the weights on")
    return where, device_map


_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


def spread(model: nn.Module, device_map: str | Mapping[str, Any], max_memory: dict[Any, Any] | None) -> None:
    """Place the parts of a model on devices, through accelerate; a ValueError if one would have none, or the disk."""
    try:
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import check_device_map, get_balanced_memory
    except ImportError:
        raise ImportError(f"device_map={device_map!r:.80} needs accelerate, which is not installed") from None
    if isinstance(device_map, str):
        options = {"no_split_module_classes": getattr(model, "_no_split_modules", None), "max_memory": max_memory}
        if device_map != "sequential":
            options["max_memory"] = get_balanced_memory(model, low_zero=device_map == "balanced_low_0", **options)
        device_map = infer_auto_device_map(model, **options)
    if "disk" in device_map.values():
        raise ValueError(f"the model does not fit into {max_memory or 'memory'}: this package keeps nothing on disk")
    check_device_map(model, device_map)
    devices = {str(device) for device in device_map.values()}
    if devices == {"cpu"}:
        return
    dispatch_model(model, dict(device_map), force_hooks=len(devices) > 1)
