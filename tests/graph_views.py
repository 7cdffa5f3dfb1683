"""What tools that look at graphs see of a model: each takes the model and an image."""

from __future__ import annotations

from collections import Counter

import torch
from other_parameters import output
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.utils.source_matcher_utils import get_source_partitions
from torch.utils.flop_counter import FlopCounterMode

VIEWS = {}


def view(function):
    VIEWS[function.__name__] = function
    return function


def calls(graph_module):
    """How often what is called."""
    found = Counter()
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            found[type(graph_module.get_submodule(node.target)).__name__] += 1
        elif node.op.startswith("call"):
            found[str(node.target)] += 1
    return found


@view
def exported(model, x):
    return calls(torch.export.export(model, (x,)).graph_module)


@view
def modules_of_an_export(model, x):
    nodes = torch.export.export(model, (x,)).graph.nodes
    stacks = [node.meta.get("nn_module_stack") for node in nodes if node.op == "call_function"]
    return Counter(str(list(stack.values())[-1]) for stack in stacks if stack)


@view
def source_partitions(model, x):
    graph = torch.export.export(model, (x,)).graph
    return {str(kind): len(of) for kind, of in get_source_partitions(graph, [nn.Linear, nn.Conv2d]).items()}


@view
def made_by_make_fx(model, x):
    with torch.no_grad():
        return calls(make_fx(model)(x))


@view
def flops(model, x):
    with FlopCounterMode(display=False, depth=None) as counter:
        output(model, x)
    return {name: sum(of.values()) for name, of in counter.get_flop_counts().items()}


@view
def traced_by_jit(model, x):
    graph = torch.jit.trace(model, x, strict=False).inlined_graph
    return Counter(node.kind() for node in graph.nodes() if node.kind().startswith("aten"))


@view
def traced_symbolically(model, x):
    return calls(torch.fx.symbolic_trace(model))


@view
def quantised_by_fx(model, x):
    prepared = prepare_fx(model, get_default_qconfig_mapping(torch.backends.quantized.engine), (x,))
    output(prepared, x)
    return {name: count for name, count in calls(convert_fx(prepared)).items() if "built-in" not in name}


BY_SYMBOLS = {"traced_symbolically", "quantised_by_fx"}
"""What the models of transformers are too dynamic for."""
