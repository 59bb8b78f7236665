"""Attention of a Transformers model over the ranks of a mesh."""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from moe_dispatch import ParallelMesh, agree
from moe_dispatch.integrations.transformers import follow_steps, problem_of_mesh

from ...parallel.on_mesh import everyone
from ...work.scheme import ULYSSES, Scheme, problem_of_scheme
from .asked import keeps_documents_apart
from .attention import NAME, NAME_APART, NO_STEP, register
from .step import Step

LAYERS = ("full_attention", "sliding_attention")


def apply_sequence_parallel(model: Any, mesh: ParallelMesh, *, scheme: Scheme = ULYSSES) -> None:
    """Have the attention of a model see whole sequences of which each "sp" rank of ``mesh`` holds a part.

    The model is then called with a step, ``model(**step.inputs)`` of :func:`shard_batch`. No parameter changes. Call
    it on every rank, before ``fully_shard``. One exchange of 8 bytes per pair of ranks here; two collectives per
    layer forward, two backward.

    Args:
        model: a causal ``PreTrainedModel`` all of whose layers attend through ``AttentionInterface``, fully or in
            windows. It is asked with three tokens which mask it makes.
        scheme: how attention is spread over "sp".
        mesh: over all ranks.

    Raises:
        GroupError: on every rank: a model that is none, or with layers of another kind (linear attention, state
            spaces), by name; a scheme that "sp" cannot have; or ranks with different models or schemes.
    """
    problem = _problem(model) or problem_of_mesh(model, mesh) or problem_of_scheme(scheme, mesh.dense.size(1))
    name = ""
    if not problem:
        try:
            name = NAME_APART if keeps_documents_apart(model) else NAME
        except ValueError as error:
            problem = f"{type(model).__name__}: {error}"
    agree(
        f"{type(model).__name__} by {name}, {scheme}",
        problem=problem,
        device=torch.device(mesh.dense.device_type),
        group=everyone(),
    )
    register()
    follow_steps(model)
    model.set_attn_implementation(name)
    model.register_forward_pre_hook(_Guard(mesh, name, scheme).check, with_kwargs=True)


def _problem(model: Any) -> str:
    kind = type(model).__name__
    if not hasattr(model, "set_attn_implementation"):
        return f"{kind} is no PreTrainedModel; apply_sequence_parallel takes a model of Transformers"
    config = model.config.get_text_config()
    if config._attn_implementation in (NAME, NAME_APART):
        return f"{kind} attends over ranks already; apply_sequence_parallel takes a model once"
    return problem_of_layers(config)


def problem_of_layers(config: Any) -> str:
    """Which layers of a model do not attend to whole sequences, by the config of its text; empty where all do."""
    others = sorted(set(getattr(config, "layer_types", None) or LAYERS) - set(LAYERS))
    if others:
        return (
            f"{config.model_type} has layers {others}, which do not attend to whole sequences through "
            f"AttentionInterface; only {', '.join(LAYERS)} can be cut over ranks"
        )
    return ""


@dataclass(frozen=True, slots=True)
class _Guard:
    """What has to be so in each forward."""

    mesh: ParallelMesh
    name: str
    scheme: Scheme

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # a copy of the model is on the same mesh

    def check(self, model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A forward pre-hook, which tells the step the scheme. Each rank sees the same mistake."""
        used, step = model.config.get_text_config()._attn_implementation, kwargs.get("step")
        if used != self.name:
            raise ValueError(
                f"attention was set to {used!r} after apply_sequence_parallel and would see this rank's tokens only: "
                f"call model.set_attn_implementation({self.name!r})"
            )
        if not isinstance(step, Step):
            raise ValueError(NO_STEP)
        if step.mesh != self.mesh:
            raise ValueError("the step was cut for another mesh than the model; pass both the same")
        if kwargs.get("use_cache") is not False or kwargs.get("past_key_values", kwargs.get("cache")) is not None:
            raise ValueError(
                "use_cache has to be False, as in step.inputs: a cache would hold the keys of this rank's tokens only"
            )
        ids, positions = kwargs.get("input_ids"), kwargs.get("position_ids")
        if positions is None or (ids is not None and tuple(ids.shape) != step.fed_shape):
            raise ValueError(
                f"the model was called with {'no' if positions is None else 'its'} position_ids and input_ids of "
                f"{None if ids is None else tuple(ids.shape)} for a step of {step.fed_shape}; call "
                "model(**step.inputs)"
            )
        return args, {**kwargs, "step": replace(step, scheme=self.scheme)}
