"""The config of a validate run: which keys there are."""

from dataclasses import replace
from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from sp_attention import Scheme
from sp_attention.work.scheme import NO_BOUND

from ....judge.layout import CONTIGUOUS, Layout
from ....plan.ids.format import MOST_EXPERTS
from ...desk.config_file import STRICT
from .spreading import CU_SEQLENS, Spreading

MOST_RANKS = 1024
MOST_WIDTH = 2**20  # what is below may still not fit in memory, which the run says
ULYSSES, TWO_DIMENSIONAL = "ulysses", "two_dimensional"


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ModelConfig:
    """Dimensions of the DeepSeek-style model; ``q_lora_rank`` 0: queries straight from the hidden state."""

    dim: int = Field(ge=1, le=MOST_WIDTH, examples=[64])
    vocab: int = Field(ge=256, le=MOST_WIDTH, examples=[256])  # a token is a byte
    layers: int = Field(ge=1, le=1024, examples=[3])
    dense_layers: int = Field(ge=0, le=1024, examples=[1])
    dense_hidden: int = Field(ge=1, le=MOST_WIDTH, examples=[128])
    heads: int = Field(ge=1, le=1024, examples=[4])
    q_lora_rank: int = Field(ge=0, le=MOST_WIDTH, examples=[24])
    kv_lora_rank: int = Field(ge=1, le=MOST_WIDTH, examples=[16])
    nope_head_dim: int = Field(ge=1, le=MOST_WIDTH, examples=[16])
    rope_head_dim: int = Field(ge=2, le=MOST_WIDTH, examples=[8])
    value_head_dim: int = Field(ge=1, le=MOST_WIDTH, examples=[12])
    experts: int = Field(ge=1, le=MOST_EXPERTS, examples=[8])
    top_k: int = Field(ge=1, le=MOST_EXPERTS, examples=[3])
    shared_experts: int = Field(ge=0, le=1024, examples=[1])
    expert_hidden: int = Field(ge=1, le=MOST_WIDTH, examples=[32])
    groups: int = Field(ge=1, le=MOST_EXPERTS, examples=[1])
    limited_groups: int = Field(ge=1, le=MOST_EXPERTS, examples=[1])
    score: Literal["sigmoid", "softmax"] = Field(examples=["sigmoid"])
    normalize: bool = Field(examples=["true"])
    route_scale: float = Field(gt=0, le=1e6, examples=[2.5])
    balance_coefficient: float = Field(ge=0, le=1e6, examples=[0.001])
    bias_rate: float = Field(ge=0, le=1e6, examples=[0.001])
    rope_theta: float = Field(gt=0, le=1e12, examples=[10000.0])
    norm_eps: float = Field(gt=0, le=1.0, examples=[1e-6])


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class TrainConfig:
    """A global batch of ``batch`` rows of ``seq`` tokens, ``steps`` steps of AdamW."""

    batch: int = Field(ge=1, le=MOST_WIDTH, examples=[3])
    seq: int = Field(ge=1, le=MOST_WIDTH, examples=[129])
    steps: int = Field(ge=1, le=100000, examples=[4])
    learning_rate: float = Field(gt=0, le=1e3, examples=[0.003])
    weight_decay: float = Field(ge=0, le=1e3, examples=[0.1])
    seed: int = Field(ge=0, le=2**63 - 1, examples=[0])


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ToleranceConfig:
    """Largest max |difference| / max |value| that counts as agreement, per quantity."""

    logits: float = Field(gt=0, examples=[1e-4])
    loss: float = Field(gt=0, examples=[1e-4])
    gradients: float = Field(gt=0, examples=[1e-4])
    loss_curve: float = Field(gt=0, examples=[1e-4])


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class RowConfig:
    """One row of the matrix: dp x sp x tp ranks, groups of ``ep`` of them share the experts; B, L global.

    ``documents``, each [real tokens, places], are packed end to end, row after row; without them each row is one. A
    query sees ``window`` keys back, all of them for -1. ``order`` is that of tokens over "sp"; ``stripe`` the places
    of a piece where that is "striped".
    """

    name: str = Field(min_length=1, examples=['"FSDP2 + TP2"'])
    dp: int = Field(default=1, ge=1, le=MOST_RANKS, examples=[2])
    sp: int = Field(default=1, ge=1, le=MOST_RANKS, examples=[1])
    tp: int = Field(default=1, ge=1, le=MOST_RANKS, examples=[2])
    ep: int = Field(default=1, ge=1, le=MOST_RANKS, examples=[2])
    batch: int = Field(ge=1, le=MOST_WIDTH, examples=[3])
    seq: int = Field(ge=1, le=MOST_WIDTH, examples=[129])
    documents: tuple[tuple[int, int], ...] = Field(
        default=(), description="a list of [tokens, places]", examples=["[[40, 48], [50, 50]]"]
    )
    window: int = Field(default=-1, ge=-1, le=MOST_WIDTH, examples=[-1])
    order: Literal["contiguous", "zigzag", "striped"] = Field(default=CONTIGUOUS, examples=["zigzag"])
    stripe: int = Field(default=1, ge=1, le=MOST_WIDTH, examples=[8])

    @property
    def layout(self) -> Layout:
        return Layout(
            dp=self.dp,
            sp=self.sp,
            tp=self.tp,
            ep=self.ep,
            batch=self.batch,
            seq=self.seq,
            documents=self.documents,
            window=self.window,
            order=self.order,
            stripe=self.stripe,
        )

    def special(self) -> list[str]:
        """What is unlike a row of (B, L), in words; empty where nothing is."""
        parts = []
        if self.documents:
            parts.append(f"{len(self.documents)} document{'' if len(self.documents) == 1 else 's'}")
        if self.window >= 0:
            parts.append(f"window {self.window}")
        return parts


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class SubjectRowConfig(RowConfig):
    """A row of any subject: the sequence in ``lengths`` over "sp", balanced where they are left out; the first
    ``left_padding`` tokens of each row are padding."""

    lengths: tuple[int, ...] = Field(default=(), description="a list of numbers", examples=["[20, 0, 13, 0]"])
    left_padding: tuple[int, ...] = Field(default=(), description="a list of numbers", examples=["[0, 9]"])

    @property
    def layout(self) -> Layout:
        return replace(RowConfig.layout.__get__(self), lengths=self.lengths, left_padding=self.left_padding)

    def special(self) -> list[str]:
        padding = [f"left padding {', '.join(map(str, self.left_padding))}"] if self.left_padding else []
        return [*RowConfig.special(self), *padding]


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class HfRowConfig(SubjectRowConfig):
    """A row of a Transformers model: rows travel to experts by this library, or by Transformers' own all-to-all."""

    ep_implementation: Literal["moe_dispatch", "all_to_all"] = Field(
        default="moe_dispatch", examples=['"all_to_all"']
    )


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class DebugRowConfig(RowConfig):
    """A row of the debug model, with the number of its heads, and the scheme of its attention: see ``Scheme``.

    ``head_ranks`` and ``keys`` are those of "two_dimensional". ``documents_as`` is what attention gets that says
    where documents are; with ``nan_padding`` what it gets is NaN at padding between them. With ``latent_keys`` it
    gets the latents of keys and values: see ``latent_attention_over_ranks``.
    """

    heads: int = Field(ge=1, le=1024, examples=[4])
    scheme: Literal["ulysses", "gather", "ring", "two_dimensional"] = Field(default=ULYSSES, examples=["ring"])
    head_ranks: int = Field(default=1, ge=1, le=MOST_RANKS, examples=[2])
    keys: Literal["gather", "ring"] = Field(default="gather", examples=["ring"])
    chunk: int = Field(default=NO_BOUND, ge=1, le=NO_BOUND, examples=[64])
    keep: bool = Field(examples=["true"])
    documents_as: Literal["cu_seqlens", "mask"] = Field(default=CU_SEQLENS, examples=["mask"])
    nan_padding: bool = Field(default=False, examples=["true"])
    latent_keys: bool = Field(default=False, examples=["true"])

    @property
    def spreading(self) -> Spreading:
        make, bounds = getattr(Scheme, self.scheme), {"keep": self.keep, "chunk": self.chunk}
        of_two = {"head_ranks": self.head_ranks, "keys": self.keys} if self.scheme == TWO_DIMENSIONAL else {}
        return Spreading(
            scheme=make(**of_two, **bounds),
            documents_as=self.documents_as,
            nan_padding=self.nan_padding,
            latent_keys=self.latent_keys,
        )


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class MatrixConfig:
    """A run of any subject. Every row of the matrix uses all ``ranks``."""

    ranks: int = Field(ge=1, le=MOST_RANKS, examples=[4])
    dtypes: tuple[Literal["float32", "float64"], ...] = Field(
        min_length=1, description="a list", examples=['["float32", "float64"]']
    )
    train: TrainConfig = Field(description="a table", examples=["[train]"])
    tolerance: dict[str, ToleranceConfig] = Field(description="a table per dtype", examples=["[tolerance.float64]"])
    rows: tuple[RowConfig, ...] = Field(min_length=1, description="a list of tables", examples=["[[rows]]"])


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class SubjectConfig(MatrixConfig):
    """A run of a user's subject."""

    rows: tuple[SubjectRowConfig, ...] = Field(min_length=1, description="a list of tables", examples=["[[rows]]"])


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class HfConfig(MatrixConfig):
    """A run of a Transformers model."""

    rows: tuple[HfRowConfig, ...] = Field(min_length=1, description="a list of tables", examples=["[[rows]]"])


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ValidateConfig(MatrixConfig):
    """A run of the debug model."""

    model: ModelConfig = Field(description="a table", examples=["[model]"])
    rows: tuple[DebugRowConfig, ...] = Field(min_length=1, description="a list of tables", examples=["[[rows]]"])
