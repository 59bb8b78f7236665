"""Ways to use a module that touch neither its ranks nor its dtype: each gives what the module itself gives."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.support.composed.subjects import pulled
from tests.support.tensors import leaf

Make = Callable[[], nn.Module]
Answers = dict[str, Tensor]
Way = Callable[[Make, Tensor, Tensor], Answers]


def answers(
    run: Callable[[Tensor], Any], parameters: Mapping[str, Tensor], x_BlD: Tensor, pull_BlD: Tensor
) -> Answers:
    """The output, and every gradient that there is."""
    x_BlD = leaf(x_BlD)
    y_BlD = run(x_BlD)
    pulled(y_BlD, pull_BlD).backward()
    grads = {"dx": x_BlD.grad, **{name: parameter.grad for name, parameter in parameters.items()}}
    return {"y": y_BlD.detach(), **{name: grad.clone() for name, grad in grads.items() if grad is not None}}


def of_module(module: nn.Module, x_BlD: Tensor, pull_BlD: Tensor) -> Answers:
    return answers(module, dict(module.named_parameters()), x_BlD, pull_BlD)


def plainly(make: Make, x_BlD: Tensor, pull_BlD: Tensor) -> Answers:
    return of_module(make(), x_BlD, pull_BlD)


def checkpointed(make: Make, x_BlD: Tensor, pull_BlD: Tensor, **options: Any) -> Answers:
    module = make()
    run = partial(checkpoint, module, **options)
    return answers(run, dict(module.named_parameters()), x_BlD, pull_BlD)


def saved(operations: Callable[[Any], bool]) -> Callable[[], Any]:
    """Contexts of a selective checkpoint that saves what these operations return."""

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operations(operation) else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)


def selective(operations: Callable[[Any], bool]) -> Way:
    return partial(checkpointed, use_reentrant=False, context_fn=saved(operations))


def accumulated(make: Make, x_BlD: Tensor, pull_BlD: Tensor) -> Answers:
    """Two forwards and backwards without zero_grad between them: twice the gradients, exactly."""
    module = make()
    found = [of_module(module, x_BlD, pull_BlD) for _ in range(2)][1]
    return {name: value if name in ("y", "dx") else value / 2 for name, value in found.items()}


def copied(make: Make, x_BlD: Tensor, pull_BlD: Tensor) -> Answers:
    return of_module(copy.deepcopy(make()), x_BlD, pull_BlD)


def called_functionally(make: Make, x_BlD: Tensor, pull_BlD: Tensor) -> Answers:
    """With other tensors for its parameters, which alone get gradients."""
    module = make()
    parameters = {name: leaf(parameter) for name, parameter in module.named_parameters()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)

    def run(x_BlD: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x_BlD,))

    return answers(run, parameters, x_BlD, pull_BlD)


def after_inference(make: Make, x_BlD: Tensor, pull_BlD: Tensor) -> Answers:
    """Training after inference_mode: nothing that a forward there left behind may be in the way."""
    module = make()
    with torch.inference_mode():
        y_BlD = module(x_BlD)
    found = of_module(module, x_BlD, pull_BlD)
    return found if torch.equal(found["y"], y_BlD) else {}


def from_meta(make: Make, x_BlD: Tensor, pull_BlD: Tensor, assign: bool) -> Answers:
    """Built on the meta device, then filled."""
    state = make().state_dict()
    with torch.device("meta"):
        module = make()
    if not assign:
        module.to_empty(device="cpu")
    module.load_state_dict(state, assign=assign)
    module.requires_grad_()
    return of_module(module, x_BlD, pull_BlD)


def partly_frozen(make: Make, x_BlD: Tensor, pull_BlD: Tensor) -> Answers:
    """One parameter at a time learns, and at last the input alone."""
    names = [name for name, _ in make().named_parameters()]
    found: Answers = {}
    for learning in names:
        module = make()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name == learning)
        pulled(module(x_BlD), pull_BlD).backward()
        found |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return found | of_module(make().requires_grad_(False), x_BlD, pull_BlD)


class Adapter(nn.Module):
    """W -> W + A B, as LoRA has it, with A = 0 and B = 1: then the gradient of A is that of a W that learns."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros_like(weight))
        self.register_buffer("b", torch.eye(weight.shape[-1]).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight.detach() + self.a @ self.get_buffer("b")


def adapted(make: Make, x_BlD: Tensor, pull_BlD: Tensor) -> Answers:
    """With an adapter on every matrix, and the matrix frozen."""
    module = make()
    for owner in list(module.modules()):
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.ndim > 1:
                parameter.requires_grad_(False)
                parametrize.register_parametrization(owner, name, Adapter(parameter))
    found = of_module(module, x_BlD, pull_BlD)
    return {name.replace("parametrizations.", "").removesuffix(".0.a"): grad for name, grad in found.items()}


WAYS: dict[str, Way] = {
    "checkpoint, non-reentrant": partial(checkpointed, use_reentrant=False),
    "checkpoint, reentrant": partial(checkpointed, use_reentrant=True),
    "selective checkpoint: nothing saved": selective(lambda operation: False),
    "selective checkpoint: everything saved": selective(lambda operation: True),
    "selective checkpoint: products saved": selective(lambda operation: "mm" in str(operation)),
    "selective checkpoint: collectives saved": selective(lambda operation: "c10d" in str(operation)),
    "gradient accumulation": accumulated,
    "deep copy": copied,
    "functional_call": called_functionally,
    "inference_mode, then training": after_inference,
    "meta device, to_empty": partial(from_meta, assign=False),
    "meta device, load with assign": partial(from_meta, assign=True),
    "frozen subsets": partly_frozen,
    "LoRA": adapted,
}
