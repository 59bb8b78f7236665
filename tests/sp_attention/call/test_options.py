"""Each option of attention is one record, and the few other places that name it."""

import inspect

import pytest
import torch
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankPool
from sp_attention import UlyssesAttention, scaled_dot_product, ulysses_attention
from sp_attention.call.option_records import OPTIONS, Option
from sp_attention.reference import reference_attention
from tests.support.compile import untraced
from tests.support.ranks import world
from tests.support.tensors import difference

SEQ = (3, 4)
ARE_NO_OPTIONS = {"sharding", "group", "kv_sharding", "heads", "attend", "cu_seqlens", "cu_seqlens_padded"}


def arguments_of(function: object) -> dict[str, inspect.Parameter]:
    """Those that are given by name."""
    assert callable(function)
    parameters = inspect.signature(function).parameters
    return {name: x for name, x in parameters.items() if x.kind is inspect.Parameter.KEYWORD_ONLY}


def test_the_records_are_the_options_of_the_call() -> None:
    assert {option.name for option in OPTIONS} == set(arguments_of(ulysses_attention)) - ARE_NO_OPTIONS


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_an_option_is_named_where_it_has_to_be(option: Option) -> None:
    """Four places: its record, the signatures, the attend that honours it, the reference."""
    assert not option.is_given(arguments_of(ulysses_attention)[option.name].default)
    of_module = [*arguments_of(UlyssesAttention), *arguments_of(UlyssesAttention.forward)]
    assert of_module.count(option.name) == 1
    assert option.name_in_attend in arguments_of(scaled_dot_product)
    assert option.name in arguments_of(reference_attention)


@untraced()
def with_every_option(rank: int) -> list[float]:
    """How far the compiled call, in one graph, is from the same call."""
    torch._dynamo.reset()
    length, dtype = sum(SEQ), torch.float64
    sharding = TokenSharding(batch=2, seq=Partition(SEQ))
    draw = torch.Generator().manual_seed(0)
    q_BlNH, k_BlGH = (torch.randn(2, SEQ[rank], n, 6, generator=draw, dtype=dtype) for n in (4, 2))
    options = {
        "is_causal": True,
        "window": (3, 0),
        "scale": 0.3,
        "attn_mask": torch.randn(4, length, length, generator=draw, dtype=dtype),
        "key_padding_mask": torch.arange(length).expand(2, -1) != 1,
        "sinks_N": torch.ones(4, dtype=dtype),
        "dropout_p": 0.5,
    }
    assert set(options) == {option.name for option in OPTIONS}

    def attention(*tensors: Tensor) -> Tensor:
        return ulysses_attention(*tensors, sharding=sharding, group=world(), **options)

    answers = []
    for run in (attention, torch.compile(attention, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (q_BlNH, k_BlGH, k_BlGH)]
        torch.manual_seed(7)
        out_BlNH = run(*leaves)
        answers.append([out_BlNH.detach(), *torch.autograd.grad(out_BlNH.square().sum(), leaves)])
    return [difference(got, wanted) for got, wanted in zip(*answers, strict=True)]


def test_a_call_with_every_option_compiles_into_one_graph(rank_pool: RankPool) -> None:
    for differences in rank_pool.run(with_every_option, 2, timeout=120):
        assert max(differences) < 1e-12
