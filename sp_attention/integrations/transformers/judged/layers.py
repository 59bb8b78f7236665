"""Which layers of a model are kept: one of each kind, in their order."""

from typing import Any

FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
LEAST = 2  # layers, where there are so many


def keep_one_layer_of_each_kind(of: dict[str, Any]) -> None:
    """Shorten the settings of a config. Of what kind a layer is, its lists with an entry for each layer say, its
    numbers of first layers that are dense, and what it says of single layers."""
    count = of.get("num_hidden_layers")
    if not isinstance(count, int):
        return
    lists = {name: x for name, x in of.items() if isinstance(x, list | tuple) and len(x) == count}
    firsts = {name: of[name] for name in FIRST_LAYERS if isinstance(of.get(name), int)}
    dense = of.get("mlp_only_layers") or ()
    every = of.get("decoder_sparse_step") or 1
    single = {int(layer): x for layer, x in (of.get("per_layer_config") or {}).items()}

    def kind(layer: int) -> tuple[Any, ...]:
        of_lists = [str(x[layer]) for x in lists.values()]
        of_firsts = [layer < first for first in firsts.values()]
        return *of_lists, *of_firsts, layer in dense, (layer + 1) % every == 0, str(single.get(layer))

    first_of_kind: dict[tuple[Any, ...], int] = {}
    for layer in range(count):
        first_of_kind.setdefault(kind(layer), layer)
    kept = sorted(first_of_kind.values())
    if len(kept) < LEAST:
        kept = list(range(min(count, LEAST)))
    of["num_hidden_layers"] = len(kept)
    of.update({name: [x[layer] for layer in kept] for name, x in lists.items()})
    of.update({name: sum(layer < first for layer in kept) for name, first in firsts.items()})
    if dense:
        of["mlp_only_layers"] = [new for new, layer in enumerate(kept) if layer in dense]
    if single:
        of["per_layer_config"] = {new: single[layer] for new, layer in enumerate(kept) if layer in single}
    if "moe_layer_end_index" in of:
        of["moe_layer_end_index"] = len(kept) - 1
    if "num_nextn_predict_layers" in of:
        of["num_nextn_predict_layers"] = 0  # layers behind the model, which training of the model itself leaves out
