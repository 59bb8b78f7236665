"""What ``sp_attention`` builds on besides the public names: the one door between the two packages. Not for users."""

from .layer.share import expert_layers
from .layout.on_device import copied_to
from .layout.partition import check_count
from .wire.agreement import BAD, Statement, digest
from .wire.autocast import autocast_as_now, cast_to_autocast, without_autocast
from .wire.callers import check_memory
from .wire.devices import carries, device_for, device_of, most, problem_of_devices
from .wire.exchange import (
    FinishedExchange,
    PendingExchange,
    check_group,
    check_is_group,
    exchange_rows,
    start_exchange,
)
from .wire.group_copy import copy_in_group, state_without_group
from .wire.local_tensors import is_dtensor, problem_of_dtensors, refuse_dtensors
from .wire.policies import unseen_by_policies
from .wire.uncompiled import constant_in_graphs, uncompiled

__all__ = [
    "BAD",
    "FinishedExchange",
    "PendingExchange",
    "Statement",
    "autocast_as_now",
    "carries",
    "cast_to_autocast",
    "check_count",
    "check_group",
    "check_is_group",
    "check_memory",
    "constant_in_graphs",
    "copied_to",
    "copy_in_group",
    "device_for",
    "device_of",
    "digest",
    "exchange_rows",
    "expert_layers",
    "is_dtensor",
    "most",
    "problem_of_devices",
    "problem_of_dtensors",
    "refuse_dtensors",
    "start_exchange",
    "state_without_group",
    "uncompiled",
    "unseen_by_policies",
    "without_autocast",
]
