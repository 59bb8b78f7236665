"""Records by themselves: from tensors, gathered, in files, of some layers."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe_dispatch import RoutingRecord, TokenSharding, record_routing, replay_routing
from moe_dispatch.routing.choices import Choices
from moe_dispatch.testing import RankThreads
from tests.support.dispatch.moe import Case
from tests.support.ranks import refusal, world
from tests.support.routing.stack import CASES, NAMES, one_process, record_of, run_forwards, stack_of
from tests.support.tensors import same_bits

CASE = CASES[0]
EXPERT_BLK = torch.tensor([[[0, 3], [-1, 2], [4, 4]], [[1, 0], [-1, -1], [2, 3]]])


def small(name: str = "moe") -> RoutingRecord:
    return RoutingRecord.of_experts({name: [EXPERT_BLK, EXPERT_BLK.flip(0)]}, num_experts=5)


def test_a_record_says_what_it_holds() -> None:
    record = small()
    assert repr(record) == "RoutingRecord(1 layer of 2 forwards)"
    assert repr(RoutingRecord({})) == "RoutingRecord(0 layers)"
    first, second = record.layers["moe"]
    assert (first.grid, first.num_experts, first.is_whole) == ((2, 3), 5, True)
    assert first.token_N.tolist() == list(range(6))
    assert second.expert_NK.tolist() == [[1, 0], [-1, -1], [2, 3], [0, 3], [-1, 2], [4, 4]]
    assert record == small()
    assert record != small("other")
    assert record != RoutingRecord.of_experts({"moe": [EXPERT_BLK]}, num_experts=5)
    assert record != RoutingRecord.of_experts({"moe": [EXPERT_BLK, EXPERT_BLK]}, num_experts=5)
    assert record != 1
    with pytest.raises(TypeError):
        record.layers["moe"] = ()  # pyright: ignore[reportIndexIssue]


NO_EXPERTS = "the experts of all tokens of a forward are ints of shape (B, L, K)"


@pytest.mark.parametrize(
    ("expert_BLK", "text"),
    [
        (EXPERT_BLK.flatten(0, 1), f"experts of shape (6, 2) of torch.int64; {NO_EXPERTS}"),
        (EXPERT_BLK.float(), f"experts of shape (2, 3, 2) of torch.float32; {NO_EXPERTS}"),
        (EXPERT_BLK + 1, "expert ids 0 to 5; ids are 0 to 4, or -1 for no expert"),
        (EXPERT_BLK - 1, "expert ids -2 to 3; ids are 0 to 4, or -1 for no expert"),
        (EXPERT_BLK + 65536, "expert ids 32766 to 32766; ids are 0 to 4, or -1 for no expert"),
    ],
)
def test_tensors_that_are_no_experts_are_refused(expert_BLK: Tensor, text: str) -> None:
    assert refusal(lambda: RoutingRecord.of_experts({"moe": [expert_BLK]}, num_experts=5)) == text


@pytest.mark.parametrize(
    ("token_N", "expert_NK", "num_experts", "text"),
    [
        ([1, 0], [[0], [0]], 5, "tokens 0 to 1 of a grid of 2 x 3; they have to be 0 to 5, ascending, each once"),
        ([1, 1], [[0], [0]], 5, "tokens 1 to 1 of a grid of 2 x 3; they have to be 0 to 5, ascending, each once"),
        ([1, 6], [[0], [0]], 5, "tokens 1 to 6 of a grid of 2 x 3; they have to be 0 to 5, ascending, each once"),
        ([1], [[0], [0]], 5, "tokens (1,) and experts (2, 1); they have to be (N,) and (N, K)"),
        ([1], [[0]], 0, "0 experts; a layer can have 1 to 32766"),
    ],
)
def test_choices_that_cannot_be_are_refused(
    token_N: list[int], expert_NK: list[list[int]], num_experts: int, text: str
) -> None:
    tensors = {"token_N": torch.tensor(token_N), "expert_NK": torch.tensor(expert_NK, dtype=torch.int16)}
    assert refusal(lambda: Choices(grid=(2, 3), num_experts=num_experts, **tensors)) == text


def test_choices_have_one_dtype() -> None:
    expert_NK = EXPERT_BLK.flatten(0, 1)
    text = "tokens of torch.int64 and experts of torch.int64; use int64 and torch.int16"
    assert refusal(lambda: Choices(grid=(2, 3), num_experts=5, token_N=torch.arange(6), expert_NK=expert_NK)) == text


# ---- files -----------------------------------------------------------------------------------------------


def test_a_file_holds_a_record(tmp_path: Path) -> None:
    record, path = small("a.b"), tmp_path / "routing.safetensors"
    record.save(path)
    assert RoutingRecord.load(path) == record
    tensors = load_file(path)
    assert list(tensors) == ["a.b.0.experts", "a.b.1.experts"]
    assert same_bits(tensors["a.b.0.experts"], EXPERT_BLK.to(torch.int16))


def saved(rank: int, case: Case, folder: str) -> RoutingRecord:
    """What one rank has, through a file."""
    stack, path = stack_of(case, rank), f"{folder}/{rank}.safetensors"
    with record_routing(stack) as record:
        run_forwards(stack, case, rank, 2)
    record.save(path)
    loaded = RoutingRecord.load(path)
    assert loaded == record
    with replay_routing(stack, loaded):
        run_forwards(stack, case, rank, 2)
    return loaded.gather(world())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_file_holds_the_tokens_of_a_rank(rank_threads: RankThreads, case: Case, tmp_path: Path) -> None:
    for record in rank_threads.run(saved, case.ranks, case, str(tmp_path)):
        assert record == record_of(rank_threads, one_process(case), 2)
        tokens = {id(x.token_N) for forwards in record.layers.values() for x in forwards}
        assert len(tokens) == 1  # one tensor for all layers


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert refusal(lambda: RoutingRecord.load(path)).startswith(f"{path} is no record of routing: ")
    save_file({"weight": torch.zeros(1)}, path)
    assert refusal(lambda: RoutingRecord.load(path)) == (
        f"{path} is no record of routing: its metadata have moe_dispatch.routing = None, not 1; RoutingRecord.save "
        "writes them"
    )
    metadata = {"moe_dispatch.routing": "1", "layers": json.dumps({"moe": [[2, 3, 5]]})}
    save_file({"moe.0.experts": EXPERT_BLK.to(torch.int16) + 1}, path, metadata=metadata)
    assert refusal(lambda: RoutingRecord.load(path)) == (
        f"{path} is no record of routing: expert ids 0 to 5; ids are 0 to 4, or -1 for no expert; RoutingRecord.save "
        "writes them"
    )
    with pytest.raises(FileNotFoundError):
        RoutingRecord.load(tmp_path / "nothing")


def test_without_safetensors_files_are_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: small().save(tmp_path / "x"), lambda: RoutingRecord.load(tmp_path / "x")):
        with pytest.raises(ImportError, match=r"pip install moe-dispatch\[records\]"):
            call()


# ---- of several ranks ------------------------------------------------------------------------------------


def part(rank: int, expert_NK: Tensor, forwards: int = 1) -> RoutingRecord:
    """Three ranks of a grid of 2 x 3: rank 1 has nothing, ranks 0 and 2 share the token in the middle."""
    token_N = torch.tensor([[0, 1, 2, 3], [], [2, 3, 4, 5]][rank], dtype=torch.int64)
    choices = Choices(grid=(2, 3), num_experts=5, token_N=token_N, expert_NK=expert_NK[token_N].to(torch.int16))
    return RoutingRecord({"moe": [choices] * forwards})


def gathered(rank: int, what: str) -> RoutingRecord | str:
    expert_NK = EXPERT_BLK.flatten(0, 1).clone()
    if what == "stages":
        return small(f"moe.{rank}").gather(world())
    if what == "other experts" and rank == 2:
        expert_NK[3] = 4
    mine = part(rank, expert_NK, 1 + (what == "forwards" and rank == 2))
    return mine.gather(world()) if what == "alike" else refusal(lambda: mine.gather(world()))


def test_ranks_that_hold_a_token_twice(rank_threads: RankThreads) -> None:
    wanted = RoutingRecord.of_experts({"moe": [EXPERT_BLK]}, num_experts=5)
    assert rank_threads.run(gathered, 3, "alike") == [wanted] * 3
    text = (
        "moe, forward 0: token 3 has experts [1, 0] and, elsewhere, [4, 4]; ranks that hold a token have to route it "
        "alike"
    )
    assert rank_threads.run(gathered, 3, "other experts") == [text] * 3


def test_ranks_with_other_forwards_are_told_so(rank_threads: RankThreads) -> None:
    text = (
        "moe was not recorded alike (ranks [0, 1]: 1 x (2 x 3 tokens, K = 2 of 5 experts); rank [2]: 2 x (2 x 3 "
        "tokens, K = 2 of 5 experts)); gather what ranks recorded in the same forwards"
    )
    assert rank_threads.run(gathered, 3, "forwards") == [text] * 3


def test_stages_of_a_pipeline_have_layers_of_their_own(rank_threads: RankThreads) -> None:
    for record in rank_threads.run(gathered, 2, "stages"):
        assert isinstance(record, RoutingRecord)
        assert list(record.layers) == ["moe.0", "moe.1"]
        assert record == RoutingRecord({**small("moe.0").layers, **small("moe.1").layers})


def restricted(rank: int) -> str:
    stack = stack_of(CASE, rank)
    [second] = stack.layers[1:]
    stage = nn.ModuleDict({"layers": nn.ModuleDict({"1": second})})
    with record_routing(stack) as record:
        run_forwards(stack, CASE, rank)
    sharding: TokenSharding = CASE.sharding
    with replay_routing(stage, record.restrict_to(stage)):
        second(CASE.shards(rank)[0], sharding=sharding)
    other = nn.ModuleDict({"other": second})
    return refusal(lambda: record.restrict_to(other))


def test_a_stage_takes_its_layers(rank_threads: RankThreads) -> None:
    text = f"RoutingRecord(2 layers of 1 forward) has no layers ['other']; it has {NAMES}"
    assert rank_threads.run(restricted, 2) == [text] * 2
