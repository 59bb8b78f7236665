"""Two hosts on one machine: network namespaces with a link between them. Linux, as root, with iproute2."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.support.lab.configs import ROOT

PORT = "29511"


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise RuntimeError(
            f"ip {' '.join(words)}: {done.stderr.strip()}; `make hosts` needs root (CAP_NET_ADMIN and CAP_SYS_ADMIN) "
            "and iproute2"
        )


@dataclass(frozen=True, kw_only=True)
class Host:
    """One end of the link. Programs of one name on both hosts are one job."""

    number: int
    namespace: str
    folder: Path

    @property
    def interface(self) -> str:
        return f"{self.namespace}e"  # at most 15 letters

    def cut_link(self) -> None:
        ip("-n", self.namespace, "link", "set", self.interface, "down")

    def validate(self, *arguments: str) -> "Program":
        """Start ``validate`` under torchrun, one rank on this host."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        torchrun += ["--node-rank", str(self.number), "--master-addr", "10.77.0.1", "--master-port", PORT]
        words = ["ip", "netns", "exec", self.namespace, *torchrun, "-m", "moe_dispatch", "validate", *arguments]
        return Program(words, self.folder / "out", {"GLOO_SOCKET_IFNAME": self.interface})


class Program:
    """A running program, whose output goes to a file. A context manager that ends it."""

    def __init__(self, words: list[str], output: Path, variables: dict[str, str]) -> None:
        self.output = output
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
        with output.open("w") as file:
            # A session of its own, to end torchrun with all that it started.
            self.process = subprocess.Popen(
                words, stdout=file, stderr=file, env=env, cwd=ROOT, start_new_session=True
            )

    @property
    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, told: str, *, seconds: float) -> float:
        """Seconds until ``told`` is in the output."""
        start = time.monotonic()
        while told not in self.text:
            if time.monotonic() - start > seconds:
                raise TimeoutError(f"{told!r} did not come within {seconds:g} s:\n{self.text}")
            time.sleep(0.1)
        return time.monotonic() - start

    def end(self, *, seconds: float) -> int:
        """The exit status, which has to come within so many seconds."""
        return self.process.wait(timeout=seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait()


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """10.77.0.1 and 10.77.0.2, with a link that is up. Both are removed in the end."""
    hosts = tuple(
        Host(number=number, namespace=f"moe{os.getpid()}{letter}", folder=folder / letter)
        for number, letter in enumerate("ab")
    )
    made: list[str] = []
    try:
        for host in hosts:
            host.folder.mkdir()
            ip("netns", "add", host.namespace)
            made.append(host.namespace)
        first, second = hosts
        ip("link", "add", first.interface, "netns", first.namespace, "type", "veth", "peer", "name", second.interface,
           "netns", second.namespace)  # fmt: skip
        for host in hosts:
            ip("-n", host.namespace, "address", "add", f"10.77.0.{host.number + 1}/24", "dev", host.interface)
            for interface in ("lo", host.interface):
                ip("-n", host.namespace, "link", "set", interface, "up")
        yield first, second
    finally:
        for namespace in made:
            ip("netns", "delete", namespace)
