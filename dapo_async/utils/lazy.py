"""Names of a package whose modules are imported at the first use of the name.

Torch takes over a second to import. The driver needs only the light names of a package, so the
`__init__` of that package imports the modules with torch lazily:

    if TYPE_CHECKING:
        from dapo_async.model.decoder import Decoder
    else:
        __getattr__ = lazy_names(__name__, {"decoder": ("Decoder",)})

`from dapo_async.model import Decoder` then imports `dapo_async.model.decoder`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence


def lazy_names(package: str, modules: Mapping[str, Sequence[str]]) -> Callable[[str], object]:
    """The `__getattr__` of `package`. `modules`: module of the package -> its exported names."""
    module_of = {name: module for module, names in modules.items() for name in names}

    def find(name: str) -> object:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value: object = getattr(importlib.import_module(f"{package}.{module_of[name]}"), name)
        setattr(sys.modules[package], name, value)  # the next use does not come here
        return value

    return find
