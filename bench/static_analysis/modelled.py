"""Figures that nothing was timed for: modelled from the compiler's output, counts and data sheets."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch

from bench.machine_code import rows as kernel_rows
from bench.static_analysis.chips import CHIP_OF
from bench.static_analysis.counts import count
from bench.static_analysis.recording import record
from bench.static_analysis.sweep import Pass
from bench.timing import failure

PASSES = (("inference", 1), ("training", 1))
BATCH = 128


def rows(targets: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """ConvNeXt-T, bfloat16, 224², 128 images, for each target and pass.

    "modelled_ms": our kernels' modelled times added up, each the greater of bytes over bandwidth and FLOPs over peak;
    PyTorch's own operators between them, latency, caches and instruction issue are left out, so that a real time is
    longer.
    """
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    for target in targets:
        chip = CHIP_OF[target]
        sheet = {
            "chip": chip.name,
            "sheet": chip.source,
            "sheet_bandwidth": chip.bandwidth,
            "sheet_flops": chip.tensor_flops,
        }
        for mode, recompute in PASSES:
            row = {
                "key": f"modelled/{target}/{mode}",
                "section": "modelled",
                "target": target,
                "variant": "tiny",
                "batch": BATCH,
                "side": 224,
                "dtype": "bfloat16",
                "mode": mode,
                **sheet,
            }
            try:
                kernels = kernel_rows([Pass("tiny", "bf16", mode, recompute, target)], batch=BATCH)
                counts = count(
                    record("tiny", torch.bfloat16, mode=mode, recompute=recompute, target=target, batch=BATCH), target
                )
            except Exception as error:
                yield row | {"failure": failure(error)}
                continue
            times = [(kernel["modelled_us"], kernel["launches"]) for kernel in kernels]
            yield row | {
                "failure": None,
                "modelled_ms": sum(time * launches for time, launches in times if time is not None) / 1e3,
                "kernels_without_a_count": sum(time is None for time, _ in times),
                "megabytes_an_image": counts.megabytes,
                "launches": counts.launches,
                "saved_mb_an_image": counts.saved if mode == "training" else None,
            }
