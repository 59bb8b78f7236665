"""Who moves rows to experts: this library, or Transformers' own all-to-all, as one more contender."""

from typing import Any

from torch import Tensor
from transformers.distributed.expert_parallel import apply_expert_parallelism

from moe_dispatch import ParallelMesh, Partition, TokenSharding, gather_tokens
from moe_dispatch.testing import Layout

ALL_TO_ALL = "all_to_all"


def apply_all_to_all(model: Any, mesh: ParallelMesh) -> None:
    """Transformers' ``AllToAllEP`` over the "ep" ranks of ``mesh``. Experts become DTensors."""
    plan = model._expand_parallel_plan(model.ep_plan)
    apply_expert_parallelism(model, mesh.expert["ep"], mesh.dense["tp"], plan, ep_implementation=ALL_TO_ALL)


def problem_of_all_to_all(model: Any, layout: Layout) -> str:
    """Why Transformers' own does not run here; empty where it does."""
    kind = model.config.get_text_config().model_type
    if not model.ep_plan:
        return f"the config of {kind} has no base_model_ep_plan"
    totals = set(experts_of_parameters(model).values())
    if any(total % layout.ep for total in totals):
        return f"{', '.join(map(str, totals))} experts of {kind} are not even over ep = {layout.ep}"
    if layout.ep != layout.ranks:
        return f"ep = {layout.ep} of {layout.ranks} ranks: copies of experts are summed by Transformers' FSDP only"
    return ""


def experts_of_parameters(model: Any) -> dict[str, int]:
    """How many experts each parameter of an experts module has, by its name."""
    return {
        f"{place}.{name}": len(x)
        for place, module in model.named_modules()
        if "is_transposed" in vars(module)  # Transformers' decorator has set it
        for name, x in module.named_parameters()
    }


def whole_of_shares(share: Tensor, total: int, mesh: ParallelMesh) -> Tensor:
    """(e, ...) of each "ep" rank -> (E, ...). Experts of a gradient are gathered as tokens of one row are."""
    group = mesh.expert.get_group("ep")
    of_ranks = TokenSharding(batch=1, seq=Partition.balanced(total, group.size()))
    flat = gather_tokens(share.flatten(1).unsqueeze(0), sharding=of_ranks, group=group)
    return flat.squeeze(0).unflatten(1, share.shape[1:])
