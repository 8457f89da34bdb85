"""The names of a package that it imports at their first use."""

import sys
from pathlib import Path

import pytest

from dapo_async.utils.lazy import lazy_names


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of one heavy module, whose name `Decoder` is lazy."""
    folder = tmp_path / "lazy_package"
    folder.mkdir()
    (folder / "heavy.py").write_text("class Decoder: ...\n")
    (folder / "__init__.py").write_text(
        "from dapo_async.utils.lazy import lazy_names\n"
        "__getattr__ = lazy_names(__name__, {'heavy': ('Decoder',)})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("lazy_package", "lazy_package.heavy"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "lazy_package"


def test_a_lazy_module_is_imported_at_the_first_use_of_its_name(package: str) -> None:
    module = __import__(package)
    assert f"{package}.heavy" not in sys.modules
    first = module.Decoder
    assert first.__module__ == f"{package}.heavy"
    assert vars(module)["Decoder"] is first  # found without `__getattr__` from now on


def test_a_name_that_the_package_lacks_is_an_attribute_error() -> None:
    find = lazy_names("some.package", {"heavy": ("Decoder",)})
    with pytest.raises(AttributeError, match=r"module 'some.package' has no attribute 'Encoder'"):
        find("Encoder")
