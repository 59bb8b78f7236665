"""What the tests of the commands share."""

import pytest

from moe_dispatch.lab.desk.ranks import launch
from moe_dispatch.lab.validate import matrix
from tests.support.lab.launches import SLURM, TORCHRUN
from tests.support.lab.scripted_ranks import PoolInProcess, Script


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script()
    monkeypatch.setattr(matrix, "run_reference_of", script.run_reference)
    monkeypatch.setattr(matrix, "run_row", script.run_row)
    monkeypatch.setattr(launch, "RankPool", lambda: PoolInProcess(script))
    for name in (*TORCHRUN, *SLURM):
        monkeypatch.delenv(name, raising=False)
    return script
