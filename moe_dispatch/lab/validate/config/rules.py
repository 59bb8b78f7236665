"""Rules between the keys of a config; a broken one is a sentence: key, fact, rule, a value that works."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from math import gcd
from typing import Any

from ....judge.layout import CONTIGUOUS, STRIPED
from .spreading import CU_SEQLENS, MASK
from .tables import (
    TWO_DIMENSIONAL,
    DebugRowConfig,
    HfConfig,
    HfRowConfig,
    MatrixConfig,
    ModelConfig,
    RowConfig,
    SubjectConfig,
    SubjectRowConfig,
    ValidateConfig,
)

DTYPES = ("float32", "float64")


def broken_rules(config: ValidateConfig) -> list[str]:
    """Every rule that the config breaks; empty where it can run."""
    return [*_of_model(config.model), *_of_matrix(config, lambda row: _of_debug_row(row, config))]


def broken_rules_of_matrix(config: SubjectConfig | HfConfig) -> list[str]:
    """:func:`broken_rules` of any subject, whose sizes only it knows."""
    return list(_of_matrix(config, _of_subject_row))


def _of_matrix(config: MatrixConfig, of_subject: Callable[[Any], Iterable[str]]) -> Iterator[str]:
    yield from _of_dtypes(config)
    names = Counter(row.name for row in config.rows)
    for index, row in enumerate(config.rows):
        of_row = [*_of_row(row, config), *_of_order(row), *of_subject(row), *_of_documents(row.documents)]
        if names[row.name] > 1:
            of_row.append(f"name is used {names[row.name]} times; give each row its own name")
        for problem in of_row:
            key, _, rest = problem.partition(" ")
            yield f'rows[{index}].{key} (row "{row.name}") {rest}'


def _of_model(model: ModelConfig) -> Iterator[str]:
    if model.dense_layers >= model.layers:
        yield (
            f"model.dense_layers is {model.dense_layers} of {model.layers} layers, leaving no MoE layer; "
            f"it has to be below model.layers, e.g. dense_layers = {model.layers - 1}"
        )
    if model.rope_head_dim % 2:
        yield (
            f"model.rope_head_dim is {model.rope_head_dim}; RoPE turns pairs, so it has to be even, "
            f"e.g. rope_head_dim = {model.rope_head_dim + 1}"
        )
    if model.experts % model.groups:
        works = max(count for count in range(1, model.groups) if model.experts % count == 0)
        yield (
            f"model.groups is {model.groups}; groups of equal size have to hold the {model.experts} experts, "
            f"e.g. groups = {works}"
        )
    elif model.limited_groups > model.groups:
        yield (
            f"model.limited_groups is {model.limited_groups}, of {model.groups} groups; "
            f"it has to be at most model.groups, e.g. limited_groups = {model.groups}"
        )
    elif model.top_k > (reachable := model.experts // model.groups * model.limited_groups):
        yield (
            f"model.top_k is {model.top_k}; a token reaches the {reachable} experts of its "
            f"{model.limited_groups} of {model.groups} groups, so it has to be at most that, "
            f"e.g. top_k = {reachable}"
        )


def _of_dtypes(config: MatrixConfig) -> Iterator[str]:
    for dtype, count in Counter(config.dtypes).items():
        if count > 1:
            yield f'dtypes lists "{dtype}" {count} times; list it once'
        if dtype not in config.tolerance:
            yield f"tolerance.{dtype} is missing; each of dtypes needs tolerances, e.g. [tolerance.{dtype}]"
    for dtype in config.tolerance:
        if dtype not in DTYPES:
            yield f"tolerance.{dtype} is not a dtype; tolerances are those of {' or '.join(DTYPES)}"


def _of_row(row: RowConfig, config: MatrixConfig) -> Iterator[str]:
    """Sentences that start with a key of the row."""
    ranks = row.layout.ranks
    if ranks != config.ranks:
        yield (
            f"dp is {row.dp}, and dp * sp * tp = {row.dp} * {row.sp} * {row.tp} = {ranks}; it has to be "
            f"ranks = {config.ranks}, e.g. {_mesh_that_works(row, config.ranks)}"
        )
    elif ranks % row.ep:
        most = config.model.experts if isinstance(config, ValidateConfig) else ranks
        works = [str(ep) for ep in range(1, ranks + 1) if ranks % ep == 0 and ep <= most]
        yield f"ep is {row.ep}; it has to divide dp * sp * tp = {ranks}: set ep to {' or '.join(works)}"


def _of_order(row: RowConfig) -> Iterator[str]:
    if row.stripe > 1 and row.order != STRIPED:
        yield (
            f'stripe is {row.stripe} in the order "{row.order}", which has no stripes; leave it out, or set '
            f'order = "{STRIPED}"'
        )


def _of_debug_row(row: DebugRowConfig, config: ValidateConfig) -> Iterator[str]:
    ranks, experts = row.layout.ranks, config.model.experts
    if ranks == config.ranks and ranks % row.ep == 0 and row.ep > experts:
        yield (
            f"ep is {row.ep} for {experts} experts; every rank of a group holds at least one: "
            "lower ep, or raise model.experts"
        )
    own_heads = "heads" if row.heads != config.model.heads else "model.heads"
    cut = {own_heads: row.heads, "model.dense_hidden": config.model.dense_hidden, "model.vocab": config.model.vocab}
    for key, value in cut.items():
        if value % row.tp:
            yield (
                f"tp is {row.tp}; it cuts {key} = {value} into equal parts, so it has to divide it: "
                f"set {key} = {value + row.tp - value % row.tp}, or another tp"
            )
    yield from _of_packing(row)
    yield from _of_spreading(row)


def _of_spreading(row: DebugRowConfig) -> Iterator[str]:
    of_two = {"head_ranks": row.head_ranks > 1, "keys": row.keys != "gather"}
    for key in (key for key, is_set in of_two.items() if is_set and row.scheme != TWO_DIMENSIONAL):
        yield (
            f"{key} is {getattr(row, key)!r} in the scheme {row.scheme!r}, which has none to choose; leave it out, "
            f'or set scheme = "{TWO_DIMENSIONAL}"'
        )
    if row.scheme == TWO_DIMENSIONAL and row.sp % row.head_ranks:
        yield (
            f"head_ranks is {row.head_ranks}; so many of the sp = {row.sp} ranks are a team, and it has to divide "
            f"sp: e.g. head_ranks = {gcd(row.sp, row.head_ranks)}"
        )
    if row.documents_as == MASK and not row.documents:
        yield f'documents_as is "{MASK}" without documents; leave it out ("{CU_SEQLENS}"), or set documents'
    if row.nan_padding and row.documents_as == MASK:
        yield f'nan_padding is true with documents_as = "{MASK}", which a NaN goes through; leave out one of them'


def _of_subject_row(row: SubjectRowConfig) -> Iterator[str]:
    places = [room for _, room in row.documents]
    if places and not {row.seq * (i + 1) for i in range(row.batch)} <= set(accumulate(places)):
        yield (
            f"documents take {places} places of batch = {row.batch} rows of seq = {row.seq}; they are packed end to "
            "end, and one has to end where a row does"
        )
    elif sum(places) > row.batch * row.seq:
        yield f"documents take {sum(places)} places; there are batch * seq = {row.batch * row.seq}"
    if row.lengths and (len(row.lengths) != row.sp or sum(row.lengths) != row.seq or min(row.lengths) < 0):
        yield (
            f"lengths is {list(row.lengths)}; it has a length of at least 0 for each of sp = {row.sp} ranks, which "
            f"add up to seq = {row.seq}: e.g. leave it out, or lengths = {[row.seq, *[0] * (row.sp - 1)]}"
        )
    if row.lengths and row.order != CONTIGUOUS:
        yield f'order is "{row.order}" beside lengths, and has lengths of its own: leave out one of them'
    if row.left_padding and (
        len(row.left_padding) != row.batch or not all(0 <= pads < row.seq for pads in row.left_padding)
    ):
        yield (
            f"left_padding is {list(row.left_padding)}; it has a number for each of batch = {row.batch} rows, from 0 "
            f"to below seq = {row.seq}: e.g. left_padding = {[0] * row.batch}"
        )
    if isinstance(row, HfRowConfig):
        yield from _of_hf_row(row)


def _of_hf_row(row: HfRowConfig) -> Iterator[str]:
    if row.tp > 1:
        yield f"tp is {row.tp}; Transformers' models are not cut over tp here: set tp = 1, and dp or sp to {row.tp}"
    if row.window >= 0:
        yield f"window is {row.window}; the model has its own windows: leave it out"
    if row.documents and row.left_padding:
        yield "documents are found where there is no padding: leave out documents or left_padding"
    if any(tokens != places for tokens, places in row.documents):
        yield f"documents is {list(map(list, row.documents))}; Transformers packs without padding: tokens = places"


def _of_packing(row: RowConfig) -> Iterator[str]:
    """Of the debug model."""
    places = sum(room for _, room in row.documents)
    if row.documents and (row.batch != 1 or row.seq != places):
        yield (
            f"documents take {places} places of batch = {row.batch} rows of seq = {row.seq}; they are packed into "
            f"one row: set batch = 1 and seq = {places}"
        )


def _of_documents(documents: tuple[tuple[int, int], ...]) -> Iterator[str]:
    if any(not 0 <= tokens <= room for tokens, room in documents):
        yield f"documents is {list(map(list, documents))}; each is [tokens, places], with 0 <= tokens <= places"


def _mesh_that_works(row: RowConfig, ranks: int) -> str:
    if row.sp > 1 and ranks % (row.sp * row.tp) == 0:
        return f"dp = {ranks // (row.sp * row.tp)}, sp = {row.sp}, tp = {row.tp}"
    if ranks % row.tp == 0:
        return f"dp = {ranks // row.tp}, tp = {row.tp}"
    if ranks % row.dp == 0:
        return f"dp = {row.dp}, tp = {ranks // row.dp}"
    return f"dp = {ranks}, tp = 1"
