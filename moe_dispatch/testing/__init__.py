"""Run a function on several ranks of one machine, without torchrun: for anybody's tests.

:class:`RankThreads`: ranks are threads of this process, and take turns. 64 ranks cost milliseconds, every run is the
same, ranks that wait for each other for ever are reported at once, and the function may be any. For numbers.

:class:`RankPool`, or :func:`run_ranks` with a pool of its own: ranks are processes over gloo. Few ranks, and seconds
before the first call. For what threads cannot show: a real backend, a rank that dies or never returns, messages from
one rank to one other, counts of collectives as torch's dispatcher sees them, torch.compile, and everything that a
process has one of: module state, the environment, the default dtype, filters of warnings, patches.

:func:`compare_with_one_process`: a model of yours, a :class:`Subject`, on those ranks against itself in one process.
"""

from ..judge.layout import Layout
from ..judge.one_call import Comparison, compare_with_one_process
from ..judge.results import Difference
from ..judge.subject import Outcome, Subject
from .errors import RankError, RankTimeout
from .pool import RankPool, run_ranks
from .threads import RankThreads

__all__ = [
    "Comparison",
    "Difference",
    "Layout",
    "Outcome",
    "RankError",
    "RankPool",
    "RankThreads",
    "RankTimeout",
    "Subject",
    "compare_with_one_process",
    "run_ranks",
]
