"""Ways in which the weights of a frozen model may change; each takes a layer of it or all of its layers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def random_like(tensor):
    """Values of about the size of a parameter's."""
    fan_in = tensor[0].numel() if tensor.dim() > 1 else 1
    return torch.randn(tensor.shape, dtype=tensor.dtype) / fan_in**0.5


def another(layer):
    """A layer like this one, of other values."""
    if isinstance(layer, nn.Conv2d):
        options = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
        new = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, **options)
    else:
        new = nn.Linear(layer.in_features, layer.out_features)
    for parameter in new.to(layer.weight.dtype).parameters():
        parameter.data = random_like(parameter)
    return new.requires_grad_(False)


def replace_layer(holder, name):
    setattr(holder, name, another(getattr(holder, name)))


def swap_parameter(holder, name):
    layer = getattr(holder, name)
    layer.weight = nn.Parameter(random_like(layer.weight), requires_grad=False)


def swap_bias(holder, name):
    layer = getattr(holder, name)
    layer.bias = nn.Parameter(random_like(layer.bias), requires_grad=False)


def load_into_layer(holder, name):
    layer = getattr(holder, name)
    layer.load_state_dict(another(layer).state_dict())


def assign_into_layer(holder, name):
    layer = getattr(holder, name)
    layer.load_state_dict(another(layer).state_dict(), assign=True)


@torch.no_grad()
def add_in_place(holder, name):
    weight = getattr(holder, name).weight
    weight.add_(random_like(weight))


@torch.no_grad()
def copy_in_place(holder, name):
    bias = getattr(holder, name).bias
    bias.copy_(random_like(bias))


@torch.inference_mode()
def multiply_in_inference_mode(holder, name):
    getattr(holder, name).weight.mul_(-1)


@torch.no_grad()
def through_a_view(holder, name):
    getattr(holder, name).weight.view(-1)[::3].zero_()


def assign_data(holder, name):
    weight = getattr(holder, name).weight
    weight.data = random_like(weight)


def swap_tensors(holder, name):
    weight = getattr(holder, name).weight
    torch.utils.swap_tensors(weight, nn.Parameter(random_like(weight), requires_grad=False))


def into_data(holder, name):
    getattr(holder, name).weight.data.mul_(-1)


def into_an_element_of_data(holder, name):
    getattr(holder, name).bias.data[0] = 3


def through_an_alias(holder, name):
    getattr(holder, name).state_dict()["weight"].mul_(-1)


@torch.no_grad()
def foreach(holder, name):
    parameters = list(getattr(holder, name).parameters())
    torch._foreach_lerp_(parameters, list(map(random_like, parameters)), 0.5)


@torch.no_grad()
def set_memory(holder, name):
    weight = getattr(holder, name).weight
    weight.set_(random_like(weight))


def a_buffer_instead(holder, name):
    layer = getattr(holder, name)
    value = random_like(layer.weight)
    del layer.weight
    layer.register_buffer("weight", value)


def reset(holder, name):
    getattr(holder, name).reset_parameters()


def step(kind, **options):
    """A step of an optimizer on all parameters of the layer."""

    def change(holder, name):
        parameters = list(getattr(holder, name).parameters())
        for parameter in parameters:
            parameter.grad = random_like(parameter)
        kind(parameters, lr=0.5, **options).step()

    return change


def from_vector(holder, name):
    parameters = list(getattr(holder, name).parameters())
    vector = torch.cat([random_like(parameter).flatten() for parameter in parameters])
    nn.utils.vector_to_parameters(vector, parameters)


LAYER_CHANGES = {
    "layer replaced": replace_layer,
    "parameter swapped": swap_parameter,
    "bias swapped": swap_bias,
    "state_dict into a layer": load_into_layer,
    "state_dict assigned to a layer": assign_into_layer,
    "add_": add_in_place,
    "copy_": copy_in_place,
    "inference mode": multiply_in_inference_mode,
    "through a view": through_a_view,
    "data assigned": assign_data,
    "into data": into_data,
    "into an element of data": into_an_element_of_data,
    "through an alias": through_an_alias,
    "foreach": foreach,
    "set_": set_memory,
    "a buffer instead": a_buffer_instead,
    "reset_parameters": reset,
    "swap_tensors": swap_tensors,
    "SGD": step(torch.optim.SGD, foreach=False),
    "SGD, foreach": step(torch.optim.SGD, foreach=True),
    "SGD, fused": step(torch.optim.SGD, fused=True),
    "AdamW, fused": step(torch.optim.AdamW, fused=True),
    "vector_to_parameters": from_vector,
}
"""Called with the module that holds a convolution or a linear layer, and its name there."""


def changes_of(kinds, backends=("kernels", "aten")):
    """(kind, change, backend) of all, in which every two meet by default: half of them are thorough."""
    return [
        pytest.param(kind, change, backend, marks=() if (i + j + k) % 2 == 0 else pytest.mark.thorough)
        for (i, kind), (j, change), (k, backend) in itertools.product(*map(enumerate, (kinds, LAYER_CHANGES, backends)))
    ]


def averages():
    """Averages of models as `AveragedModel` makes them, by name: called with a model."""
    return {
        "average": AveragedModel,
        "moving average": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
    }
