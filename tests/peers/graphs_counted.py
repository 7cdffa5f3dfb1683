"""Run on hollow_gpu: count what frozen runs and training steps launch as CUDA graphs. Prints a line of JSON."""

import copy
import ctypes
import json
import pickle
import threading
import warnings

import timm
import torch
import transformers
from triton import knobs

from convnext_fast import ConvNext, ConvNextConfig, fuse, graphed

process = ctypes.CDLL(None)
COUNTERS = process.hollow_launches, process.hollow_graph_launches
for counter in COUNTERS:
    counter.restype = ctypes.c_long
SIZES = {"num_stages": 2, "depths": [1, 2], "hidden_sizes": [96, 384], "num_labels": 10}
found = {}


def counted(call, *args):
    """(kernel launches, graph launches) of a call."""
    before = [counter() for counter in COUNTERS]
    call(*args)
    return [counter() - count for counter, count in zip(COUNTERS, before, strict=True)]


def graphs(call, *args, calls=1):
    """The graph launches of each of some calls."""
    return [counted(call, *args)[1] for _ in range(calls)]


def image(side=64, batch=1):
    return torch.randn(batch, 3, side, side + 32, device="cuda", dtype=torch.bfloat16)


def frozen(**options):
    return ConvNext(ConvNextConfig(**SIZES)).to("cuda", torch.bfloat16).freeze(cuda_graph=True, **options)


def timm_model(**options):
    return timm.models.ConvNeXt(depths=(1, 1, 1, 1), dims=(96, 384, 96, 384), **options)


def warned(call, *args):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*args)
    return [str(each.message) for each in caught]


def addresses(model):
    return [p.grad.data_ptr() for p in model.parameters()]


def refused(call, *args):
    try:
        call(*args)
    except ValueError as error:
        return str(error)


@torch.no_grad()
def replays():
    model, x = frozen(), image()
    maps = frozen().forward_features(x)
    found["head"] = counted(model.head, maps)
    found["calls"] = [counted(model, x) for _ in range(4)]
    kept = [model.forward_features(x) for _ in range(3)]
    found["memories"] = len({y.data_ptr() for y in kept})
    found["format"] = kept[0].stride() == maps.stride()
    found["ends"] = graphs(model.run_whole, (model.stem, model.stages), x, calls=4)
    found["maps"] = graphs(model.forward_intermediates, x, calls=4)
    with torch.inference_mode():
        found["inference_mode"] = graphs(model, x)
    with torch.enable_grad():
        found["a gradient"] = [*graphs(model, x), *graphs(model, image().requires_grad_())]
    knobs.runtime.launch_enter_hook = lambda *_: None
    found["launch hooks"] = graphs(model, x)
    knobs.runtime.launch_enter_hook = None
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        found["a capture"] = [counted(model.forward_features, x)[0] > 5, *graphs(model, x)]
    found["after it"] = graphs(model, x)

    def several():
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                model(x)

    threads = [threading.Thread(target=torch.no_grad()(several)) for _ in range(4)]
    before = COUNTERS[1]()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found["threads"] = COUNTERS[1]() - before
    for name, same in (("copy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        found[name] = graphs(same, x, calls=4)
    found["frozen again"] = graphs(model.freeze(), x, calls=4)
    model.freeze(cuda_graph=True)
    found["unfrozen"] = graphs(model.unfreeze(), x, calls=4)


@torch.no_grad()
def shapes():
    model, images = frozen(), [image(64 + 32 * i) for i in range(9)]
    found["eight shapes"] = [graphs(model, x, calls=3)[-1] for x in images[:8]]
    model(images[0])
    found["the ninth"] = graphs(model, images[8], calls=3)
    found["the first, used since"] = graphs(model, images[0])
    found["the second"] = graphs(model, images[1], calls=3)


@torch.no_grad()
def changes():
    model, x = frozen(), image()
    weight, stem = model.stages[1].blocks[0].mlp.fc1.weight, model.stem[0].weight
    found["before changes"] = graphs(model, x, calls=3)
    weight.mul_(2)
    found["a weight in place"] = graphs(model, x, calls=3)
    stem.mul_(2)
    found["the stem in place"] = graphs(model, x)
    stem.data = stem.data.clone()
    found["the stem moved"] = graphs(model, x, calls=3)
    hook = model.stages[1].blocks[1].mlp.fc1.register_forward_hook(lambda *_: None)
    found["why not"] = warned(model, x)
    found["hooks"] = graphs(model, x, calls=4)
    hook.remove()


@torch.no_grad()
def hosts():
    x = image()
    model = timm_model().to("cuda", torch.bfloat16)
    fuse(model, strict=True).freeze(cuda_graph=True)
    found["timm"] = [counted(model, x) for _ in range(4)]
    config = transformers.ConvNextConfig(**{**SIZES, "hidden_sizes": [96, 384]})
    model = transformers.ConvNextForImageClassification(config).to("cuda", torch.bfloat16)
    report = fuse(model, strict=True).freeze()
    found["transformers, not asked"] = graphs(model, x, calls=4)
    report.freeze(cuda_graph=True)
    found["transformers"] = [counted(model, x) for _ in range(4)]


def training():
    model = ConvNext(ConvNextConfig(**SIZES, drop_path_rate=0.5)).cuda().train()
    x = image(batch=4).float()

    def step(model=model, x=x):
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            y = model(x)
        y.float().sum().backward()
        return y

    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        found["same"] = graphed(model, x) is model
    found["no gradients"] = all(p.grad is None for p in model.parameters())
    found["refused"] = [refused(graphed, model, x.cpu())]
    with torch.autocast("cuda", torch.bfloat16):
        found["refused"].append(refused(graphed, model, x))
    generator = torch.cuda.default_generators[0]
    found["warnings"] = warned(step)
    offset = generator.get_offset()
    first = addresses(model)
    model.zero_grad()
    found["step"] = counted(step)
    found["drawn anew"] = generator.get_offset() > offset
    found["in the graph"] = addresses(model) == first
    found["accumulating"] = counted(step)[1]
    found["own gradients"] = not set(addresses(model)) & set(first)
    held = [p.grad for p in model.parameters()]
    step()
    found["the same own ones"] = all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))
    found["fresh"] = len({y.data_ptr() for y in [step(), step()]})
    found["other shape"] = counted(step, model, x[:3])[1]
    with torch.no_grad():
        found["evaluation"] = graphs(model.eval(), x)
    model.train()
    found["back"] = counted(step)[1]
    for name, same in (("graphed copy", copy.deepcopy(model)), ("graphed pickle", pickle.loads(pickle.dumps(model)))):
        same.zero_grad()
        found[name] = [counted(step, same)[1], all(p.grad is not None for p in same.parameters())]
    found["anew"] = [counted(step, graphed(model, x[:3]), x[:3])[1], counted(step)[1]]
    model.stem[0].weight.data = model.stem[0].weight.data.clone()
    found["moved"] = [warned(step, model, x[:3]), counted(step, model, x[:3])[1]]
    fused = fuse(timm_model(drop_path_rate=0.1).cuda().train(), strict=True).model
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        graphed(fused, x)
    fused.zero_grad()
    found["timm training"] = counted(step, fused)


torch.backends.cudnn.enabled = False  # its library needs a real driver
for scenario in (replays, shapes, changes, hosts, training):
    scenario()
print(json.dumps(found))
