"""What the library works on: a rank's own tensors. A DTensor says of itself that it is the whole."""

from torch import Tensor


def is_dtensor(x: object) -> bool:
    """Told by the name of its class: to import it takes half a second."""
    return type(x) is not Tensor and any(kind.__name__ == "DTensor" for kind in type(x).__mro__)


def refuse_dtensors(**tensors: object) -> None:
    """ValueError where one of them is a DTensor."""
    if problem := problem_of_dtensors(**tensors):
        raise ValueError(problem)


def problem_of_dtensors(**tensors: object) -> str:
    """What is wrong where one of them, by the name of its argument, is a DTensor; empty where none is."""
    for name, x in tensors.items():
        if is_dtensor(x):
            return f"{name} is a DTensor; pass this rank's ordinary tensor, {name}.to_local()"
    return ""
