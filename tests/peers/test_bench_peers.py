"""The benchmarks' eager model runs timm's operators on timm's shapes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from convnext_fast import ConvNext

timm = pytest.importorskip("timm")


class Operators(TorchDispatchMode):
    """Lists (name, number of elements of the first result, if there is one) of operators that compute."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, (tuple, list)) else out
        if not func.is_view and func.overloadpacket is not torch.ops.aten.as_strided_:
            self.seen.append((str(func), None if first is None else first.numel()))
        return out


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_eager_is_timms_list_of_operators(layout, training):
    image = torch.randn(2, 3, 64, 64).contiguous(memory_format=layout)
    lists = []
    for model in (timm.create_model("convnext_atto", conv_mlp=False), ConvNext("atto", fused=False)):
        model.train(training).to(memory_format=layout)
        with Operators() as operators:
            out = model(image)
            if training:
                out.backward(torch.ones_like(out))
        lists.append(Counter(operators.seen))
    # timm squeezes the pooled vector in place, and the backward of that copies it.
    pooled = 2 * 320
    squeeze = Counter({("aten.new_zeros.default", pooled): 1, ("aten.copy_.default", pooled): 1})
    assert lists[0] - lists[1] == (squeeze if training else Counter())
    assert lists[1] - lists[0] == Counter()
    assert lists[1].total() > 80
