"""Instructions that launches execute, counted by an emulator of sm_80 (emulator.py).

The emulator runs the machine code on zeros in ordinary memory, so a pass is executed for 16 images, not for 128. They
still fill the 16 rows of every matrix product. The pass is planned for a chip with proportionally fewer processors, so
that its programs are as large as those for 128 images. A launch counts if both run the same compiled kernel.
"""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import torch
from convnext_fast.kernels.targets import PROCESSORS

from bench.static_analysis.analysis import analyse
from bench.static_analysis.compilation import Launch
from bench.static_analysis.counts import output_elements
from bench.static_analysis.emulator import emulator_path, import_emulator
from bench.static_analysis.recording import Buffer
from bench.static_analysis.sweep import Pass, collect

TARGET = "sm_80"
BATCH = 16


def instructions_per_output(chosen: list[Pass], **options: Any) -> dict[str, float]:
    """Thread instructions per element of the largest tensor that a launch writes, by the key of its kernel.

    For the kernels that the sm_80 passes in ``chosen`` launch at ``BATCH`` images; empty without the emulator.
    ``options``: ``side`` of `record`.
    """
    some = [each for each in chosen if each.target == TARGET]
    if not some or emulator_path() is None:
        return {}
    found = {}
    processors = max(1, PROCESSORS[TARGET] * BATCH // 128)
    with mock.patch.dict(PROCESSORS, {TARGET: processors}):
        kernels = list(collect(some, batch=BATCH, **options))
    for kernel in kernels:
        launch = kernel.launches[0]
        outputs = output_elements(launch, analyse(kernel.specialised))
        found[kernel.specialised.key] = _thread_instructions(launch) / max(outputs, 1)
    return found


def _thread_instructions(launch: Launch) -> int:
    memory = functools.cache(lambda storage, size: torch.zeros(size, dtype=torch.uint8))

    def operand(value: Any) -> Any:
        if not isinstance(value, Buffer):
            return value
        storage = memory(value.storage, value.storage_size)
        return storage[value.offset : value.offset + value.size].view(value.dtype)

    arguments = {name: operand(value) for name, value in launch.arguments.items()}
    with import_emulator().emulating(arch=80, detailed=False) as emulation:
        launch.kernel[launch.grid](**arguments, **launch.options)
    return emulation.launches[0].thread_instructions
