"""Environment variables of ranks that a launcher started."""

import random
import socket
from contextlib import ExitStack, suppress

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1"} | {
    name: TORCHRUN[name] for name in ("MASTER_ADDR", "MASTER_PORT")
}


BELOW_EPHEMERAL = range(20000, 32768)  # where Linux gives no port to whoever asks for any, as gloo does


def free_ports(number: int) -> list[str]:
    """Ports that nobody listens on, nor will by chance before the test does."""
    draw, ports = random.SystemRandom(), list[str]()
    with ExitStack() as sockets:
        while len(ports) < number:
            one = sockets.enter_context(socket.socket())
            with suppress(OSError):  # in use
                one.bind(("127.0.0.1", draw.choice(BELOW_EPHEMERAL)))
                ports.append(str(one.getsockname()[1]))
    return ports
