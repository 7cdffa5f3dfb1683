"""Run on hollow_gpu: count what is recorded for a new size, for weights of any strides and for a compiled model.

Prints a line of JSON.
"""

import copy
import ctypes
import json
from unittest import mock

import timm
import torch
from convnext_fast.kernels import replaying
from convnext_fast.kernels.recording import Plan
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.virtualized import V
from triton.runtime.jit import JITFunction

from convnext_fast import ConvNext, ConvNextConfig, fuse
from convnext_fast.backends import gpu
from convnext_fast.ops import block_group_operator
from convnext_fast.ops.compute import as_one_plan

launches = ctypes.CDLL(None).hollow_launches
launches.restype = ctypes.c_long
found = {}


def counted(call, *args):
    """(kernel launches, those that Triton's launcher worked out) of a call."""
    before = launches()
    with mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as run:
        call(*args)
    return [launches() - before, run.call_count]


def recorded(call, *args):
    """How many plans are recorded in a call."""
    with mock.patch.object(replaying, "record", side_effect=replaying.record) as record:
        call(*args)
    return record.call_count


def image(side):
    return torch.randn(2, 3, side, side, device="cuda", dtype=torch.bfloat16)


def step(model, x):
    model(x).sum().backward()


config = ConvNextConfig(num_stages=2, depths=[1, 4], hidden_sizes=[96, 384], num_labels=10)
model = ConvNext(config).to("cuda", torch.bfloat16)
model.eval()
with torch.no_grad():
    for side in (64, 64, 128, 128):
        model(image(side))
    copy.deepcopy(model).freeze()(image(64))
    found["a new size"], found["again"] = (counted(model, image(96)) for _ in range(2))

model.train()
for side in (64, 128):
    step(model, image(side))
found["a new size in training"] = [recorded(step, model, image(160)) for _ in range(2)]

timm_model = timm.create_model("convnext_atto", num_classes=10)
fuse(timm_model, strict=True)
for other in (model, timm_model):
    other = copy.deepcopy(other).to("cuda", torch.bfloat16, memory_format=torch.channels_last)
    step(other, image(64))
    other.eval()
    with torch.no_grad():
        other(image(64))
        (other if isinstance(other, ConvNext) else fuse(other)).freeze()
        other(image(64))

groups = [as_one_plan(each) for each in (block_group_operator._blocks_fwd, block_group_operator._blocks_bwd)]
compiled = torch.compile(model)
for _ in range(3):
    step(compiled, image(64))
found["compiled"] = [len(function.calls.native) for function in groups]
found["kinds"] = {
    name: [isinstance(plan, Plan) for plan in function.calls.kinds.values()]
    for name, function in vars(gpu).items()
    if getattr(function, "calls", None) and not function.calls._composed
}


def called():
    """Our operators and kernels that the compiled forward of a training step calls."""
    names = set()

    def capture(graph, inputs):
        names.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compiler.reset()
    torch.compile(model, backend=aot_autograd(fw_compiler=capture))(image(64))
    return sorted(name for name in names if "convnext_fast" in name or "triton_kernel" in name)


found["called"] = called()
with V.set_aot_compilation(True):
    found["called ahead of time"] = called()
print(json.dumps(found))
