import torch

pytest_plugins = ["moe_dispatch.pytest_plugin"]


def pytest_configure() -> None:
    """One thread per process, as on a rank: tensors are tiny here, and threads of OpenMP that wait for each other
    took up to ten times as long."""
    torch.set_num_threads(1)
