"""Every block with experts that the installed Transformers has, small, and the formula of its weights by hand."""

import functools
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig

MODELS = Path(transformers.__file__).parent / "models"
EXPERTS = re.compile(r"@use_experts_implementation[^\n]*\n(?:[^\n]*\n)*?class (\w+)")
WIDTH = 32
# Where a default is None, or there is none.
MISSING = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 48,
}


@functools.cache
def modules_of_blocks() -> dict[str, str]:
    """The module of each class that makes experts."""
    found = {}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        source = path.read_text()
        for experts in EXPERTS.findall(source):
            for made in re.finditer(rf"= {experts}\(", source):
                block = re.findall(r"^class (\w+)", source[: made.start()], re.M)[-1]
                found[block] = f"transformers.models.{path.parent.name}.{path.stem}"
    return found


def new_block(block: str, module: str, **settings: Any) -> nn.Module:
    """With weights so wide that experts differ, in float32."""
    kind = getattr(importlib.import_module(module), block)
    configs = vars(importlib.import_module(module.replace(".modeling_", ".configuration_")))
    tried = []
    for of_config in configs.values():
        if not isinstance(of_config, type) or not issubclass(of_config, PreTrainedConfig):
            continue
        if of_config.__module__ != module.replace(".modeling_", ".configuration_") or "4_5_VL_" in of_config.__name__:
            continue
        try:
            return _drawn(kind, _small(of_config(), settings))
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            tried.append(f"{of_config.__name__}: {error}")
    raise AssertionError(f"{block}: {tried}")


def _small(config: Any, settings: dict[str, Any]) -> Any:
    for name, x in list(vars(config).items()):
        if isinstance(x, PreTrainedConfig):
            _small(x, {})
        elif name.endswith("hidden_size") and isinstance(x, int):
            setattr(config, name, WIDTH)
        elif isinstance(x, int) and (name.endswith("intermediate_size") or name in ("ffn_dim", "vocab_size")):
            setattr(config, name, 48)
    for name, x in {**MISSING, **settings}.items():
        if name in settings or vars(config).get(name) is None:
            setattr(config, name, x)
    config._experts_implementation = config._attn_implementation = "eager"
    return config


def _drawn(kind: type[nn.Module], config: Any) -> nn.Module:
    arguments = {"layer_idx": 0, "intermediate_size": 48}
    names = inspect.signature(kind.__init__).parameters
    torch.manual_seed(0)
    block = kind(config, **{name: x for name, x in arguments.items() if name in names})
    with torch.no_grad():
        for x in (*block.parameters(), *block.buffers()):
            if x.is_floating_point():
                x.normal_(std=0.5 if x.ndim > 1 else 0.2)
    return block.float()


# ---- formulas: (T, E) logits and (T, K) ids -> (T, K) weights, but for a factor -----------------------------


def _normalised(weight_TK: Tensor) -> Tensor:
    return weight_TK / weight_TK.sum(-1, keepdim=True)


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": lambda logits_TE, ids_TK: logits_TE.softmax(-1).gather(1, ids_TK),
    "softmax of K": lambda logits_TE, ids_TK: logits_TE.gather(1, ids_TK).softmax(-1),
    "sigmoid": lambda logits_TE, ids_TK: logits_TE.sigmoid().gather(1, ids_TK),
    "normalised sigmoid": lambda logits_TE, ids_TK: _normalised(logits_TE.sigmoid().gather(1, ids_TK)),
    "normalised root of softplus": lambda logits_TE, ids_TK: _normalised(
        F.softplus(logits_TE).sqrt().gather(1, ids_TK)
    ),
}
