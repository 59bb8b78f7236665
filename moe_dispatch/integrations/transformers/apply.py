"""Cut the experts of a Transformers model over ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...layer.share import MARK
from ...layout.mesh import ParallelMesh
from ...layout.partition import Partition
from ...wire.agreement import agree
from ...wire.exchange import check_is_group
from .held import NAME, HeldExperts, LayerAtHand, decoder_layer, experts_over_ranks
from .interface import ALL_EXPERTS_FUNCTIONS
from .layout import is_experts, names_of_parameters, problem_of_layout


def apply_expert_parallel(model: nn.Module, mesh: ParallelMesh, *, experts: Partition | None = None) -> None:
    """Cut the experts of every layer over the "ep" ranks of ``mesh``, in place: each rank keeps its share of the
    weights, and rows travel to the ranks of their experts.

    Call it on every rank, with the same whole model, before ``fully_shard`` and before the optimizer is made. On
    "meta" nothing is copied. Gradients of experts are sums over the tokens of the "ep" group:
    :func:`moe_dispatch.sum_gradients`, ``clip_grad_norm``, ``whole_state_dict``, ``share_of_state_dict`` and
    ``leave_experts_to_ranks`` know these layers. One exchange of 8 bytes per pair of ranks here.

    Routers, shared experts and everything else stay Transformers' own. Three collectives per layer forward, two
    backward, and one more forward where the model is called without a ``step``
    (:func:`sp_attention.integrations.transformers.shard_batch`): the ranks then tell how many tokens they have.

    Args:
        model: a ``PreTrainedModel`` whose experts follow ``ExpertsInterface``.
        mesh: over all ranks.
        experts: which of the "ep" ranks holds which experts, in every layer; a rank may hold none.
            ``Partition.balanced`` if left out.

    Raises:
        GroupError: on every rank, before anything is cut: a model without such experts, experts in a layout that is
            not known, a partition for other ranks or another number of experts, a model that is cut already, or ranks
            with different models.
    """
    device, group = torch.device(mesh.dense.device_type), mesh.expert.get_group("ep")
    layers = {place: module for place, module in model.named_modules() if is_experts(module)}
    problem = _problem(model, layers, experts, group)
    facts = "; ".join(_facts(place, module, experts) for place, module in layers.items())
    agree(f"{type(model).__name__}: {facts}", problem=problem, device=device, group=check_is_group(dist.group.WORLD))
    of_old: dict[int, nn.Parameter] = {}  # a tensor that two layers share stays one
    at_hand: dict[str, LayerAtHand] = {}
    for place, module in layers.items():
        partition = experts or Partition.balanced(_total(module), group.size())
        around = decoder_layer(place)
        if around not in at_hand:
            at_hand[around] = LayerAtHand.of(model.get_submodule(around))
        _cut(module, partition, group.rank(), of_old)
        setattr(module, MARK, HeldExperts(partition, group, at_hand[around]))
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_over_ranks)
    model.set_experts_implementation(NAME)  # pyright: ignore[reportCallIssue]
    model.register_forward_pre_hook(_check_implementation)


def _total(experts: Any) -> int:
    return experts.num_experts


def _problem(
    model: nn.Module, layers: dict[str, nn.Module], experts: Partition | None, group: dist.ProcessGroup
) -> str:
    kind = type(model).__name__
    if not hasattr(model, "set_experts_implementation"):
        return f"{kind} is no PreTrainedModel; apply_expert_parallel takes a model of Transformers"
    if not layers:
        return (
            f"{kind} has no experts that follow Transformers' ExpertsInterface (a module decorated with "
            "use_experts_implementation); nothing can be cut over ranks"
        )
    if experts is not None and len(experts) != group.size():
        return f"{experts} is for {len(experts)} ranks, but ep is {group.size()}; give it one size per rank of ep"
    for place, module in layers.items():
        if hasattr(module, MARK):
            return f"{place} is cut over ranks already; apply_expert_parallel takes a whole model, once"
        if problem := problem_of_layout(module):
            return f"{place}: {problem}"
        if experts is not None and experts.total != _total(module):
            return f"{place} has {_total(module)} experts, but {experts} has {experts.total}; give a size that fits"
    return ""


def _facts(place: str, module: nn.Module, experts: Partition | None) -> str:
    shapes = {name: (tuple(x.shape), str(x.dtype)) for name, x in module.named_parameters()}
    return f"{place} {shapes} over {'balanced' if experts is None else experts.sizes}"


@torch.no_grad()
def _cut(module: nn.Module, partition: Partition, rank: int, of_old: dict[int, nn.Parameter]) -> None:
    first, size = partition.offsets[rank], partition.sizes[rank]

    def share(whole_E: Tensor) -> Tensor:
        return whole_E.detach().narrow(0, first, size).clone()

    for name in names_of_parameters(module):
        old = module.get_parameter(name)
        if id(old) not in of_old:
            of_old[id(old)] = nn.Parameter(share(old), requires_grad=old.requires_grad)
        setattr(module, name, of_old[id(old)])


def _check_implementation(model: Any, args: Any) -> None:
    used = model.config.get_text_config()._experts_implementation
    if used != NAME:
        raise ValueError(
            f"the experts of this model are cut over ranks, but experts_implementation was set to {used!r} since, "
            f"which takes all experts to be here; call model.set_experts_implementation({NAME!r})"
        )
