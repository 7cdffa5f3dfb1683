"""Run on hollow_gpu with recording_driver.c: compare the launches of our C code with those of Triton's own launcher.

Every kernel call of a training step and of a frozen model's forward is repeated twice, by Python with Triton's launcher
and by C. Prints how many launches were compared.
"""

import ctypes

import torch
import triton
from convnext_fast.kernels import native_plan
from convnext_fast.kernels.recording import Part
from convnext_fast.kernels.replaying import description

import convnext_fast
from convnext_fast.backends import gpu

driver = ctypes.CDLL("libcuda.so.1")


class Noted(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64 * count) for name, count in (("where", 10), ("parameters", 1), ("values", 64))]


driver.noted_launch.restype = ctypes.POINTER(Noted)


def launches():
    """What was recorded since the last call: (function, grid, block, shared, stream, attributes), parameters."""
    noted = [driver.noted_launch(i)[0] for i in range(driver.noted_launches())]
    found = [(tuple(each.where), tuple(each.values[: each.parameters[0]])) for each in noted]
    driver.forget_launches()
    return found


class Compared:
    """Replaces C's ``repeat`` in the calls of a function."""

    total = 0

    def __init__(self, calls):
        self.calls, self.repeat = calls, calls.repeat
        for plan in filter(None, calls.kinds.values()):
            self.take_sizes(plan)

    def take_sizes(self, plan):
        for launch in plan.launches:
            if isinstance(launch, Part):
                self.take_sizes(launch.plan)
                continue
            sizes = native_plan._sizes(launch.kernel.asm["ptx"])
            driver.take_sizes(ctypes.c_uint64(launch.kernel.function), len(sizes), (ctypes.c_int * len(sizes))(*sizes))

    def __call__(self, plans, args):
        plan = self.calls.kinds.get(description(args))
        if plan is None:
            return NotImplemented
        launches()
        by_python = plan.repeat(args)
        expected = launches()
        del by_python  # so that C gets the same memory
        results = self.repeat(plans, args)
        got = launches()
        assert results is not NotImplemented
        assert expected, "nothing was launched"
        assert all(parameters for _, parameters in expected), "a kernel's parameters are not known"
        assert got == expected, f"{self.calls.function.__name__}:\n{got}\n{expected}"
        Compared.total += len(got)
        return results


def step(model, frozen, x, dtype):
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != x.dtype):
        model(x).sum().backward()
        with torch.no_grad():
            frozen(x)


def main():
    torch.backends.cudnn.enabled = False  # its library needs a real driver
    config = convnext_fast.ConvNextConfig(num_stages=2, depths=[1, 1], hidden_sizes=[96, 384], drop_path_rate=0.1)
    functions = [getattr(gpu, name) for name in dir(gpu) if hasattr(getattr(gpu, name), "calls")]
    for function in functions:
        function.calls.wait = 0
    for dtypes, recompute in (((torch.bfloat16, torch.bfloat16), 0), ((torch.float32, torch.bfloat16), 2)):
        model, frozen = (convnext_fast.ConvNext(config).to("cuda", dtypes[0]) for _ in range(2))
        model.recompute = recompute
        frozen.eval().freeze()
        x = torch.randn(2, 3, 64, 96, device="cuda", dtype=dtypes[0])
        for _ in range(3):
            step(model, frozen, x, dtypes[1])
        called = [function.calls for function in functions if function.calls.native]
        kept = [calls.repeat for calls in called]
        for calls in called:
            calls.repeat = Compared(calls)
        for stream in (None, torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                step(model, frozen, x, dtypes[1])
        for calls, repeat in zip(called, kept, strict=True):
            calls.repeat = repeat
    print(f"compared {Compared.total} launches of Triton {triton.__version__}")


main()
