"""Memory of one call: what a forward leaves for its backward, and the most that both need at once."""

import ctypes
import gc
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

# Pages that are freed stay with the process, as CUDA's caching allocator keeps them. glibc reads these at the start.
ALLOCATOR = (
    ("MALLOC_MMAP_THRESHOLD_", "4294967296"),
    ("MALLOC_TRIM_THRESHOLD_", "17179869184"),
    ("MALLOC_TOP_PAD_", "67108864"),
    ("MALLOC_ARENA_MAX", "1"),
)
LOOK_SECONDS, MOST_LOOKS = 0.005, 400


def allocator_in_force() -> tuple[str, ...]:
    """``NAME=value`` of each setting of glibc's allocator that this process was started with."""
    return tuple(
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD")
    )


def bytes_kept(forward: Callable[[], Tensor], others: Callable[[], Iterable[Tensor]]) -> int:
    """Bytes that live after ``forward`` and did not before: unique storages, without that of the output.

    What autograd's own nodes saved is seen through ``saved_tensors_hooks``, what Python holds (a plan on the ``ctx``
    of a Function) through the garbage collector.

    Args:
        others: gives tensors that do not count, before the forward and after it.
    """
    known = {*_live_storages(), *_storages(others())}
    # a detached alias is a Python object of its own: it lives as long as the node, and makes no cycle
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda x: x):
        out = forward()
    after = _live_storages()
    for storage in _storages([out, *others()]):
        after.pop(storage, None)
    return sum(size for storage, size in after.items() if storage not in known)


def peak_bytes(call: Callable[[], object]) -> int | None:
    """How far the resident memory of this process rose during ``call``; None where Linux does not say."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not glibc: freed pages may then be used again, and not be seen
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _status_bytes("VmRSS")
    except OSError:
        return None
    call()
    return max(_status_bytes("VmHWM") - before, 0)


def _status_bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return int(found[1]) * 1024


def _live_storages() -> dict[int, int]:
    """Address -> bytes of every storage that a tensor in Python has."""
    _let_threads_finish()
    gc.collect()
    return _storages(thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))


def _let_threads_finish() -> None:
    """Wait until the other threads of this process have nothing to do, at two looks in a row.

    A backend's thread holds the buffers of a collective that is over until it has run again, which takes long on a
    busy machine.
    """
    idle = 0
    for _ in range(MOST_LOOKS):
        time.sleep(LOOK_SECONDS)
        idle = 0 if _others_run() else idle + 1
        if idle == 2:
            return


def _others_run() -> bool:
    """Whether another thread of this process runs, or would if it had a core; False where Linux does not say."""
    with suppress(OSError):  # no /proc
        for task in Path("/proc/self/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # it ended
                state = (task / "stat").read_text().rpartition(") ")[2][:1]
                if state == "R" and int(task.name) != threading.get_native_id():
                    return True
    return False


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    found = (x.untyped_storage() for x in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}
