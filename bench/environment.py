"""What a measurement ran on: the device, versions, the commit, and the rates that its times are compared with."""

from __future__ import annotations

import dataclasses
import platform
import re
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from bench.static_analysis.chips import CHIP_OF
from convnext_fast.measuring import seconds

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("triton", "llvmlite", "numpy", "onnx", "onnxruntime", "openvino")
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Drivers' names of the chips whose data sheets are in `chips`; other chips are compared with measured rates.
_SHEETS = {
    "A100-SXM4-80GB": "sm_80",
    "H100 80GB HBM3": "sm_90",
    "B200": "sm_100",
    "GeForce RTX 5090": "sm_120",
    "MI300X": "gfx942",
}


@dataclasses.dataclass(frozen=True)
class Roofline:
    """What times are compared with: FLOP/s of matrix products by dtype, and bytes/s of memory.

    ``source`` says where the figures come from.
    """

    flops: dict[str, float]
    bandwidth: float
    source: str

    def seconds(self, flops: float, moved: float, dtype: str) -> float:
        """The least time that the work can take."""
        return max(flops / self.flops[dtype], moved / self.bandwidth)


def device_name(device: torch.device) -> str:
    """The device's name in the driver or the operating system."""
    if device.type != "cpu":
        return str(getattr(torch, device.type).get_device_name(device))
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1].strip() if found else platform.machine()


def commit() -> str:
    """The commit of the checkout, with ``+`` if tracked files have changed since; "unknown" without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "bench", "convnext_fast", "kernels")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def facts(device: torch.device) -> dict[str, object]:
    """Device, versions and commit, which are in every row of the results."""
    found: dict[str, object] = {"device": device_name(device), "commit": commit(), "torch": torch.__version__}
    if device.type == "cpu":
        found |= {"threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    if torch.version.cuda or torch.version.hip:
        found["cuda" if torch.version.cuda else "rocm"] = torch.version.cuda or torch.version.hip
    found |= {name: version(name) for name in PACKAGES if version(name)}
    return found | {"python": platform.python_version()}


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [32 << 20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]] if text[-1] in "KM" else int(text))
    return max(sizes[1:] or sizes)


def measured_rates(device: torch.device, dtypes: tuple[str, ...]) -> Roofline:
    """Rates of this device, measured: the best square matrix product of each dtype, and copying memory."""
    side = 8192 if device.type == "cuda" else 2048
    flops = {}
    for name in dtypes:
        a, b = (torch.randn(side, side, device=device).to(DTYPES[name]) for _ in range(2))
        flops[name] = 2 * side**3 / _best(lambda a=a, b=b: torch.mm(a, b), device)
        del a, b
    count = max(256 << 20, 4 * cache_bytes(device)) // 4
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    bandwidth = 8 * count / _best(lambda: target.copy_(source), device)
    return Roofline(flops, bandwidth, f"measured in this run: {side}×{side} products, copying {count >> 18} MiB")


def roofline(device: torch.device, measured: Roofline) -> Roofline:
    """The chip's data sheet if it is in `chips`, otherwise the measured rates."""
    name = device_name(device)
    target = next((target for known, target in _SHEETS.items() if known in name), None)
    if device.type != "cuda" or target is None:
        return measured
    from convnext_fast.kernels.dtypes import dot_precision  # needs Triton, which a CPU's benchmarks do without

    chip = CHIP_OF[target]
    fp32 = chip.tf32_flops if dot_precision(torch.float32) == "tf32" else chip.fp32_flops
    rates = {"float32": fp32, "bfloat16": chip.tensor_flops, "float16": chip.tensor_flops}
    return Roofline(rates, chip.bandwidth, f"data sheet: {chip.name}")


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of six calls, since the result is used as a limit."""
    return min(seconds([call], device) for _ in range(6))
