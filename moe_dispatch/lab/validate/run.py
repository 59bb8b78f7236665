"""Train the debug model for a few steps: in one process, and on a mesh; compare."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sp_attention import mean_cross_entropy

from ... import (
    GroupedExperts,
    MoE,
    ParallelMesh,
    TokenSharding,
    TopKRouter,
    build_mesh,
    gather_tokens,
    plan_dispatch,
    sequence_balance_loss,
)
from ...reference import ReferenceMoE, reference_balance_loss
from .compare import compare
from .config.tables import RowConfig, ValidateConfig
from .debug_model.layout import OneProcess, OnMesh, everyone
from .debug_model.model import DebugModel
from .debug_model.packing import Packing
from .debug_model.parallel import parallel_model, quiet, whole_gradients
from .mutants.mutants import mutated
from .results import Reference, RowResult, Training


def run_reference(config: ValidateConfig, row: RowConfig, dtype: str, token_SBL: Tensor) -> Reference:
    """The training run in one process: MoE layers, masks and targets as plain Python loops.

    Args:
        token_SBL: the bytes of every step.
    """
    epsilon = torch.finfo(getattr(torch, dtype)).eps
    training = train_alone(whole_model(config, row, dtype), config, row, token_SBL)
    nudged = nudge(whole_model(config, row, dtype), epsilon)
    moved = train_alone(nudged, config, row, token_SBL[:1]).gradients
    noise = {name: (moved[name] - gradient).abs().max().item() for name, gradient in training.gradients.items()}
    return Reference(training=training, noise=noise, epsilon=epsilon)


def nudge(model: DebugModel, epsilon: float) -> DebugModel:
    """``model``, each of its weights moved by -1, 0 or 1 units in the last place."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + epsilon * torch.randint(-1, 2, parameter.shape, generator=draw, dtype=parameter.dtype)
    return model


def train_alone(model: DebugModel, config: ValidateConfig, row: RowConfig, token_SBL: Tensor) -> Training:
    """The training run of ``model`` in this process."""
    packing = Packing.of(seq=row.seq, documents=row.documents, window=row.window)
    layout = OneProcess(whole=TokenSharding(batch=row.batch, seq=row.seq), packing=packing)
    coefficient, top_k = config.model.balance_coefficient, config.model.top_k
    first: list[tuple[Tensor, dict[str, Tensor]]] = []

    def step(token_BL: Tensor) -> float:
        logits_BLV, scores = model(token_BL, layout)
        target_T = torch.tensor(reference_targets(token_BL.tolist(), row.documents))
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), target_T, ignore_index=-100, reduction="sum")
        loss = loss / max(sum(target >= 0 for target in target_T.tolist()), 1)
        loss = loss + sum(coefficient * reference_balance_loss(scores_BLE, top_k) for scores_BLE in scores)
        loss.backward()
        if not first:
            gradients = {name: gradient_of(parameter).double() for name, parameter in model.named_parameters()}
            first.append((logits_BLV.detach().double(), gradients))
        return loss.item()

    def after_step() -> None:
        for module in model.modules():
            if isinstance(module, ReferenceMoE):
                module.update_bias(config.model.bias_rate)

    losses = train(model, step, after_step, config, token_SBL)
    return Training(logits_BLV=first[0][0], losses=losses, gradients=first[0][1])


def reference_targets(rows: list[list[int]], documents: Sequence[tuple[int, int]]) -> list[int]:
    """The token after each one, -100 at the end of a row or document and at padding."""
    targets = []
    for row in rows:
        start = 0
        for tokens, places in documents or [(len(row), len(row))]:
            targets += [*row[start + 1 : start + tokens], *[-100] * (places - max(tokens - 1, 0))]
            start += places
    return targets


def run_row(
    config: ValidateConfig, row: RowConfig, dtype: str, token_SBL: Tensor, reference: Reference, mutant: str
) -> RowResult:
    """One row of the matrix, on every rank of the default process group. The same result on every rank.

    Args:
        mutant: name of the known bug to put in; empty for none.
    """
    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = build_mesh(dp=row.dp, sp=row.sp, tp=row.tp, ep=row.ep, device_type=device)
    packing = Packing.of(seq=row.seq, documents=row.documents, window=row.window)
    layout = OnMesh.of(mesh, batch=row.batch, seq=row.seq, packing=packing)
    with mutated(mutant), quiet():
        found, rows_sent = train_on_mesh(config, row, dtype, token_SBL, mesh, layout)
    rank_of_token_T, _ = layout.tokens.locate(torch.arange(row.batch * row.seq))
    return RowResult(
        name=row.name,
        dtype=dtype,
        mesh=row.mesh,
        shape=(row.batch, row.seq),
        differences=compare(found, reference, config.tolerance[dtype]),
        error="",
        losses=found.losses,
        reference_losses=reference.training.losses,
        seconds=time.perf_counter() - start,
        rank_of_token_BL=tuple(map(tuple, rank_of_token_T.view(row.batch, row.seq).tolist())),
        rows_sent_PP=rows_sent,
    )


def train_on_mesh(
    config: ValidateConfig, row: RowConfig, dtype: str, token_SBL: Tensor, mesh: ParallelMesh, layout: OnMesh
) -> tuple[Training, tuple[tuple[int, ...], ...]]:
    """The training run on ``mesh``, gathered on every rank, and the rows that ranks sent each other at first."""
    model = parallel_model(whole_model(config, row, dtype), replace(config.model, heads=row.heads), mesh)
    coefficient, top_k = config.model.balance_coefficient, config.model.top_k
    first: list[tuple[Tensor, dict[str, Tensor], tuple[tuple[int, ...], ...]]] = []

    def step(token_BL: Tensor) -> float:
        batch = layout.my_batch(token_BL)
        logits_blV, scores = model(batch.token_Bl, layout)
        # Each rank has a share of both losses, that of its own tokens.
        loss = mean_cross_entropy(logits_blV, batch.target_Bl, group=everyone()).share
        for scores_blE in scores:
            balance = sequence_balance_loss(scores_blE, top_k=top_k, sharding=layout.tokens, group=everyone())
            loss = loss + coefficient * balance
        loss.backward()
        if not first:
            logits_BLV = gather_tokens(logits_blV.detach(), sharding=layout.tokens, group=everyone())
            gradients = whole_gradients(model, mesh)
            first.append((logits_BLV.cpu().double(), gradients, rows_sent(model, scores[0].detach(), layout)))
        whole = loss.detach().clone()
        dist.all_reduce(whole)
        return whole.item()

    def after_step() -> None:
        for module in model.modules():
            if isinstance(module, MoE):
                module.update_bias(config.model.bias_rate, everyone())

    losses = train(model, step, after_step, config, token_SBL)
    return Training(logits_BLV=first[0][0], losses=losses, gradients=first[0][1]), first[0][2]


def train(
    model: DebugModel,
    step: Callable[[Tensor], float],
    after_step: Callable[[], None],
    config: ValidateConfig,
    token_SBL: Tensor,
) -> tuple[float, ...]:
    """The loss of each step. ``step`` gets the whole batch's tokens and leaves gradients; AdamW follows."""
    settings = config.train
    # foreach would put DTensors of different meshes into one operation.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, foreach=False
    )
    device = next(model.parameters()).device
    losses = []
    for token_BL in token_SBL.to(device, torch.int64):
        losses.append(step(token_BL))
        optimizer.step()
        optimizer.zero_grad()
        after_step()
    return tuple(losses)


def whole_model(config: ValidateConfig, row: RowConfig, dtype: str) -> DebugModel:
    """The model of one process. Every rank makes the same one, from the seed, in float64, rounded to ``dtype``."""
    model_config = replace(config.model, heads=row.heads)

    def make_moe(router: TopKRouter, shared: nn.Module | None) -> ReferenceMoE:
        experts = GroupedExperts(model_config.experts, model_config.dim, model_config.expert_hidden)
        return ReferenceMoE(router=router, experts=experts, shared=shared)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return DebugModel(model_config, make_moe).to(getattr(torch, dtype))


def gradient_of(parameter: torch.nn.Parameter) -> Tensor:
    """The gradient; zeros for a parameter that nothing reached."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def rows_sent(model: DebugModel, scores_blE: Tensor, layout: OnMesh) -> tuple[tuple[int, ...], ...]:
    """Rows from each rank to each rank, of the first MoE layer. Collective."""
    moe = next(module for module in model.modules() if isinstance(module, MoE))
    plan = plan_dispatch(
        moe.router.choose(scores_blE),
        dim=moe.router.dim,
        sharding=layout.ep_tokens,
        experts=moe.partition,
        group=moe.group,
    )
    counts = [0] * dist.get_world_size()
    for rank, count in zip(dist.get_process_group_ranks(moe.group), plan.rows_sent, strict=True):
        counts[rank] = count
    of_every_rank: list[list[int]] = [[]] * len(counts)
    dist.all_gather_object(of_every_rank, counts)
    return tuple(map(tuple, of_every_rank))
