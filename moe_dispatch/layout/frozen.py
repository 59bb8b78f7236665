"""Values that do not change, and that frameworks leave whole."""

from dataclasses import FrozenInstanceError
from typing import Any, ClassVar, NoReturn, Self


class Frozen:
    """A class whose ``__init__`` stores with ``object.__setattr__``, once.

    It is no dataclass on purpose. FSDP rebuilds each dataclass among the arguments of ``forward`` from its fields,
    where a field that follows from the others cannot be passed. What is no dataclass goes through as it is.
    """

    _defining: ClassVar[tuple[str, ...]]  # the attributes that all others follow from

    __slots__ = ()

    @property
    def _value(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self._defining)

    @classmethod
    def _of(cls, *value: Any) -> Self:
        return cls(*value)

    def __eq__(self, other: object) -> bool:
        return self._value == other._value if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        pairs = zip(self._defining, self._value, strict=True)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in pairs)})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made anew from the value."""
        return type(self)._of, self._value

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise FrozenInstanceError(f"cannot assign to {name!r} of a {type(self).__name__}; make another one")

    def __delattr__(self, name: str) -> NoReturn:
        raise FrozenInstanceError(f"cannot delete {name!r} of a {type(self).__name__}")
