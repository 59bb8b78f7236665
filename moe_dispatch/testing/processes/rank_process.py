"""The life of a rank that is a process."""

import atexit
import faulthandler
import gc
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..call import takes_rank
from ..errors import failure_of
from ..worlds import MadeGroups

DESTROY_GROUPS = b"destroy the groups that the case made"  # a message to a rank, in place of a case
OWN_FRAME = f'  File "{__file__}"'  # in a stack file: from here on it is the machinery


def stack_file(directory: str, rank: int) -> Path:
    """Where a rank writes its stack when it is asked to by SIGUSR1, and when it crashes."""
    return Path(directory, f"stack_{rank}")


def rank_main(rank: int, ranks: int, directory: str, connection: Connection) -> None:
    """Join the group, then answer messages until an empty one."""
    done: list[bool] = []
    atexit.register(_leave_if, done)  # first, so that it is called after what cases register
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches all; the parent ends its ranks
    with stack_file(directory, rank).open("w") as file:
        faulthandler.enable(file, all_threads=False)
        faulthandler.register(signal.SIGUSR1, file, all_threads=False)
        with suppress(EOFError, BrokenPipeError):  # the parent died, or dropped its pool
            connection.send_bytes(_answer(rank, _join_group, rank, ranks, directory))
            if dist.is_initialized():  # not after a start that failed
                _serve(rank, connection)
                if dist.is_initialized():  # not after a case that destroyed it
                    dist.destroy_process_group()
    done.append(True)


def _leave_if(done: list[bool]) -> None:
    """End as a forked process does. To take everything apart takes half a second, and Triton then tells of leaks."""
    if done:
        os._exit(0)


def _serve(rank: int, connection: Connection) -> None:
    made = MadeGroups()
    gc.freeze()  # torch's own objects stay for ever: the collections after cases need not look at them
    while message := connection.recv_bytes():
        if message == DESTROY_GROUPS:
            connection.send_bytes(_answer(rank, made.destroy))
        else:
            connection.send_bytes(_answer(rank, _run_case, rank, message, made))


def _join_group(rank: int, ranks: int, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if problem := missing_interface(os.environ):
        raise ValueError(problem)
    limit = timedelta(minutes=30)  # the pool's time-out comes first, and tells where each rank stood
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=limit)


def missing_interface(environment: Mapping[str, str]) -> str:
    """What is wrong with GLOO_SOCKET_IFNAME; empty where nothing is."""
    wanted = environment.get("GLOO_SOCKET_IFNAME", "")
    there = [name for _, name in socket.if_nameindex()]
    missing = [name for name in wanted.split(",") if name and name not in there]
    if not missing:
        return ""
    return (
        f"GLOO_SOCKET_IFNAME is {wanted!r}, but this machine has no network interface {' or '.join(missing)}, only "
        f"{', '.join(there)}; set it to the one that leads to the other ranks, or unset it"
    )


def _run_case(rank: int, case: bytes, made: MadeGroups) -> tuple[Any, bool]:
    """The result, and whether there are groups to destroy."""
    sys.path[:], call = pickle.loads(case)
    fn, args = pickle.loads(call)
    torch.manual_seed(0)
    result = fn(rank, *args) if takes_rank(fn) else fn(*args)
    return result, made.any()


def _answer(rank: int, work: Callable[..., Any], *args: Any) -> bytes:
    """The pickled result of the work, or the pickled Failure."""
    try:
        return pickle.dumps(work(*args))
    except BaseException as error:  # pytest.fail and sys.exit raise no Exception
        return pickle.dumps(failure_of(rank, error))
