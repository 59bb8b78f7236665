"""Run a function on several ranks of one machine, without torchrun: for anybody's tests."""

from .pool import RankError, RankPool, RankTimeout, run_ranks

__all__ = ["RankError", "RankPool", "RankTimeout", "run_ranks"]
