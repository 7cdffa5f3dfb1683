"""Run on hollow_gpu: measure what the first calls of a new size cost the host. Prints a line of JSON.

For each mode, CPU milliseconds, as medians over sizes whose kernels are compiled: "extra", the time of the first two
calls minus that of two later ones, and "later", the time of one later call.
"""

import gc
import json
import statistics
import time

import torch

from convnext_fast import ConvNext
from convnext_fast.backends import gpu

torch.backends.cudnn.enabled = False  # its library needs a real driver
DEVICE, DTYPE = "cuda", torch.bfloat16
SIZES = [(images, side) for images in (2, 4, 6) for side in (160, 192, 224, 256)]
CALLS, ROUNDS = 5, 3


def call_of(mode):
    model = ConvNext("tiny").to(DEVICE, DTYPE).train(mode == "training")
    parameters = list(model.parameters())
    if mode == "frozen":
        model.freeze()

    def call(x, gradient):
        if mode != "training":
            with torch.no_grad():
                model(x)
            return
        for parameter in parameters:
            parameter.grad = None
        model(x).backward(gradient)

    return call


def given(images, side):
    image = torch.randn(images, 3, side, side, device=DEVICE, dtype=DTYPE)
    return image, torch.randn(images, 1000, device=DEVICE, dtype=DTYPE)


def spent(call, *args):
    torch.cuda.synchronize()
    begun = time.process_time()
    call(*args)
    return 1e3 * (time.process_time() - begun)


def measured(mode):
    call = call_of(mode)
    for size in SIZES:
        call(*given(*size))
    extra, later = [], []
    for _ in range(ROUNDS):
        for function in vars(gpu).values():
            if hasattr(function, "calls"):
                function.calls.forget()
        for _ in range(CALLS):
            call(*given(1, 128))
        gc.collect()
        for size in SIZES:
            args = given(*size)
            taken = [spent(call, *args) for _ in range(CALLS)]
            later.append(statistics.median(taken[2:]))
            extra.append(taken[0] + taken[1] - 2 * later[-1])
    return {"extra": statistics.median(extra), "later": statistics.median(later)}


print(json.dumps({mode: measured(mode) for mode in ("inference", "frozen", "training")}))
