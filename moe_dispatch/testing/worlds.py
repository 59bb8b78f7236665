"""What torch.distributed keeps per process, kept per rank. Private parts of torch, as of 2.13, are used here only.

``distributed_c10d._world`` holds the default group and the facts of all groups; torch names it an extension point. A
registry in C++ finds groups by name, for DeviceMesh and for functional collectives; it can be told to look among the
groups of the calling thread.
"""

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh

from ..wire.exchange import check_is_group

registry: Any = _distributed_c10d  # its stub does not know all of it
BACKEND = "cpu:threaded"  # not registered with torch: no group is made from this name alone


@dataclass
class World:
    """The fields of torch's own, for one rank."""

    default_pg: dist.ProcessGroup | None = None
    pg_map: dict[Any, Any] = field(default_factory=dict)
    pg_names: dict[Any, Any] = field(default_factory=dict)
    pg_group_ranks: dict[Any, Any] = field(default_factory=dict)
    pg_backend_config: dict[Any, Any] = field(default_factory=dict)
    group_count: int = 1  # the default group is named "0"
    tags_to_pg: dict[Any, Any] = field(default_factory=dict)
    pg_to_tag: dict[Any, Any] = field(default_factory=dict)
    pg_coalesce_state: dict[Any, Any] = field(default_factory=dict)
    comms: list[Any] = field(default_factory=list)


class Worlds:
    """Stands in for ``_world``: that of the calling thread, or the process's, if the thread is no rank."""

    def __init__(self, of_process: Any) -> None:
        vars(self).update(_of_process=of_process, _of_thread=threading.local(), _leaving=threading.Lock())

    @contextmanager
    def of(self, group: dist.ProcessGroup, backend: str) -> Iterator[None]:
        """Make the calling thread a rank of ``group``, its default group, whose backend has this name."""
        registry._unregister_all_process_groups()  # of a thread that had this one's number before
        self._of_thread.world = World(default_pg=group)
        ranks = {rank: rank for rank in range(group.size())}
        c10d._register_pg_in_world(group, backend, registry.HashStore(), group.group_name, backend, ranks)
        try:
            yield
        finally:
            del self._of_thread.world
            with self._leaving:
                if c10d._world is self:  # else the groups are no longer the thread's, but the process's
                    registry._unregister_all_process_groups()

    def end(self) -> None:
        with self._leaving:
            registry._set_thread_isolation_mode(False)
            c10d._world = self._of_process

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(self._of_thread, "world", self._of_process), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(getattr(self._of_thread, "world", self._of_process), name, value)


@contextmanager
def world_per_thread() -> Iterator[Worlds]:
    """Until the block ends, each thread can have a world.

    Raises:
        ValueError: inside such a block.
    """
    of_process = c10d._world
    if isinstance(of_process, Worlds):
        raise ValueError("a run of RankThreads within a run of RankThreads; there can be one at a time in a process")
    worlds = Worlds(of_process)
    c10d._world = worlds  # type: ignore[assignment]
    registry._set_thread_isolation_mode(True)
    try:
        yield worlds
    finally:
        worlds.end()


def _forget_meshes() -> None:
    from torch.distributed.tensor._redistribute import _gen_transform_infos
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()
    _gen_transform_infos.cache_clear()


class MadeGroups:
    """The groups of this process besides its default group: those that a case made, also behind a DeviceMesh."""

    def __init__(self) -> None:
        default = check_is_group(c10d._world.default_pg)
        self._default, self._first_number = default, c10d._world.group_count
        self._backend, self._store = c10d._world.pg_map[default]
        self._num_ends = 0

    def any(self) -> bool:
        """Whether there are some, or were."""
        return len(c10d._world.pg_map) > 1 or c10d._world.group_count != self._first_number

    def destroy(self) -> None:
        """Destroy them. Every rank calls this after all are done with the case, as often as the others.

        A group has 3 threads and some descriptors, which end with its last reference. Objects that the case left hold
        it: a graph, a mesh. So meshes lose their groups here. DTensor's caches give results of an earlier case on an
        equal mesh with the mesh of that case, whose groups are gone: they are cleared.
        """
        for group in [group for group in c10d._world.pg_map if group is not self._default]:
            dist.destroy_process_group(group)
        had_meshes = False
        for mesh in [thing for thing in gc.get_objects() if type(thing) is DeviceMesh]:
            for name in [name for name, group in mesh._pg_registry.items() if group is not self._default]:
                del mesh._pg_registry[name]
                had_meshes = True
        if had_meshes and "torch.distributed.tensor" in sys.modules:
            _forget_meshes()
        # Ranks name the next groups by counting. They may have made more or fewer of them than their peers, so they
        # begin anew, and under a prefix that is new: what the store has of an old group of that name is out of date.
        self._num_ends += 1
        c10d._world.group_count = self._first_number
        store = registry.PrefixStore(f"after {self._num_ends}", self._store)
        c10d._world.pg_map[self._default] = self._backend, store
        gc.collect()
        gc.freeze()  # what is left stays: a rank that compiled looked through it after each case, for 0.2 s
