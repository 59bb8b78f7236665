"""torch's context parallel as a contender: right, told what to do, and what it sends."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch.distributed as dist

from moe_dispatch.lab.bench.config import AttentionConfig
from moe_dispatch.lab.bench.contenders.protocol import NotApplicable
from moe_dispatch.lab.bench.contenders.torch_ring import TEMPLATES, TorchRing
from moe_dispatch.lab.bench.measure import Run
from moe_dispatch.lab.bench.workloads.attention import AttentionWorkload, Order
from moe_dispatch.lab.bench.workloads.of_config import cases_of
from moe_dispatch.testing import RankPool
from moe_dispatch.testing.counting import counting, run_backward
from tests.support.lab.bench_workloads import CAUSAL

ALL = [(rotate, order) for rotate in ("ALL_GATHER", "ALL_TO_ALL") for order in ("contiguous", "zigzag")]


def differences(config: AttentionConfig) -> list[float]:
    """Largest difference of the output and of each gradient, of each of ALL, to the exact ones."""
    group, workload = dist.group.WORLD, AttentionWorkload.of(config)
    assert group is not None
    case_of, found = cases_of(workload, group), []
    shared = import_module(TEMPLATES)._cp_options
    before = repr(shared)
    for rotate, order in ALL:
        ring = TorchRing(workload, group, rotate=rotate, order=order)  # type: ignore[arg-type]
        run = Run(ring, case_of(ring))
        out = run.forward()
        results = zip((out.detach(), *run.backward(out)), (run.case.out, *run.case.grads), strict=True)
        found.append(max((got.double() - want).abs().max().item() for got, want in results))
    assert repr(shared) == before
    return found


@pytest.mark.parametrize(("ranks", "dtype", "limit"), [(4, "float64", 1e-12), (2, "float32", 1e-5)])
def test_its_output_and_gradients_are_exact(rank_pool: RankPool, ranks: int, dtype: str, limit: float) -> None:
    config = replace(CAUSAL, ranks=ranks, dtype=dtype)  # type: ignore[arg-type]
    for found in rank_pool.run(differences, ranks, config):
        assert max(found) < limit, dict(zip(ALL, found, strict=True))


def sent(rotate: str, order: str) -> tuple[int, int, list[str]]:
    group, workload = dist.group.WORLD, AttentionWorkload.of(CAUSAL)
    assert group is not None
    ring = TorchRing(workload, group, rotate=rotate, order=order)  # type: ignore[arg-type]
    case = cases_of(workload, group)(ring)
    with counting() as forward:
        out = ring.forward(*case.inputs)
    with counting() as backward:
        run_backward(out, case.grad_out)
    return forward.wire_bytes, backward.wire_bytes, forward.collectives


@pytest.mark.parametrize(("rotate", "order"), ALL)
def test_it_sends_all_keys_to_all_ranks_and_their_gradients_once_around(
    rank_pool: RankPool, rotate: str, order: Order
) -> None:
    keys_and_values = 8 * 2 * (2 * 8 * 4 * 4)  # bytes of one rank's: B 2, l 8, G 4, H 4
    calls = {"ALL_GATHER": ["all_gather_into_tensor"], "ALL_TO_ALL": ["all_to_all_single"] * 3}[rotate]
    for forward, backward, collectives in rank_pool.run(sent, 4, rotate, order):
        assert forward == 3 * keys_and_values
        assert backward == (3 + 4) * keys_and_values
        assert [name.rpartition("::")[2] for name in collectives] == calls


@pytest.mark.parametrize(
    ("changes", "order", "told"),
    [
        ({"window": 5}, "zigzag", "torch's context parallel has no window"),
        ({"seq": (9, 7, 8, 8)}, "contiguous", r"needs even shards; in contiguous order pieces are \(9, 7, 8, 8\)"),
        ({"seq": 36}, "zigzag", r"needs even shards; in zigzag order pieces are \(5, 5, 5, 5, 4, 4, 4, 4\)"),
    ],
)
def test_what_it_cannot_do_is_told(changes: dict[str, object], order: Order, told: str) -> None:
    workload = AttentionWorkload.of(replace(CAUSAL, **changes))  # type: ignore[arg-type]
    with pytest.raises(NotApplicable, match=told):
        TorchRing(workload, None, rotate="ALL_GATHER", order=order)  # type: ignore[arg-type]


def test_the_templates_are_told_inside_the_block_only_also_where_it_raises() -> None:
    ring = TorchRing(AttentionWorkload.of(CAUSAL), None, rotate="ALL_TO_ALL", order="contiguous")  # type: ignore[arg-type]
    shared = ring.templates._cp_options
    before = repr(shared)
    seen = []

    def raises_inside() -> None:
        with ring.told():
            seen.append((shared.enable_load_balance, shared.convert_to_f32, shared.rotate_method.name))
            raise KeyError

    with pytest.raises(KeyError):
        raises_inside()
    assert seen == [(False, False, "ALL_TO_ALL")]
    assert repr(shared) == before
