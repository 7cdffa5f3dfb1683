"""Tests of the kernels in Triton's interpreter, which must be chosen before Triton is imported.

Run them in a process of their own: ``TRITON_INTERPRET=1 pytest tests/kernels/gpu/interpreter``. Without the variable,
nothing here is collected.
"""

import os
import sys

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def last_program(request, monkeypatch):
    """The first launch runs only its last program, the others nothing, on memory that is reserved and never filled.

    For tensors of more than 2³¹ elements of which only the end is accessed. Returns ``torch.empty`` without poison. An
    indirect parameter is the number of the launch that runs instead of the first.
    """
    from triton.runtime.interpreter import interpreter_builder

    reserve = torch._C._VariableFunctions.empty
    monkeypatch.setattr(torch, "empty", reserve)
    monkeypatch.setattr(torch, "empty_like", torch._C._VariableFunctions.empty_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch._C.TensorBase.new_empty)
    set_grid_dim, set_grid_idx = interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx
    grids = []
    chosen = getattr(request, "param", 0)

    def launch(kernel, grid, *args, **meta):
        grids.append((*grid, 1, 1)[:3])
        if len(grids) == chosen + 1:
            kernel[(1,)](*args, **meta)

    monkeypatch.setattr(interpreter_builder, "set_grid_dim", lambda *_: set_grid_dim(*grids[-1]))
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda *_: set_grid_idx(*(n - 1 for n in grids[-1])))
    for name, module in list(sys.modules.items()):
        if name.startswith("convnext_fast.kernels.") and hasattr(module, "launch") and not name.endswith("launching"):
            monkeypatch.setattr(module, "launch", launch)
    return reserve


class Allocated(list):
    """What launchers allocate, in order; ``prepare`` may write to a new tensor."""

    @staticmethod
    def prepare(new):
        pass


@pytest.fixture
def allocated(last_program, monkeypatch):
    made = Allocated()

    def allocate(like, *sizes, dtype=None, **options):
        new = last_program(*sizes, dtype=dtype or like.dtype, **options)
        if not options:  # Triton's interpreter gives a device
            made.prepare(new)
            made.append(new)
        return new

    monkeypatch.setattr(torch.Tensor, "new_empty", allocate)
    return made
