"""One row of the matrix: in one process, and on a mesh."""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch import Tensor

from ...judge.compare import compare
from ...judge.results import Reference, Settings, Tolerance
from ...judge.train import run_on_mesh, run_reference
from ...judge.words import words_of
from .config.tables import MatrixConfig
from .mutants.mutants import mutated
from .results import RowResult
from .rows import Row
from .traffic import first_plan, rows_of_every_rank


def run_reference_of(config: MatrixConfig, row: Row, dtype: str, token_SBL: Tensor) -> Reference:
    """The training run of a row in one process.

    Args:
        token_SBL: the bytes of every step.
    """
    return run_reference(row.source.load(), row.layout, getattr(torch, dtype), token_SBL, settings_of(config))


def run_row(
    config: MatrixConfig, row: Row, dtype: str, token_SBL: Tensor, reference: Reference, mutant: str
) -> RowResult:
    """One row of the matrix, on every rank of the default process group. The same result on every rank.

    Args:
        mutant: name of the known bug to put in; empty for none.
    """
    start = time.perf_counter()
    subject = row.source.load()
    with mutated(mutant) as ran, first_plan() as plan, quiet():
        found = run_on_mesh(subject, row.layout, getattr(torch, dtype), token_SBL, settings_of(config))
    tolerance = Tolerance(**asdict(config.tolerance[dtype]))
    differences = compare(found.training, reference, tolerance)
    return RowResult(
        name=row.name,
        dtype=dtype,
        mesh=row.layout.mesh,
        shape=row.layout.shape,
        differences=differences,
        words=words_of(differences, found, reference, row.layout),
        error="",
        losses=found.training.losses,
        reference_losses=reference.training.losses,
        seconds=time.perf_counter() - start,
        rank_of_token_BL=found.rank_of_token_BL,
        rows_sent_PP=rows_of_every_rank(plan),
        mutant_ran=any_rank(bool(ran)),
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without a note of FSDP2 that is about other uses: that writing in place to a module's output breaks its hooks
    where that is a view, as the local tensors of DTensor are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        yield


def any_rank(here: bool) -> bool:
    """Whether it is so on any rank. Collective."""
    of_rank: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(of_rank, here)
    return any(of_rank)


def settings_of(config: MatrixConfig) -> Settings:
    return Settings(learning_rate=config.train.learning_rate, weight_decay=config.train.weight_decay)
