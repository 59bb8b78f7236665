"""Small workloads for the tests of `bench`."""

from moe_dispatch.lab.bench.config import DispatchConfig, load_bench
from tests.support.lab.configs import CONFIGS

TINY = load_bench(CONFIGS / "bench" / "bench_tiny.toml")
ROUTED = DispatchConfig(name="r", ranks=2, tokens=(5, 3), dim=7, experts=4, top_k=2, dtype="float32")
