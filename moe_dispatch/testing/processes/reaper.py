"""Ends the ranks of a parent that died, and removes their folder.

A program of its own, as only that outlives the parent: ranks cannot look after themselves while they import torch,
for seconds, or are stopped. It imports neither torch nor this package. Standard input is a pipe from the parent, with
the number of a process per line; it ends with the parent, whatever that died of.
"""

import os
import shutil
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress


def outlive(numbers: Iterable[str], folder: str) -> None:
    """Once there are no more ``numbers``, kill those processes that still live, and remove ``folder``."""
    processes = []
    for number in numbers:
        with suppress(ProcessLookupError):
            processes.append(os.pidfd_open(int(number)))  # unlike the number, it never names another process
    for process in processes:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the parent
        signal.signal(ignored, signal.SIG_IGN)
    outlive(sys.stdin, sys.argv[1])
