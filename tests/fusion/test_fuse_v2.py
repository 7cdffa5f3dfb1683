"""`fuse` on ConvNeXt V2 blocks as other libraries write them."""

from __future__ import annotations

import copy

import pytest
import torch
from fuse_support import check_bfloat16, check_float32, fused_calls, one_thread  # noqa: F401
from support import FLOAT32_BOUND, randomise, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2DropPath

from convnext_fast import fuse, unfuse


class OfficialNorm(nn.Module):
    """The official repository's response norm."""

    def __init__(self, hidden):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, hidden))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, hidden))

    def forward(self, x):
        norms = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return self.gamma * (x * (norms / (norms.mean(dim=-1, keepdim=True) + 1e-6))) + self.beta + x


class Official(nn.Module):
    """The official repository's block."""

    def __init__(self, channels):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.grn = OfficialNorm(4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.drop_path = ConvNextV2DropPath(0.4)

    def forward(self, x):
        n = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        z = self.pwconv2(self.grn(self.act(self.pwconv1(n))))
        return x + self.drop_path(z.permute(0, 3, 1, 2))


class EitherNorm(nn.Module):
    """A response norm of either layout, as OpenMMLab's."""

    def __init__(self, hidden, eps=1e-6):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(hidden))
        self.eps = eps

    def forward(self, x, data_format="channel_first"):
        pixels, units = ((1, 2), -1) if data_format == "channel_last" else ((2, 3), 1)
        shape = [1, 1, 1, 1]
        shape[units] = -1
        norms = x.norm(p=2, dim=pixels, keepdim=True)
        scaled = x * norms / (norms.mean(dim=units, keepdim=True) + self.eps)
        return self.gamma.view(shape) * scaled + self.beta.view(shape) + x


class Doubled(EitherNorm):
    """A norm with which a user may replace it."""

    def forward(self, x, **options):
        return 2 * super().forward(x, **options)


class LastRegistered(nn.Module):
    """OpenMMLab's block, of which the response norm is registered after the linear layers."""

    def __init__(self, channels, linear):
        super().__init__()
        self.depthwise_conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.linear_pw_conv = linear
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        sizes = (channels, 4 * channels), (4 * channels, channels)
        layers = [nn.Linear(*size) if linear else nn.Conv2d(*size, kernel_size=1) for size in sizes]
        self.pointwise_conv1, self.act, self.pointwise_conv2 = layers[0], nn.GELU(), layers[1]
        self.grn = EitherNorm(4 * channels)
        self.gamma = None
        self.drop_path = ConvNextV2DropPath(0.4)
        self.with_cp = False

    def forward(self, x):
        def inner(x):
            n = self.norm(self.depthwise_conv(x).permute(0, 2, 3, 1))
            if not self.linear_pw_conv:
                n = n.permute(0, 3, 1, 2)
            h = self.act(self.pointwise_conv1(n))
            h = self.grn(h, data_format="channel_last") if self.linear_pw_conv else self.grn(h)
            z = self.pointwise_conv2(h)
            if self.linear_pw_conv:
                z = z.permute(0, 3, 1, 2)
            return x + self.drop_path(z)

        return checkpoint(inner, x, use_reentrant=False) if self.with_cp and x.requires_grad else inner(x)


BLOCKS = {
    "official": Official,
    "registered last, linear": lambda channels: LastRegistered(channels, True),
    "registered last, convolutions": lambda channels: LastRegistered(channels, False),
}


def host(name):
    return randomise(nn.Sequential(BLOCKS[name](9), BLOCKS[name](9)))


@pytest.mark.parametrize("name", BLOCKS)
def test_agrees(name):
    model, x = host(name), torch.randn(6, 9, 7, 5)
    report = check_float32(copy.deepcopy(model), x)
    assert report.fused == ("0", "1")
    check_bfloat16(model, x)


@pytest.mark.parametrize("name", BLOCKS)
def test_frozen_and_unfused(name):
    model, x = host(name).eval(), torch.randn(2, 9, 7, 5)
    keys, expected = list(model.state_dict()), model(x)
    report = fuse(model, strict=True)
    assert fused_calls(model(x)) == 2
    with torch.no_grad():
        assert relative_error(report.freeze()(x), expected) <= FLOAT32_BOUND
    unfuse(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: setattr(block.grn, "eps", 1e-5), "eps of grn is now 1e-05, not 1e-06"),
        (lambda block: setattr(block, "grn", Doubled(36)), "grn is now .*Doubled, not .*EitherNorm"),
        (lambda block: block.grn.register_forward_hook(lambda *_: None), "hooks on grn"),
    ],
)
def test_changed_response_norms_are_called(change, reason):
    model, x = host("registered last, linear").eval(), torch.randn(2, 9, 7, 5)
    fuse(model)
    change(model[0])
    with pytest.warns(RuntimeWarning, match=reason):
        y = model(x)
    unfuse(model)
    assert relative_error(y, model(x)) <= FLOAT32_BOUND
