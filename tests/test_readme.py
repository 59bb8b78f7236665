"""The code of the README runs, computes what it says, and prints what it shows."""

import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from moe_dispatch import GroupedExperts, Partition, TokenSharding
from moe_dispatch.lab import cli
from moe_dispatch.reference import ReferenceMoE
from moe_dispatch.testing import RankPool

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def names_of(blocks: list[str]) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "readme"}
    exec("\n".join(blocks), names)
    return names


def with_every_expert(mine: GroupedExperts, partition: Partition) -> GroupedExperts:
    """All experts, each rank's own from that rank."""
    states: list[dict[str, torch.Tensor]] = [{}] * len(partition)
    dist.all_gather_object(states, mine.state_dict())
    every = GroupedExperts(partition.total, mine.dim, mine.hidden).double()
    every.load_state_dict({name: torch.cat([state[name] for state in states]) for name in states[0]})
    return every


def compare_block_and_functions(rank: int) -> None:
    names, dim = names_of(BLOCKS[:2]), 8
    group = dist.group.WORLD
    assert group is not None
    experts = Partition((2, 1, 3))
    sharding = TokenSharding(batch=2, seq=Partition((3, 0, 2)))
    block = names["Block"](dim, experts, group).double()  # the same seed on every rank, so the same router
    torch.manual_seed(1)
    x_BLD = torch.randn(2, 5, dim, dtype=torch.float64)
    router, shared = deepcopy(block.moe.router), deepcopy(block.moe.shared)
    every = with_every_expert(block.moe.experts, experts)
    for module in (block.norm, router, shared):  # what several ranks hold is equal on them, and experts are not
        for tensor in module.state_dict().values():
            of_first = tensor.clone()
            dist.broadcast(of_first, src=0)
            assert torch.equal(tensor, of_first)
    assert not torch.equal(every.gate_eDF[0], every.gate_eDF[2])
    reference = ReferenceMoE(router=router, experts=every, shared=shared)
    normed_BLD = block.norm(x_BLD)
    wanted_BLD = reference(normed_BLD)[0]
    x_BlD = sharding.shard(x_BLD, rank)
    torch.testing.assert_close(block(x_BlD, sharding), sharding.shard(x_BLD + wanted_BLD, rank), rtol=0, atol=1e-12)
    found_BlD = names["moe"](sharding.shard(normed_BLD, rank), router, block.moe.experts, sharding, experts, group)
    routed_BLD = wanted_BLD - shared(normed_BLD)
    torch.testing.assert_close(found_BlD, sharding.shard(routed_BLD, rank), rtol=0, atol=1e-12)


def test_the_block_and_the_bare_functions_equal_the_reference(rank_pool: RankPool) -> None:
    rank_pool.run(compare_block_and_functions, 3)


def compare_one_step_and_two(rank: int) -> None:
    names, group = names_of(BLOCKS), dist.group.WORLD
    assert group is not None
    mesh, experts = init_device_mesh("cpu", (2, 2)), Partition((2, 1, 0, 3))
    sharding = TokenSharding(batch=2, seq=Partition((3, 0, 1, 2)))
    block = names["Block"](8, experts, group).double()  # the same seed on every rank
    x_BlD = torch.randn(*sharding.local_shape(rank), 8, dtype=torch.float64)
    layer = block.moe.router, block.moe.experts, sharding, experts
    wanted_BlD = names["moe"](x_BlD, *layer, group)
    torch.testing.assert_close(names["moe_over_nodes"](x_BlD, *layer, mesh), wanted_BlD, rtol=0, atol=1e-12)


def compare_fixed_and_counted(rank: int) -> None:
    names, group = names_of(BLOCKS), dist.group.WORLD
    assert group is not None
    experts, sharding = Partition((2, 1, 3)), TokenSharding(batch=2, seq=Partition((3, 0, 2)))
    block = names["Block"](8, experts, group).double()  # the same seed on every rank
    x_BlD = torch.randn(*sharding.local_shape(rank), 8, dtype=torch.float64)
    layer = block.moe.router, block.moe.experts, sharding, experts, group
    sizes = names["StaticSizes"](rows_per_pair=6, rows=20)
    found_BlD, plan = names["moe_of_fixed_sizes"](x_BlD, *layer, sizes)
    plan.check()
    assert torch.equal(found_BlD, names["moe"](x_BlD, *layer))


def test_fixed_sizes_equal_counted_ones(rank_pool: RankPool) -> None:
    rank_pool.run(compare_fixed_and_counted, 3)


def test_two_steps_equal_one(rank_pool: RankPool) -> None:
    rank_pool.run(compare_one_step_and_two, 4)


def test_the_readme_shows_the_plan_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan"]) == 0
    printed = "\n".join(line.strip() for line in capsys.readouterr().out.splitlines())
    shown = next(block for block in README.split("```")[1::2] if "row per node" in block)
    assert "\n".join(line.strip() for line in shown.strip().splitlines()) in printed


def test_the_readme_prints_what_it_shows(tmp_path: Path) -> None:
    script = tmp_path / "readme.py"
    script.write_text("\n".join(BLOCKS[:3]))
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=True)
    assert f"```\n{ran.stdout}```" in README


@pytest.mark.parametrize("block", [*BLOCKS[:2], BLOCKS[3]])
def test_plugging_it_in_takes_less_than_20_lines(block: str) -> None:
    code = [line for line in block.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(code) < 20


def test_the_readme_names_only_commands_and_files_that_exist() -> None:
    root = Path(__file__).parents[1]
    makefile = (root / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for name in re.findall(r"\]\(([A-Z]+\.md)\)", README):
        assert (root / name).is_file(), name


def attend_in_block(rank: int) -> None:
    names, dim = names_of(BLOCKS), 12
    group = dist.group.WORLD
    assert group is not None
    block = names["SelfAttention"](dim, 6, 2, group).double()  # the same seed on every rank
    alone = nn.functional.scaled_dot_product_attention
    sharding = TokenSharding(batch=2, seq=Partition((3, 0, 4)))
    x_BLD = torch.randn(2, 7, dim, dtype=torch.float64)
    q_BNLH, k_BGLH, v_BGLH = block.qkv(x_BLD).unflatten(-1, (10, -1)).transpose(1, 2).split([6, 2, 2], dim=1)
    whole_BNLH = alone(q_BNLH, k_BGLH, v_BGLH, is_causal=True, enable_gqa=True)
    wanted_BLD = block.out(whole_BNLH.transpose(1, 2).flatten(2))
    found_BlD = block(sharding.shard(x_BLD, rank), sharding)
    torch.testing.assert_close(found_BlD, sharding.shard(wanted_BLD, rank), rtol=0, atol=1e-12)


def test_the_attention_block_equals_one_rank(rank_pool: RankPool) -> None:
    rank_pool.run(attend_in_block, 3)
