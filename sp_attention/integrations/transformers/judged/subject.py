"""A causal MoE model of Transformers as a subject: over ranks by our calls, in one process by Transformers' own."""

import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from moe_dispatch import ParallelMesh, TokenSharding, sum_gradients
from moe_dispatch.integrations.transformers import apply_expert_parallel
from moe_dispatch.testing import Layout, Outcome

from ....parallel.on_mesh import everyone
from ..apply import apply_sequence_parallel
from ..loss import causal_lm_loss
from ..step import shard_batch
from .batches import batch_of, real_logits
from .experts import ALL_TO_ALL, apply_all_to_all, experts_of_parameters, problem_of_all_to_all, whole_of_shares
from .models import Maker, structure
from .strict import strict_where_float64


class TransformersSubject:
    """A ``Subject``: see :class:`moe_dispatch.testing.Subject`. :func:`subject_of` makes one.

    In float64 nothing is cast to float32 inside of the model, in one process and over ranks.

    Args:
        maker: makes the whole model, the same in every process.
        ep_implementation: who moves rows to experts, ``"moe_dispatch"`` or Transformers' own ``"all_to_all"``.
    """

    def __init__(self, maker: Maker, ep_implementation: str) -> None:
        self.maker, self.ep_implementation = maker, ep_implementation

    @property
    def told(self) -> str:
        """What the model is, with its sizes."""
        text, experts = self.maker.config.get_text_config(), sorted(set(self._experts.values()))
        weights = sum(x.numel() for x in self._structure.parameters())
        return (
            f"{text.model_type}: {text.num_hidden_layers} layers of width {text.hidden_size}, "
            f"{text.num_attention_heads} heads, {text.num_key_value_heads} of keys and values, "
            f"{' or '.join(map(str, experts))} experts, {weights} parameters"
        )

    def problem_in(self, layout: Layout) -> str:
        """Why it cannot run in this layout, as far as is known before; empty where nothing is."""
        return problem_of_all_to_all(self._structure, layout) if self.ep_implementation == ALL_TO_ALL else ""

    def whole(self, layout: Layout) -> Any:
        """The model in one process, with Transformers' own attention and experts."""
        return self.maker.make()

    def share(self, whole: nn.Module, layout: Layout, mesh: ParallelMesh) -> Any:
        """A copy, with attention and experts cut over the ranks of ``mesh``."""
        model = copy.deepcopy(whole).to(mesh.dense.device_type)
        apply_sequence_parallel(model, mesh)
        if self.ep_implementation == ALL_TO_ALL:
            apply_all_to_all(model, mesh)
        else:
            apply_expert_parallel(model, mesh)
        return model

    def step_whole(self, model: Any, token_BL: Tensor, layout: Layout) -> Outcome:
        """Transformers' own forward and loss."""
        batch = batch_of(token_BL, layout)
        with strict_where_float64(model):
            out = model(**batch, use_cache=False)
            out.loss.backward()
        real_BL = batch.get("attention_mask", torch.ones_like(token_BL)).bool()
        whole = TokenSharding(batch=layout.batch, seq=layout.seq)
        return Outcome(logits_BlV=real_logits(out.logits, real_BL), loss=out.loss, tokens=whole)

    def step_share(self, model: Any, token_BL: Tensor, layout: Layout, mesh: ParallelMesh) -> Outcome:
        """The ten lines of a user."""
        step = shard_batch(batch_of(token_BL, layout), mesh, sharding=layout.sharding)
        with strict_where_float64(model):
            out = model(**step.inputs)
            loss = causal_lm_loss(model, out, step)
            loss.share.backward()
        sum_gradients(model, group=everyone(), expert_group=mesh.expert.get_group("edp"))
        logits_BlV = real_logits(step.own(out.logits), step.real_Bl)
        return Outcome(logits_BlV=logits_BlV, loss=loss.share, tokens=step.sharding)

    def whole_gradient(self, name: str, gradient: Tensor, layout: Layout, mesh: ParallelMesh) -> Tensor:
        """Our shares of experts are put together; DTensors are whole."""
        if name not in self._experts or self.ep_implementation == ALL_TO_ALL:
            return gradient
        return whole_of_shares(gradient, self._experts[name], mesh)

    @cached_property
    def _structure(self) -> Any:
        return structure(self.maker.config)

    @cached_property
    def _experts(self) -> dict[str, int]:
        return experts_of_parameters(self._structure)
