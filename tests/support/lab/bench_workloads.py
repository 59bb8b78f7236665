"""Small workloads for the tests of `bench`."""

from moe_dispatch.lab.bench.config import AttentionConfig, DispatchConfig, load_bench
from tests.support.lab.configs import CONFIGS

TINY = load_bench(CONFIGS / "bench" / "bench_tiny.toml")
ROUTED = DispatchConfig(name="r", ranks=2, tokens=(5, 3), dim=7, experts=4, top_k=2, dtype="float32")
CAUSAL = AttentionConfig(
    name="c", ranks=4, batch=2, seq=32, heads=8, kv_heads=4, head_dim=4, dtype="float64", window=-1
)
