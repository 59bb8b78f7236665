"""A Transformers without the interfaces that we use is refused by its version, with those that work."""

import importlib
import sys
from types import ModuleType

import pytest

INTERFACES = (
    "moe_dispatch.integrations.transformers.interface",
    "sp_attention.integrations.transformers.interface",
)


@pytest.mark.parametrize("name", INTERFACES)
def test_another_version_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interface = importlib.import_module(name)
    older = ModuleType("transformers")
    older.__dict__["__version__"] = "4.40.0"
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "transformers", older)
        for inside in ("transformers.integrations", "transformers.integrations.moe"):
            patched.setitem(sys.modules, inside, ModuleType(inside))
        with pytest.raises(ImportError) as error:
            importlib.reload(interface)
    importlib.reload(interface)
    assert str(error.value).startswith("transformers 4.40.0 has no interface for ")
    assert str(error.value).endswith('5.23 up to, but not including, 6, work: pip install "transformers>=5.23,<6"')
