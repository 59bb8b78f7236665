"""The config of a model, shrunk to a debug size that keeps its structure."""

import re
from collections.abc import Callable, Iterable
from math import gcd
from types import MappingProxyType
from typing import Any

from .layers import keep_one_layer_of_each_kind

VOCAB = 256  # a token is a byte
HEADS = 8  # of attention, at least, where there are so many
HEAD_WIDTH = 8  # the narrowest
EXPERTS_PER_CHOICE, CHOICES = 8, 4  # at most, so 32 experts
GROUPS = 4  # of experts, at least, where there are so many
WIDTH, WIDEST = 16, 64  # of networks and latents: the narrowest of a model, and none above
WINDOW = 7  # tokens

OF_HEADS = re.compile(r"(swa_)?num_(attention|key_value|global_key_value)_heads(_per_layer)?")
OF_HEAD_WIDTHS = re.compile(r"(v_|swa_|swa_v_|qk_|qk_nope_|qk_rope_|global_)?head_dim|rotary_dim")
OF_NETWORKS, OF_LATENTS = re.compile(r"(.*_)?intermediate_size"), re.compile(r"(q|kv|o)_lora_rank")
OF_WINDOWS = re.compile(r"sliding_window(_size)?")
OF_EXPERTS = re.compile(r"(moe_)?num_(local_)?experts|n_routed_experts")
OF_CHOICES = re.compile(r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts")
OF_GROUPS, OF_CHOSEN_GROUPS = re.compile(r"n_group|num_expert_group"), re.compile(r"topk_group")
OF_TOKENS = re.compile(r".*_token_id")
# What default configs leave open (None), and models need.
OPEN = MappingProxyType({"head_dim": HEAD_WIDTH, "n_shared_experts": 1})

Settings = dict[str, Any]


def shrunk(config: Any) -> Any:
    """A config of the same class, small.

    Kept are the ratios of heads to key/value heads, of widths of heads to each other, of chosen groups of experts to
    all; how many experts there are per choice, up to 8; a layer of each kind (dense and MoE, full and in windows), in
    their order; and every setting that is no size.
    """
    settings = config.to_dict()
    keep_one_layer_of_each_kind(settings)
    # What a config says of single layers is shrunk by the same factors.
    scopes: list[Settings] = [settings, *(settings.get("per_layer_config") or {}).values()]
    for change in (_heads, _head_widths, _networks, _rest):
        change(scopes)
    _experts(settings)
    return type(config).from_dict(settings)


def _sizes(scopes: Iterable[Settings], names: re.Pattern[str]) -> list[int]:
    """All sizes of these names, one by one where a name has a list."""
    found = [x for of in scopes for name, x in of.items() if names.fullmatch(name) and x]
    return [size for x in found for size in (x if isinstance(x, list | tuple) else [x])]


def _change(scopes: Iterable[Settings], names: re.Pattern[str], smaller: Callable[[int], int]) -> None:
    for of in scopes:
        for name, x in of.items():
            if names.fullmatch(name) and x:
                of[name] = [smaller(size) for size in x] if isinstance(x, list | tuple) else smaller(x)


def _heads(scopes: list[Settings]) -> None:
    """All numbers of heads by one divisor, so that their ratios stay."""
    fewest, common = scopes[0].get("num_attention_heads") or 1, gcd(*_sizes(scopes, OF_HEADS))
    by = _largest_divisor(common, leaving=lambda divisor: fewest // divisor >= HEADS)
    _change(scopes, OF_HEADS, lambda heads: heads // by)


def _largest_divisor(of: int, *, leaving: Callable[[int], bool]) -> int:
    return max((d for d in range(1, of + 1) if of % d == 0 and leaving(d)), default=1)


def _head_widths(scopes: list[Settings]) -> None:
    """The narrowest becomes HEAD_WIDTH; the others in proportion, and even, as RoPE turns pairs. Hidden: a narrowest
    head for each, or exactly all heads, where that was so."""
    of = scopes[0]
    narrowest = min(_sizes(scopes, OF_HEAD_WIDTHS), default=HEAD_WIDTH)
    heads, width = of.get("num_attention_heads") or 1, of.get("head_dim")
    _change(scopes, OF_HEAD_WIDTHS, lambda size: max(2 * round(size * HEAD_WIDTH / narrowest / 2), 2))
    of["hidden_size"] = heads * max(HEAD_WIDTH, of.get("head_dim") or 0 if width else HEAD_WIDTH)


def _networks(scopes: list[Settings]) -> None:
    """The narrowest network, and the smallest latent, become WIDTH; the others in proportion, up to WIDEST."""
    for names in (OF_NETWORKS, OF_LATENTS):
        narrowest = min(_sizes(scopes, names), default=WIDTH)
        _change(scopes, names, lambda size, least=narrowest: min(8 * round(size * WIDTH / least / 8), WIDEST))


def _experts(of: Settings) -> None:
    """At most CHOICES of each token; EXPERTS_PER_CHOICE times as many experts, or as few as there were. What the
    config leaves open (None) gets a size, too."""
    experts, choices, groups, chosen = (
        next((of[name] for name in of if names.fullmatch(name) and of[name]), None)
        for names in (OF_EXPERTS, OF_CHOICES, OF_GROUPS, OF_CHOSEN_GROUPS)
    )
    groups = groups or 1
    chosen = chosen or groups
    by = _largest_divisor(gcd(groups, chosen), leaving=lambda divisor: groups // divisor >= GROUPS)
    few = min(choices or CHOICES, CHOICES)
    per_choice = min(experts // (choices or few), EXPERTS_PER_CHOICE) if experts else EXPERTS_PER_CHOICE
    per_group = -(-few * per_choice // (groups // by))
    sizes = (per_group * (groups // by), few, groups // by, chosen // by)
    for names, size in zip((OF_EXPERTS, OF_CHOICES, OF_GROUPS, OF_CHOSEN_GROUPS), sizes, strict=True):
        of.update({name: size for name in of if names.fullmatch(name)})


def _rest(scopes: list[Settings]) -> None:
    _change(scopes, OF_WINDOWS, lambda window: min(window, WINDOW))
    _change(scopes, re.compile(".*vocab_size.*"), lambda vocab: VOCAB)
    for of in scopes:
        for name, x in of.items():
            if OF_TOKENS.fullmatch(name):
                of[name] = None
            elif x is None and name in OPEN:
                of[name] = OPEN[name]
