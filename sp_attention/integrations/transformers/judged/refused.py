"""Whether a subject can be cut over ranks at all: asked on one rank that is a thread, before any other starts."""

from moe_dispatch import build_mesh
from moe_dispatch.testing import Layout, RankThreads

from .subject import TransformersSubject


def problem_of_subject_over_ranks(subject: TransformersSubject) -> str:
    """What ``apply_sequence_parallel`` or ``apply_expert_parallel`` says of its model; empty if they take it. Weights
    that are missing in its folder are told, too."""
    with RankThreads() as threads:
        (problem,) = threads.run(_problem, 1, subject, timeout=600)
    return problem


def _problem(subject: TransformersSubject) -> str:
    layout, mesh = Layout(batch=1, seq=1), build_mesh(device_type="cpu")
    try:
        subject.share(subject.whole(layout), layout, mesh)
    except ValueError as error:
        return str(error).removeprefix("rank 0: ")
    return ""
