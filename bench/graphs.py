"""Whole passes of ConvNeXt as CUDA graphs, the time of each kernel in them, and rates of the chip."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from bench.static_analysis.resource_model import PASSES, VARIANT
from bench.variants import captured, random_weights
from convnext_fast import ConvNext, ConvNextConfig
from convnext_fast.measuring import seconds

SIDE = 224
REPLAYS = 5


def step_of_pass(name: str, device: torch.device) -> Callable[[], Any]:
    """One of ``resource_model.PASSES`` as a function: a forward and, in training, the backward to every parameter."""
    return _pass(name, device, graph=False)


def captured_pass(name: str, device: torch.device) -> Callable[[], Any]:
    """The same as a CUDA graph."""
    return _pass(name, device, graph=True)


def _pass(name: str, device: torch.device, graph: bool) -> Callable[[], Any]:
    made = PASSES[name]
    trains, autocast = made["mode"] == "training", made.get("autocast")
    config = ConvNextConfig.from_variant(VARIANT)
    model = ConvNext(config, device="meta", dtype=made["dtype"]).to_empty(device=device)
    model.load_state_dict(random_weights(config))
    model.train(trains)
    if not trains:
        model.freeze()
    image = torch.randn(made["batch"], config.num_channels, SIDE, SIDE, device=device).to(made["dtype"])
    gradient = torch.randn(made["batch"], config.num_labels, device=device)

    def run(image: torch.Tensor) -> torch.Tensor:
        if not trains:
            with torch.inference_mode():
                return model(image)
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, autocast) if autocast else contextlib.nullcontext():
            out = model(image)
        out.backward(gradient.to(out.dtype))
        return out.detach()

    if graph:
        run = captured(run, image, lambda: model.zero_grad(set_to_none=True))
    return lambda: run(image)


def kernel_events(replay: Callable[[], Any], device: torch.device) -> list[tuple[str, float]]:
    """(name, microseconds) of each kernel of a replay in order: the median replay of five.

    Raises:
        RuntimeError: the profiler saw no kernels, or not the same number in each replay.
    """
    from torch.profiler import ProfilerActivity, profile

    replay()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPLAYS):
            replay()
        torch.cuda.synchronize(device)
    events = [each for each in profiler.events() if each.device_type == torch.autograd.DeviceType.CUDA]
    events = [each for each in events if not each.name.startswith(("Memcpy", "Memset", "Context Sync"))]
    return in_order([(each.name, each.time_range.start, each.time_range.elapsed_us()) for each in events], REPLAYS)


def in_order(events: list[tuple[str, float, float]], replays: int) -> list[tuple[str, float]]:
    """(name, microseconds) by position in a replay: medians over ``replays`` of (name, start, microseconds) events."""
    events = sorted(events, key=lambda each: each[1])
    size, rest = divmod(len(events), replays)
    if not events or rest:
        raise RuntimeError(f"the profiler saw {len(events)} kernels in {replays} replays: expected the same in each")
    found = []
    for place in range(size):
        times = sorted(each[2] for each in events[place::size])
        found.append((events[place][0], times[replays // 2]))
    return found


@triton.jit
def _read_kernel(x_ptr, out_ptr, size, rounds, BLOCK: tl.constexpr):
    """Every program reads the whole of x ``rounds`` times, past the L1 cache, each from another place on."""
    columns = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    start = tl.program_id(0) * (size // tl.num_programs(0)) // BLOCK * BLOCK
    for step in range(0, rounds * size, BLOCK):
        place = (start + step) % size
        total += tl.load(x_ptr + place + columns, cache_modifier=".cg")
    tl.store(out_ptr + tl.program_id(0) * BLOCK + columns, total)


def chip_rates(device: torch.device) -> dict[str, float]:
    """Bytes a second of a 1 GiB copy and of reading the L2 cache, and seconds of a launch, plain and in a graph."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = min(seconds([lambda: target.copy_(source)], device) for _ in range(6))
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    size, rounds, block, programs = 4 << 20, 4, 4096, 2 * processors  # 16 MiB of 4-byte words
    x = torch.ones(size, dtype=torch.int32, device=device)
    out = torch.empty(programs * block, dtype=torch.int32, device=device)
    read = [
        seconds([lambda: _read_kernel[(programs,)](x, out, size, rounds, BLOCK=block, num_warps=8)], device)
        for _ in range(4)
    ]
    one, count = torch.zeros(1, device=device), 1000
    one.add_(1)
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    for _ in range(count):
        one.add_(1)
    launch = (time.perf_counter() - begun) / count
    replay = captured(lambda x: [x.add_(1) for _ in range(count)][-1], one, lambda: None)
    replay(one)
    in_graph = min(seconds([lambda: replay(one)], device) for _ in range(5)) / count
    return {
        "copy_bytes_s": 2 * source.numel() / max(copied, 1e-9),
        "l2_read_bytes_s": 4 * size * rounds * programs / max(min(read[1:]), 1e-9),
        "launch_s": launch,
        "launch_in_graph_s": in_graph,
    }
