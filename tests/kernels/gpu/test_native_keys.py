"""The keys with which C finds the plan of a call: equal if calls may share one, and none for what C cannot read."""

import struct

import pytest
import torch
from convnext_fast.kernels import native_plan, replaying
from convnext_fast.kernels.recording import record

X = torch.randn(8, 4)
VALUES = (
    None, True, False, 1, 0, -1, 1.0, 0.0, -0.0, 2**40, "", "gelu", "gelu\0", torch.float32, torch.bfloat16,
    (), (1,), (1, None), ((1,),), (X,), (X, X), (X[:4],), (X.t(),),
)  # fmt: skip


def test_keys_tell_values_apart():
    module = native_plan.library() or pytest.skip("needs a C compiler")
    keys = [module.key((X, value)) for value in VALUES]
    assert None not in keys
    assert len(set(keys)) == len(VALUES)
    copies = [module.key((X.clone(), tuple(value) if isinstance(value, tuple) else value)) for value in VALUES]
    assert copies == keys
    assert [replaying.kind_of((X, value)) is None for value in VALUES] == [False] * len(VALUES)


def test_a_key_is_made_of_every_fact_of_a_tensor():
    """As the C interface of PyTorch reads it: dimensions, dtype, device, alignment, then sizes and strides."""
    module = native_plan.library() or pytest.skip("needs a C compiler")
    tensor = torch.empty(65, dtype=torch.bfloat16)[1:].view(1, 4, 16).transpose(0, 2)
    facts, *rest = struct.unpack("7q", module.key((tensor,))[:56])
    number = {torch.bfloat16: 15}[tensor.dtype]
    assert facts == 9 | 3 << 8 | number << 16 | 0 << 24 | 0xFFFF << 32 | (tensor.data_ptr() % 16) << 48
    assert rest == [16, 4, 1, 1, 16, 64]


def test_the_switch_for_tf32_is_part_of_a_key():
    module = native_plan.library() or pytest.skip("needs a C compiler")
    switch = torch.backends.cuda.matmul
    switch.allow_tf32 = False
    exact = module.key((X,))
    switch.allow_tf32 = True
    try:
        assert module.key((X,)) != exact
    finally:
        switch.allow_tf32 = False
    assert module.key((X,)) == exact


@pytest.mark.parametrize("value", [[1], {}, 2**70, Ellipsis, "\ud800", torch.device("cpu"), (1, [2])], ids=repr)
def test_what_c_does_not_know_has_no_key(value):
    module = native_plan.library() or pytest.skip("needs a C compiler")
    assert module.key((X, value)) is None
    assert module.repeat({}, (X, value)) is NotImplemented


def test_subclasses_and_missing_memory_have_no_key():
    module = native_plan.library() or pytest.skip("needs a C compiler")

    class Wrapped(torch.Tensor):
        pass

    assert module.key((torch.randn(2).as_subclass(Wrapped),)) is None


def test_what_stands_for_a_tensor_has_its_key():
    """So that a call in a recording finds the plan of the same call outside of one."""
    module = native_plan.library() or pytest.skip("needs a C compiler")
    keys = []
    for x in (X, X.t(), X[:, 1:], torch.randn(3)[1:], torch.tensor(1.0), X.bfloat16(), torch.randn(2, 3, 4, 5).half()):
        record(lambda x, value: keys.append((module.key((x, value)), replaying.kind_of((x, value)))), (x, 1))
        assert keys.pop() == (module.key((x, 1)), replaying.kind_of((x, 1)))
