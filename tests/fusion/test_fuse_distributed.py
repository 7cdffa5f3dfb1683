"""Fused models under DistributedDataParallel and FSDP2, in two processes on a CPU."""

from __future__ import annotations

import copy
import os

import torch
import torch.distributed as dist
from support import FLOAT32_BOUND, randomise, relative_error
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training_support import finish, start_ranks
from transformers import ConvNextConfig, ConvNextForImageClassification

from convnext_fast import fuse, unfuse


def blocks(model):
    return [layer for stage in model.convnext.encoder.stages for layer in stage.layers]


def fused(model):
    """Fuse and count blocks and patch layers."""
    report = fuse(model)
    return len(report.fused), len(report.patch_layers)


def losses(model, images, optimiser):
    """Three steps, each process on its half of the images; the mean losses of all."""
    rank, found = dist.get_rank(), []
    for _ in range(3):
        optimiser.zero_grad()
        loss = model(images.chunk(2)[rank]).logits.square().mean()
        loss.backward()
        optimiser.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        found.append(total / 2)
    return torch.stack(found)


def worker():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    config = ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 2], num_stages=2, num_labels=5)
    model = randomise(ConvNextForImageClassification(config))
    images = torch.randn(4, 3, 16, 24, generator=torch.Generator().manual_seed(1))

    def sgd(m):
        return torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9)

    def data_parallel(m):
        return DistributedDataParallel(m)

    def sharded(m):
        for part in [*blocks(m), *m.convnext.encoder.stages, m.convnext.embeddings, m]:
            fully_shard(part, mesh=mesh)
        return m

    plain = copy.deepcopy(model)
    expected = losses(DistributedDataParallel(plain), images, sgd(plain))
    for wrap in (data_parallel, sharded):
        twin = copy.deepcopy(model)
        assert fused(twin) == (3, 2)
        wrapped = wrap(twin)
        assert relative_error(losses(wrapped, images, sgd(wrapped)), expected) <= FLOAT32_BOUND, wrap.__name__
        assert fused(twin) == (3, 2)
    # The other way round: sharded first.
    late = sharded(copy.deepcopy(model))
    assert fused(late) == (3, 2)
    assert relative_error(losses(late, images, sgd(late)), expected) <= FLOAT32_BOUND
    unfuse(late)
    try:
        unfuse(twin)
    except ValueError as error:
        assert "call unfuse() before wrapping the model" in str(error)  # noqa: PT017
    else:
        raise AssertionError("unfuse did not see the class that fully_shard put on top")
    dist.destroy_process_group()
    # A Gloo thread may still release a tensor, which aborts a process whose interpreter is about to end
    # (pytorch#179291).
    os._exit(0)


def test_two_processes():
    assert finish(start_ranks(2, worker)) == [0, 0]
