"""``plan``: check all input, predict, print, write."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..desk.console import output_console
from ..desk.output import check_output
from ..desk.packaged import find_config
from ..desk.provenance import provenance
from .attention import forecast_attention
from .attention_report import as_json, print_attention
from .config import PlanConfig, load_plan_config
from .plan_bytes import plan_bytes
from .predict import predict
from .report import print_plan, write_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Plans whose input was checked: one for each number of nodes.

    Attributes:
        json: file to write.
        origin: what the JSON says of the run.
    """

    configs: Sequence[PlanConfig]
    json: Path | None
    origin: Mapping[str, str]

    def run(self) -> int:
        """The exit status, 0."""
        predictions = [prediction for config in self.configs for prediction in predict(config)]
        of_plans = list(plan_bytes(self.configs))
        console, config = output_console(json=self.json), self.configs[0]
        print_plan(console, config, predictions, of_plans)
        found: dict[str, Any] = {}
        if config.attention is not None:
            forecast = forecast_attention(config, config.attention)
            print_attention(console, config, config.attention, forecast)
            found["attention"] = as_json(forecast)
        if self.json:
            write_plan(self.json, self.configs, predictions, of_plans, found, origin=self.origin)
        return 0


def prepare(arguments: argparse.Namespace) -> Job:
    """Read and check all input.

    Raises:
        ValueError: fact, rule, remedy.
    """
    if arguments.json:
        check_output(arguments.json)
    path = find_config(arguments.config, tool="plan", what="plan")
    configs = [load_plan_config(path, _changes(arguments, nodes)) for nodes in arguments.nodes or [None]]
    return Job(configs=configs, json=arguments.json, origin=provenance(arguments.argv))


def _changes(arguments: argparse.Namespace, nodes: int | None) -> Mapping[str, Mapping[str, Any]]:
    """What the command line gives in place of the file's values."""
    given = {
        "attention": {"length": arguments.length, "ranks": arguments.sequence_ranks},
        "load": {"tokens_per_rank": arguments.tokens, "zipf": arguments.zipf},
        "cluster": {
            "nodes": nodes,
            "ranks_per_node": arguments.ranks_per_node,
            "intra_gb_s": arguments.intra_gb_s,
            "inter_gb_s": arguments.inter_gb_s,
            "latency_us": arguments.latency_us,
        },
    }
    return {
        table: {key: value for key, value in values.items() if value is not None} for table, values in given.items()
    }
