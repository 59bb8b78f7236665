"""The dispatcher beside what torchtitan puts around a block: checkpoints, FSDP2, torch.compile."""

from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torchtitan.distributed import parallel_dims
from torchtitan.distributed.activation_checkpoint import ActivationCheckpointing, FullAC, SelectiveAC
from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
from torchtitan.distributed.spmd_types import set_current_spmd_mesh, set_spmd_meshes
from torchtitan.distributed.utils import get_spmd_backend, set_spmd_backend
from torchtitan.models.common.moe import MoE

from moe_dispatch.integrations.torchtitan import MoEDispatchTokenDispatcher, even_sharding, known_tokens
from moe_dispatch.testing import RankPool, RankThreads
from moe_dispatch.testing.counting import counting
from tests.support.compile import untraced
from tests.support.torchtitan.block import Decoder, Layer, new_block
from tests.support.torchtitan.runs import (
    Case,
    Run,
    block_over_ranks,
    off_by,
    on_one_process,
    over_ranks,
    run,
    together,
)
from tests.support.torchtitan.strict import without_casts

# torchtitan asks for autocast to float32, which torch's CPU has not.
AUTOCAST = "ignore:In CPU autocast, but the target dtype is not supported:UserWarning"
pytestmark = pytest.mark.filterwarnings(AUTOCAST)


class Reentrant(nn.Module):
    def __init__(self, block: MoE) -> None:
        super().__init__()
        self.layer = Layer(block)

    def forward(self, x_BlD: Tensor) -> Tensor:
        out = checkpoint(self.layer, x_BlD, use_reentrant=True)
        assert isinstance(out, Tensor)
        return out


def checkpointed(block: MoE, kind: type[ActivationCheckpointing]) -> nn.Module:
    model = Decoder(block)
    try:
        kind.Config().build().apply(model)
    finally:
        torch._C._dynamo.eval_frame._set_lru_cache(True)  # pyright: ignore[reportAttributeAccessIssue]
    return model


WAYS = {
    "full": lambda block: checkpointed(block, FullAC),
    "selective": lambda block: checkpointed(block, SelectiveAC),
    "reentrant": Reentrant,
}


def under(rank: int, case: Case, way: str) -> Run:
    return over_ranks(rank, case, WAYS[way])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("lengths", [(17, 1, 10, 5), (20, 0, 13, 0)])
def test_checkpoints_recompute_with_the_plan_or_the_tokens_of_their_forward(
    rank_threads: RankThreads, lengths: tuple[int, ...], is_known: bool, way: str
) -> None:
    """Backward runs outside of known_tokens, which ends with the forward here."""
    case = Case(3, lengths, 4, torch.float64, is_known)
    with without_casts(case.dtype):
        plain = together(rank_threads.run(over_ranks, 4, case), case)
        found = together(rank_threads.run(under, 4, case, way), case)
        assert off_by(found, on_one_process(case)) <= 1e-12
    assert all(map(torch.equal, found.experts, plain.experts))  # in the same order of rows


@untraced()
def sharded(rank: int, backend: str) -> Run:
    """Two rows for each of 4 data-parallel ranks, experts over 2 of them, as torchtitan parallelizes a model."""
    parallel_dims.device_type, before = "cpu", get_spmd_backend()
    set_spmd_backend(backend)
    sizes = {"dp_replicate": 1, "dp_shard": 4, "cp": 1, "tp": 1, "pp": 1, "ep": 2, "world_size": 4}
    dims = parallel_dims.ParallelDims(**sizes, spmd_backend=backend)  # type: ignore[arg-type]
    dims.build_mesh()
    block = new_block(MoEDispatchTokenDispatcher, torch.float32)
    block.parallelize(dims)
    model, everything = Decoder(block), Case(8, (9,), 1, torch.float32)
    with without_casts(torch.float32), ExitStack() as stack:
        if backend == "spmd_types":
            dense = dims.spmd_dense_mesh()
            set_spmd_meshes(dense_mesh=dense, sparse_mesh=dims.spmd_sparse_mesh())
            stack.enter_context(set_current_spmd_mesh(dense))
        else:
            apply_fsdp_to_decoder(
                model,  # type: ignore[arg-type]
                dims.get_mesh(["fsdp"]),
                param_dtype=torch.float32,
                reduce_dtype=torch.float32,
                pp_enabled=False,
                ep_degree=2,
                edp_mesh=dims.get_mesh(["efsdp"]),
            )
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)  # gloo has no other
        mine = [x_BLD[2 * rank : 2 * rank + 2] for x_BLD in everything.grid()]
        found = run(model, *mine, around=known_tokens(even_sharding(dims, batch=2, length=9), model))
    set_spmd_backend(before)
    whole = {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in found.weights.items()}
    return Run(found.y_BLD, found.dx_BLD, whole)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torchtitans_fsdp2_around_it_is_one_process(rank_pool: RankPool) -> None:
    runs = rank_pool.run(sharded, 4, "partial_dtensor", timeout=300)
    with without_casts(torch.float32):
        wanted = on_one_process(Case(8, (9,), 1, torch.float32))
    outputs, inputs = ([getattr(found, field) for found in runs] for field in ("y_BLD", "dx_BLD"))
    for found in runs:
        assert off_by(Run(torch.cat(outputs), torch.cat(inputs), found.weights), wanted) <= 1e-6  # measured: 1.4e-7


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_torchtitans_own_spmd_types_run_it(rank_pool: RankPool) -> None:
    runs = rank_pool.run(sharded, 4, "spmd_types", timeout=300)
    case = Case(8, (9,), 1, torch.float32)
    with without_casts(torch.float32):
        wanted = on_one_process(case)
    assert torch.allclose(torch.cat([found.y_BLD for found in runs]), wanted.y_BLD, atol=1e-6)
    assert torch.allclose(torch.cat([found.dx_BLD for found in runs]), wanted.dx_BLD, atol=1e-6)
    for place, experts in enumerate(zip(*(found.experts for found in runs), strict=True)):
        whole = torch.cat([experts[0] + experts[2], experts[1] + experts[3]])
        assert torch.allclose(whole, wanted.experts[place], rtol=1e-5, atol=1e-5)


@untraced()
def compiled(rank: int) -> tuple[bool, list[bool], str]:
    torch._dynamo.reset()
    case = Case(2, (4, 2), 2, torch.bfloat16)
    plain = over_ranks(rank, case, Layer)
    found = over_ranks(rank, case, lambda block: torch.compile(Layer(block), backend="aot_eager"))  # type: ignore[return-value]
    with pytest.raises(Unsupported) as refused:
        over_ranks(rank, case, lambda block: torch.compile(Layer(block), backend="eager", fullgraph=True))  # type: ignore[return-value]
    return (
        torch.equal(found.y_BLD, plain.y_BLD),
        list(map(torch.equal, found.experts, plain.experts)),
        str(refused.value),
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_it_is_a_graph_break_that_says_why(rank_pool: RankPool) -> None:
    for same_output, same_gradients, told in rank_pool.run(compiled, 2, timeout=300):
        assert same_output
        assert same_gradients == [True] * 3
        assert "moe_dispatch plans by the rows of each batch" in told


def collectives(rank: int, is_known: bool) -> tuple[int, int]:
    case = Case(2, (3, 1), 2, torch.bfloat16)
    block, of_group = block_over_ranks(case)
    x_BlD = case.whole.shard(case.grid()[0], rank).contiguous()
    with ExitStack() as stack, torch.no_grad():
        if is_known:
            stack.enter_context(known_tokens(of_group, block))
        with counting() as counts:
            block(x_BlD)
    return len(counts.collectives), len(counts.host_syncs)


def test_known_tokens_save_a_collective_and_a_wait_in_each_layer(rank_pool: RankPool) -> None:
    known, asked = (rank_pool.run(collectives, 2, is_known) for is_known in (True, False))
    assert [count for count, _ in known] == [3] * 2
    assert [(count - 1, waits - 1) for count, waits in asked] == known
