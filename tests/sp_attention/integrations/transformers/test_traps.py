"""Mistakes that a user can make around a model over ranks: each is refused, or differs by far from one process."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from moe_dispatch import RankMistakeError, sum_gradients
from moe_dispatch.integrations.transformers import global_aux_loss
from moe_dispatch.testing import RankThreads
from sp_attention import mean_cross_entropy
from sp_attention.integrations.transformers import Parallel, Step
from tests.support.ranks import world
from tests.support.transformers.cases import (
    IGNORED,
    Run,
    batch_of,
    differences,
    on_one_process,
    whole_gradients,
)
from tests.support.transformers.models import new_model
from tests.support.transformers.strict import strict_float64

DTYPE = torch.float64
LENGTHS = (17, 1, 10, 5)


class Training:
    """One step of a user, with places for mistakes."""

    def __init__(self, name: str, kind: str, lengths: tuple[int, ...] = LENGTHS) -> None:
        self.parallel = Parallel(sp=4, ep=4, device_type="cpu")
        self.model = new_model(name, DTYPE)
        self.parallel.apply(self.model)
        self.batch = batch_of(kind)
        self.lengths = lengths

    def shard(self, **changed: Any) -> Step:
        return self.parallel.shard(**{**self.batch, **changed}, lengths=self.lengths)

    def run(self, step: Step, share: Callable[[Any, Step], torch.Tensor] | None = None) -> Run:
        out = self.model(**step.inputs)
        loss = self.parallel.loss(self.model, out, step).share if share is None else share(out, step)
        loss.backward()
        self.sum()
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        return Run(self.parallel.gather(out.logits, step).detach(), whole.item(), whole_gradients(self.model))

    def sum(self) -> None:
        self.parallel.sum_gradients(self.model)


def right(rank: int) -> Run:
    training = Training("qwen3_tied_aux", "left")
    return training.run(training.shard())


def lost_mask() -> Run:
    training = Training("qwen3_tied_aux", "left")
    return training.run(training.shard(attention_mask=None))


def positions_of_the_shard() -> Run:
    training = Training("qwen3_tied_aux", "left")
    places = torch.cat([torch.arange(length) for length in LENGTHS])
    return training.run(training.shard(position_ids=places.expand(2, -1)))


def labels_shifted_in_the_shard() -> Run:
    training = Training("qwen3_tied_aux", "left")
    ends = torch.tensor(LENGTHS).cumsum(0) - 1
    target_BL = F.pad(training.batch.pop("labels"), (0, 1), value=IGNORED)[:, 1:].index_fill(1, ends, IGNORED)
    return training.run(training.shard(shift_labels=target_BL))


def mean_of_the_shard() -> Run:
    training = Training("qwen3_tied_aux", "left")

    def share(out: Any, step: Step) -> torch.Tensor:
        logits_tV, target_t = step.own(out.logits).flatten(0, 1), step.target_Bl.flatten()
        return F.cross_entropy(logits_tV, target_t, reduction="sum") / max(int((target_t >= 0).sum()), 1) / 4

    return training.run(training.shard(), share)


def balance_of_the_shard() -> Run:
    training = Training("qwen3_tied_aux", "left")

    def share(out: Any, step: Step) -> torch.Tensor:
        mean = mean_cross_entropy(step.own(out.logits), step.target_Bl, group=world())
        return mean.share + 0.1 * out.aux_loss / 4

    return training.run(training.shard(), share)


def averaged_gradients() -> Run:
    training = Training("qwen3_tied_aux", "left")
    run = training.run(training.shard())
    averaged = {n: g if ".experts." in n else g / 4 for n, g in run.gradients.items()}
    return Run(run.logits_BLV, run.loss, averaged)


def tied_twice() -> Run:
    training = Training("qwen3_tied_aux", "left")
    run = training.run(training.shard())
    doubled = {n: g * 4 if "embed" in n else g for n, g in run.gradients.items()}
    return Run(run.logits_BLV, run.loss, doubled)


def experts_summed_over_everyone() -> Run:
    training = Training("qwen3_tied_aux", "left")

    def everywhere() -> None:
        for weight in training.model.parameters():
            dist.all_reduce(weight.grad)

    training.sum = everywhere  # type: ignore[method-assign]
    return training.run(training.shard())


def labels_ignored_on_two_ranks() -> Run:
    training = Training("qwen3_tied_aux", "left")
    labels = training.batch["labels"].clone()
    labels[:, 18:] = IGNORED
    return training.run(training.shard(labels=labels))


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    with strict_float64():
        yield


@pytest.fixture
def reference() -> Run:
    return on_one_process("qwen3_tied_aux", DTYPE, batch_of("left"))


MISTAKES = {
    lost_mask: ("logits", "loss"),
    positions_of_the_shard: ("logits",),
    labels_shifted_in_the_shard: ("loss", "model.embed_tokens.weight"),
    mean_of_the_shard: ("loss", "model.embed_tokens.weight"),
    balance_of_the_shard: ("loss", "model.layers.0.mlp.gate.weight"),
    averaged_gradients: ("model.embed_tokens.weight", "model.norm.weight"),
    tied_twice: ("model.embed_tokens.weight",),
    experts_summed_over_everyone: ("model.layers.0.mlp.experts.down_proj",),
}


def test_without_a_mistake_nothing_differs(rank_threads: RankThreads, reference: Run) -> None:
    for run in rank_threads.run(right, 4):
        assert max(differences(run, reference, batch_of("left")["attention_mask"]).values()) < 1e-12


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_differs(rank_threads: RankThreads, reference: Run, mistake: Callable[[], Run]) -> None:
    for run in rank_threads.run(mistake, 4):
        found = differences(run, reference, batch_of("left")["attention_mask"])
        for what in MISTAKES[mistake]:
            assert found[what] > 1e-3, what


def test_a_rank_whose_labels_are_all_ignored_counts_nothing(rank_threads: RankThreads) -> None:
    batch = batch_of("left")
    batch["labels"][:, 18:] = IGNORED
    wanted = on_one_process("qwen3_tied_aux", DTYPE, batch)
    for run in rank_threads.run(labels_ignored_on_two_ranks, 4):
        assert max(differences(run, wanted, batch["attention_mask"]).values()) < 1e-12


def sums_over_too_many() -> str:
    parallel = Parallel(sp=4, ep=4, device_type="cpu")
    model = new_model("qwen3_moe", DTYPE)
    parallel.apply(model)
    with pytest.raises(RankMistakeError) as error:
        sum_gradients(model, group=world(), expert_group=world())
    return str(error.value)


def test_experts_are_not_summed_over_ranks_that_hold_others(rank_threads: RankThreads) -> None:
    (text,) = set(rank_threads.run(sums_over_too_many, 4))
    assert "is in a layer over 4 ranks, and its gradient would be summed over 4" in text


def aux_of(rank: int, logits: list[torch.Tensor], real_T: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    start = sum(sizes[:rank])
    mine = [x[start : start + sizes[rank]].detach().requires_grad_() for x in logits]
    share = global_aux_loss(mine, top_k=2, real_t=real_T[start : start + sizes[rank]], group=world())
    share.backward()
    dist.all_reduce(share := share.detach())
    return torch.cat([share.view(1), *(x.grad.flatten() for x in mine if x.grad is not None)])


def test_the_balance_loss_is_that_of_transformers(rank_threads: RankThreads) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = [torch.randn(12, 6, dtype=DTYPE, requires_grad=True) for _ in range(2)]
    real_T = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0])
    layers: Any = tuple(logits)
    wanted: Any = load_balancing_loss_func(layers, 6, 2, real_T.view(2, 6))
    wanted.backward()
    sizes = (5, 0, 7)
    found = rank_threads.run(aux_of, 3, [x.detach() for x in logits], real_T.bool(), sizes)
    for rank, (mine, start) in enumerate(zip(found, (0, 5, 5), strict=True)):
        assert abs(float(mine[0]) - wanted.item()) < 1e-12
        gradients = [x.grad[start : start + sizes[rank]].flatten() for x in logits if x.grad is not None]
        assert torch.allclose(mine[1:], torch.cat(gradients), atol=1e-13, rtol=1e-12)
