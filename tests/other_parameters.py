"""Ways to give a whole model other parameters; each takes the model, the values by name, and an image.

Each returns what the model makes of the image, or gradients: a frozen model's must be those of a plain one.
"""

from __future__ import annotations

import copy
import io
import pickle

import torch
from fuse_support import tensors
from support import no_worse_together, randomise
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.optim.swa_utils import update_bn

from convnext_fast import fuse

WAYS = {}


def way(function):
    WAYS[function.__name__] = function
    return function


def first(output):
    return tensors(output)[0]


@torch.no_grad()
def output(model, x):
    return first(model(x))


def called(model, values, x):
    return first(functional_call(model, values, x))


def flat(gradients):
    return torch.cat([each.flatten() for each in gradients])


@torch.no_grad()
def write(model, values):
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name])


class Swapped:
    """While `torch.nn.Module.to` and ``load_state_dict`` swap tensors."""

    def __enter__(self):
        torch.__future__.set_swap_module_params_on_conversion(True)

    def __exit__(self, *_):
        torch.__future__.set_swap_module_params_on_conversion(False)


@way
@torch.no_grad()
def functional_calls(model, values, x):
    """With changed values, changed in place, and back to its own."""
    found = [called(model, values, x), called(model, {name: -value for name, value in values.items()}, x)]
    values = {name: value.clone() for name, value in values.items()}
    for _ in range(2):
        found.append(called(model, values, x))
    for value in values.values():
        value.data.mul_(-1.1)
    return torch.stack([*found, called(model, values, x), output(model, x)])


@way
@torch.no_grad()
def functional_call_with_some(model, values, x):
    return called(model, dict(list(values.items())[::3]), x)


@way
def gradients_of_a_functional_call(model, values, x):
    values = {name: value.clone().requires_grad_() for name, value in values.items()}
    return flat(torch.autograd.grad(called(model, values, x).square().sum(), list(values.values())))


@way
def torch_func_grad(model, values, x):
    return flat(grad(lambda values: called(model, values, x).square().sum())(values).values())


@way
def forward_mode(model, values, x):
    return jvp(lambda values: called(model, values, x), (values,), (values,))[1]


@way
def an_ensemble(model, values, x):
    other = copy.deepcopy(model)
    write(other, values)
    parameters, buffers = stack_module_state([model, other])
    base = copy.deepcopy(model).to("meta")
    return vmap(lambda *state: first(functional_call(base, state, x)))(parameters, buffers).detach()


@way
def parameters_set(model, values, x):
    for name, parameter in list(model.named_parameters()):
        path, _, last = name.rpartition(".")
        new = nn.Parameter(values[name], requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(path), last, new)
    return output(model, x)


@way
def data_assigned(model, values, x):
    for name, parameter in model.named_parameters():
        parameter.data = values[name]
    return output(model, x)


@way
def data_held(model, values, x):
    """Read once, written to between calls."""
    found, held = [], {name: parameter.data for name, parameter in model.named_parameters()}
    for _ in range(2):
        for name, data in held.items():
            data.lerp_(values[name], 0.5)
        found.append(output(model, x))
    return torch.stack(found)


@way
def momentum_by_data(model, values, x):
    for name, parameter in model.named_parameters():
        parameter.data.mul_(0.9).add_(values[name].data, alpha=0.1)
    return output(model, x)


@way
def moving_average_of_a_state_dict(model, values, x):
    for name, value in model.state_dict().items():
        if name in values:
            value.copy_(0.9 * value + 0.1 * values[name])
    return output(model, x)


@way
@torch.no_grad()
def foreach(model, values, x):
    parameters = dict(model.named_parameters())
    torch._foreach_lerp_(list(parameters.values()), [values[name] for name in parameters], 0.3)
    return output(model, x)


@way
@torch.inference_mode()
def inference_mode(model, values, x):
    write(model, values)
    return first(model(x)).clone()


@way
def loaded(model, values, x):
    model.load_state_dict(values, strict=False)
    return output(model, x)


@way
def loaded_by_assignment(model, values, x):
    model.load_state_dict(values, strict=False, assign=True)
    return output(model, x)


@way
def loaded_by_swapping(model, values, x):
    with Swapped():
        model.load_state_dict(values, strict=False)
    return output(model, x)


@way
def converted_by_swapping(model, values, x):
    with Swapped():
        model.bfloat16()
        write(model, values)
        model.to(x.dtype)
    return output(model, x)


@way
def converted(model, values, x):
    found = output(model.double(), x.double())
    return torch.stack([found, output(model.bfloat16().double(), x.double())])


@way
def emptied(model, values, x):
    model.to_empty(device="cpu")
    write(model, values)
    return output(model, x)


@way
def initialised(model, values, x):
    model.apply(lambda layer: nn.init.constant_(layer.weight, 0.1) if isinstance(layer, nn.Linear) else None)
    return output(model, x)


@way
def copies(model, values, x):
    """A deep copy and what pickle and `torch.save` bring back change alone."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)
    found = []
    for twin in twins:
        found.append(output(twin, x))
        for name, parameter in twin.named_parameters():
            parameter.data.lerp_(values[name], 0.5)
        found.append(output(twin, x))
    return torch.stack([*found, output(model, x)])


@way
def a_shallow_copy(model, values, x):
    twin = copy.copy(model)
    write(model, values)
    return output(twin, x)


@way
def update_of_batch_norms(model, values, x):
    write(model, values)
    update_bn([x], model)
    return output(model, x)


@way
def exported(model, values, x):
    program = torch.export.export(model, (x,)).module()
    found = output(program, x)
    write(program, values)
    return torch.stack([found, output(program, x)])


@way
def trained_again(model, values, x):
    model.requires_grad_(True)
    parameters = list(model.parameters())
    y = first(model(x))
    return torch.cat([y.flatten(), flat(torch.autograd.grad(y.square().sum(), parameters))]).detach()


def plain(made):
    model = randomise(made()).eval()
    model.fused = False
    return model


def frozen(made):
    model = randomise(made()).eval()
    return model.freeze() if hasattr(model, "freeze") else fuse(model).freeze().model


def check_way(name, made):
    """Against the plain model, whose error is measured in float64; up to three draws together, for luck decides one."""
    values = {name: value.detach() for name, value in randomise(made(), seed=1).named_parameters()}
    draws = []
    for seed in (2, 3, 4):
        x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        model = frozen(made)
        output(model, x)
        got = result_of(name, model, values, x)
        exact, eager = (result_of(name, plain(made), values, x, dtype) for dtype in (torch.float64, torch.float32))
        draws.append((got, exact, eager))
        if no_worse_together(draws):
            return
    raise AssertionError(f"{name} errs more than twice as much as eager in {len(draws)} draws together")


def result_of(name, model, values, x, dtype=torch.float32):
    """What the way ``name`` gives in ``dtype``."""
    own = {name: value.to(dtype, copy=True) for name, value in values.items()}
    return WAYS[name](model.to(dtype), own, x.to(dtype))
