"""Train a subject for a few steps: in one process, and on a mesh."""

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import ParallelMesh, agree, build_mesh, check_replicated, gather_tokens
from ..internals import check_is_group
from ..routing.names import without_wrappers
from ..wire.local_tensors import is_dtensor
from .layout import Layout
from .results import OnMesh, Reference, Settings, Training
from .subject import Outcome, Subject


def run_reference(
    subject: Subject, layout: Layout, dtype: torch.dtype, token_SBL: Tensor, settings: Settings
) -> Reference:
    """The training run in one process, and its noise.

    Args:
        token_SBL: (S, B, L), the tokens of every step.
    """
    epsilon = torch.finfo(dtype).eps
    training = train_alone(subject, subject.whole(layout).to(dtype), layout, token_SBL, settings)
    nudged = nudge(subject.whole(layout).to(dtype), epsilon)
    moved = train_alone(subject, nudged, layout, token_SBL[:1], settings).gradients
    noise = {name: (moved[name] - gradient).abs().max().item() for name, gradient in training.gradients.items()}
    return Reference(training=training, noise=noise, epsilon=epsilon)


def nudge(model: nn.Module, epsilon: float) -> nn.Module:
    """``model``, each of its weights moved by -1, 0 or 1 units in the last place."""
    draw = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            step = torch.randint(-1, 2, parameter.shape, generator=draw, dtype=parameter.dtype, device="cpu")
            parameter *= 1 + epsilon * step.to(parameter.device)
    return model


def train_alone(
    subject: Subject, model: nn.Module, layout: Layout, token_SBL: Tensor, settings: Settings
) -> Training:
    """The training run of ``model`` in this process."""
    first: list[tuple[Tensor, dict[str, Tensor]]] = []

    def step(token_BL: Tensor) -> float:
        outcome = subject.step_whole(model, token_BL, layout)
        if not first:
            gradients = {name: _gradient_or(0.0, parameter).double() for name, parameter in model.named_parameters()}
            first.append((_batch_first(outcome, outcome.logits_BlV.detach().double()), gradients))
        return outcome.loss.item()

    losses = train(model, step, token_SBL, settings)
    return Training(logits_BLV=first[0][0], losses=losses, gradients=first[0][1])


def run_on_mesh(
    subject: Subject, layout: Layout, dtype: torch.dtype, token_SBL: Tensor, settings: Settings
) -> OnMesh:
    """The training run on all ranks of the default group, as ``layout`` says. Collective.

    Raises:
        DisagreementError: the whole model is not the same on every rank, so that no comparison would mean anything.
        RankMistakeError: the share of a rank has other parameters than the whole.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = build_mesh(dp=layout.dp, sp=layout.sp, tp=layout.tp, ep=layout.ep, device_type=device)
    everyone = check_is_group(dist.group.WORLD)
    whole = subject.whole(layout).to(dtype)
    check_replicated(whole, group=everyone)
    model = subject.share(whole, layout, mesh)
    agree("the share", problem=problem_of_names(whole, model), device=torch.device(device), group=everyone)
    first: list[OnMesh] = []

    def step(token_BL: Tensor) -> float:
        outcome = subject.step_share(model, token_BL, layout, mesh)
        loss = outcome.loss.detach().clone()
        if not first:
            logits_BLV = gather_tokens(outcome.logits_BlV.detach(), sharding=outcome.tokens, group=everyone)
            training = Training(
                logits_BLV=_batch_first(outcome, logits_BLV.cpu().double()),
                losses=(),
                gradients=whole_gradients(subject, model, layout, mesh),
            )
            rank_of_token_T, _ = outcome.tokens.locate(torch.arange(layout.batch * layout.seq, device="cpu"))
            rank_of_token_BL = rank_of_token_T.view(outcome.tokens.global_shape)
            ranks = tuple(map(tuple, _batch_first(outcome, rank_of_token_BL).tolist()))
            first.append(OnMesh(training=training, rank_of_token_BL=ranks))
        dist.all_reduce(loss)
        return loss.item()

    losses = train(model, step, token_SBL, settings)
    return replace(first[0], training=replace(first[0].training, losses=losses))


def train(
    model: nn.Module, step: Callable[[Tensor], float], token_SBL: Tensor, settings: Settings
) -> tuple[float, ...]:
    """The loss of each step. ``step`` gets the whole batch's tokens and leaves gradients; AdamW follows."""
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
    return tuple(losses)


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """By the names of the model without its wrappers."""
    modules = dict(model.named_modules())
    return [(without_wrappers(name, modules), parameter) for name, parameter in model.named_parameters()]


def problem_of_names(whole: nn.Module, share: nn.Module) -> str:
    """What is wrong with the names of the share's parameters; empty where they are those of the whole."""
    wanted, got = ({name for name, _ in named_parameters(model)} for model in (whole, share))
    if got == wanted:
        return ""
    return (
        f"the share has other parameters than the whole: {', '.join(sorted(wanted - got)) or 'none'} missing, "
        f"{', '.join(sorted(got - wanted)) or 'none'} that the whole has not; parameters keep their names in a share"
    )


def whole_gradients(subject: Subject, model: nn.Module, layout: Layout, mesh: ParallelMesh) -> dict[str, Tensor]:
    """Every parameter's whole gradient, in float64 on the CPU, on every rank; NaN where one that learns has none.
    Collective."""
    gradients = {}
    for name, parameter in named_parameters(model):
        gradient = _gradient_or(torch.nan if parameter.requires_grad else 0.0, parameter)
        if is_dtensor(gradient):
            gradient = _full(gradient)
        gradients[name] = subject.whole_gradient(name, gradient.detach(), layout, mesh).cpu().double()
    return gradients


def _full(gradient: Tensor) -> Tensor:
    """A DTensor's whole, without DTensor's note that two mesh axes take two collectives: this is to compare, not to
    train."""
    logger = logging.getLogger("torch.distributed.tensor._redistribute")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return gradient.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        logger.setLevel(level)


def _gradient_or(value: float, parameter: nn.Parameter) -> Tensor:
    """The gradient; ``value`` everywhere for a parameter that nothing reached."""
    return torch.full_like(parameter, value) if parameter.grad is None else parameter.grad


def _batch_first(outcome: Outcome, x: Tensor) -> Tensor:
    return x.transpose(0, 1) if outcome.tokens.order == "LB" else x
