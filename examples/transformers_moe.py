"""A Transformers MoE model on 4 ranks (data x sequence parallel, experts over all): losses and norms of one rank."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_dispatch.testing import run_ranks
from sp_attention.integrations.transformers import Parallel

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
CONFIG = AutoConfig.for_model("qwen3_moe", vocab_size=64, num_experts=8, moe_intermediate_size=16, **SIZES)


def train(model, batches, **sizes):
    parallel = Parallel(**sizes, device_type="cpu")  # dp=2, sp=2, ep=4
    parallel.apply(model)  # each rank keeps its experts; the rest of the model is Transformers' own
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for batch in batches:  # the whole batch on every rank
        step = parallel.shard(**batch)  # rows over "dp", the sequence over "sp", at any lengths
        loss = parallel.loss(model, model(**step.inputs), step)  # over the targets of all ranks
        loss.share.backward()
        parallel.sum_gradients(model)
        yield loss.whole, parallel.clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def on_rank(rank: int, dp: int, sp: int, ep: int, lengths: tuple[int, ...]) -> str:
    ids = torch.randint(64, (2, 33))  # the same on every rank, as the weights
    mask = torch.ones_like(ids).index_fill(1, torch.arange(5), 0)  # left padding
    labels = ids.masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask, "lengths": lengths}
    model = AutoModelForCausalLM.from_config(CONFIG)
    told = [f"loss {loss:.4f}, norm {norm:.4f}" for loss, norm in train(model, [batch] * 3, dp=dp, sp=sp, ep=ep)]
    held = sum(weight.numel() for weight in model.parameters())
    return f"rank {rank} of {dp * sp}:  {'  '.join(told)}  of {held} parameters"


if __name__ == "__main__":
    lines = run_ranks(on_rank, 1, 1, 1, 1, (33,), timeout=300) + run_ranks(on_rank, 4, 2, 2, 4, (21, 12), timeout=300)
    print("\n".join(lines))
