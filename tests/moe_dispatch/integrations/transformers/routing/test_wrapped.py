"""FSDP2 around a model over ranks, and DDP around a plain one: a record of one process replays.

In the sweep: both need ranks that are processes, and each of them imports Transformers.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moe_dispatch import RoutingRecord
from moe_dispatch.integrations.transformers import record_routing, replay_routing
from moe_dispatch.testing import RankPool
from sp_attention.integrations.transformers import Parallel
from tests.support.ranks import world
from tests.support.tensors import grad_of
from tests.support.transformers.cases import batch_of
from tests.support.transformers.models import FAMILIES
from tests.support.transformers.routing import Recompute, forced, model_of, record_of, routers, trained

pytestmark = [pytest.mark.sweep, pytest.mark.filterwarnings("ignore::UserWarning")]

DTYPE, BATCH = torch.float32, batch_of("plain")


def under_fsdp2(rank: int, name: str, record: RoutingRecord, recompute: Recompute) -> list[Tensor]:
    """The gradients of routers."""
    parallel, model = Parallel(dp=2, sp=2, ep=2, device_type="cpu"), model_of(name, DTYPE, True, recompute)
    parallel.apply(model)
    for layer in model.model.layers:
        parallel.fully_shard(layer)
    parallel.fully_shard(model)
    step = parallel.shard(**BATCH, lengths=(21, 12))
    with record_routing(model) as again, replay_routing(model, record):
        out = model(**step.inputs)
    parallel.loss(model, out, step).share.backward()
    parallel.sum_gradients(model)
    assert again.gather(world()) == record
    gradients: list[Any] = [grad_of(router.weight) for router in routers(model)]
    assert all(isinstance(gradient, DTensor) for gradient in gradients)
    return [gradient.full_tensor() for gradient in gradients]


@pytest.mark.parametrize("recompute", [None, True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_fsdp2_around_a_model_over_ranks(rank_pool: RankPool, name: str, recompute: Recompute) -> None:
    record = record_of(name, DTYPE, BATCH)
    model = forced(name, DTYPE, record)
    trained(model, BATCH)
    wanted = [grad_of(router.weight) for router in routers(model)]
    for gradients in rank_pool.run(under_fsdp2, 4, name, record, recompute, timeout=200):
        for got, gradient in zip(gradients, wanted, strict=True):
            assert float((got - gradient).norm()) <= 5e-5 * float(gradient.norm())


def under_ddp(rank: int, record: RoutingRecord) -> bool:
    """A model that is whole on each rank, with the same batch."""
    model = DistributedDataParallel(model_of("mixtral", DTYPE, True))
    with record_routing(model) as again, replay_routing(model, record):
        model(**BATCH, use_cache=False).loss.backward()
    return again == record


def test_ddp_around_a_plain_model(rank_pool: RankPool) -> None:
    assert rank_pool.run(under_ddp, 2, record_of("mixtral", DTYPE, BATCH), timeout=200) == [True, True]
