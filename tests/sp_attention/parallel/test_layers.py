"""``Parallel.apply``: which layers it replaces, what stays of them, and what it refuses."""

import copy

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moe_dispatch import MoE, Partition, share_of_state_dict, whole_state_dict
from moe_dispatch.reference import ReferenceMoE
from moe_dispatch.testing import RankThreads
from sp_attention import Parallel, Scheme, UlyssesAttention
from sp_attention.reference import ReferenceAttention, reference_attention
from tests.support.plain import EXPERTS, Plain, blocks_of, new_model
from tests.support.ranks import refusal


def parallel_of_two() -> Parallel:
    return Parallel(sp=2, ep=2, device_type="cpu")


def applied(rank: int) -> None:
    parallel, model = parallel_of_two(), new_model()
    whole = copy.deepcopy(model.state_dict())
    blocks_of(model)[1].moe.experts = blocks_of(model)[0].moe.experts  # one in two layers
    blocks_of(model)[0].moe.experts.up_eDF.requires_grad_(False)
    blocks_of(model)[1].eval()
    state = torch.get_rng_state()
    parallel.apply(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(isinstance(x, ReferenceMoE | ReferenceAttention) for x in model.modules())
    first, second = (block.moe for block in blocks_of(model))
    assert isinstance(first, MoE)
    assert first.experts is second.experts
    assert first.experts.num_experts == (3, 2)[rank]
    assert first.experts.up_eDF.requires_grad is False
    assert first.experts.down_eFD.requires_grad
    assert (first.training, second.training, second.experts.training) == (True, False, False)
    assert first.experts.gate_eDF.untyped_storage().nbytes() == first.experts.gate_eDF.nbytes  # the whole is freed
    attention = blocks_of(model)[1].attention
    assert isinstance(attention, UlyssesAttention)
    assert (attention.is_causal, attention.window, attention.scale) == (True, (3, 0), 0.9)
    got = whole_state_dict(model)
    assert got.keys() == whole.keys()
    assert torch.equal(got["blocks.0.moe.experts.down_eFD"], whole["blocks.0.moe.experts.down_eFD"])


def test_layers_of_one_process_become_layers_over_ranks(rank_threads: RankThreads) -> None:
    rank_threads.run(applied, 2)


def loaded(rank: int) -> bool:
    with torch.device("meta"):
        model = Plain().double()
    parallel_of_two().apply(model)
    assert all(weight.is_meta for weight in model.parameters())
    whole = new_model().state_dict()
    model.load_state_dict(share_of_state_dict(whole, model), assign=True)
    assert blocks_of(model)[0].moe.experts.gate_eDF.shape[0] == (3, 2)[rank]
    return all(torch.equal(x, whole[name]) for name, x in whole_state_dict(model).items())


def test_a_model_on_meta_is_cut_before_it_is_loaded(rank_threads: RankThreads) -> None:
    assert rank_threads.run(loaded, 2) == [True, True]


def refused(rank: int) -> list[str]:
    parallel, hooked, again = parallel_of_two(), new_model(), new_model()
    blocks_of(hooked)[0].moe.register_forward_hook(lambda *_: None)
    parallel.apply(again)
    sharded = new_model()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    other = new_model() if rank else nn.Sequential(ReferenceAttention())
    texts = [
        refusal(lambda: parallel.apply(nn.Linear(2, 2))),
        refusal(lambda: parallel.apply(again)),
        refusal(lambda: parallel.apply(blocks_of(new_model())[0].moe)),
        refusal(lambda: parallel.apply(new_model(), experts=Partition((2, 2, 1)))),
        refusal(lambda: parallel.apply(new_model(), experts=Partition((2, 2)))),
        refusal(lambda: parallel.apply(hooked)),
        refusal(lambda: parallel.apply(sharded)),
        refusal(lambda: parallel.apply(new_model(), scheme=Scheme.two_dimensional(head_ranks=3))),
        refusal(lambda: parallel.apply(new_model(), scheme="ring")),  # type: ignore[arg-type]
        refusal(lambda: parallel.apply(new_model(), scheme=Scheme.ring() if rank else Scheme.gather())),
        refusal(lambda: parallel.apply(other)),
    ]
    wrong = new_model() if rank else nn.Linear(2, 2)
    return [*texts, refusal(lambda: parallel.apply(wrong))]


def test_what_cannot_be_spread_is_refused_on_every_rank(rank_threads: RankThreads) -> None:
    texts, others = rank_threads.run(refused, 2)
    assert texts == others
    wanted = (
        "no ReferenceMoE and no ReferenceAttention",
        "layers that were built with a group need no apply",
        "pass a module that holds it",
        "ep is 2; give it one size per rank of ep",
        f"blocks.0.moe has {EXPERTS} experts",
        "blocks.0.moe has hooks",
        "call apply before fully_shard",
        "teams of 3 head ranks in a group of 2",
        "pass a Scheme",
        "ranks disagree",
        "ranks disagree",
        "no ReferenceMoE",
    )
    for text, words in zip(texts, wanted, strict=True):
        assert words in text
    assert "rank 0" in texts[-1]


def test_a_module_of_reference_attention_is_the_function() -> None:
    q, k, v = (torch.randn(2, 5, heads, 4) for heads in (4, 2, 2))
    mask = torch.tensor([[True] * 4 + [False]] * 2)
    module = ReferenceAttention(is_causal=True, window=(2, 0), scale=0.3)
    wanted = reference_attention(q, k, v, is_causal=True, window=(2, 0), scale=0.3, key_padding_mask=mask)
    assert torch.equal(module(q, k, v, key_padding_mask=mask), wanted)
    assert repr(module) == "ReferenceAttention(is_causal=True, window=(2, 0), scale=0.3)"
