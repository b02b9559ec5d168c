"""The attacks, by what they are made of. Loading a module puts them into the catalogue."""

from __future__ import annotations

import importlib
import pkgutil

from tests.hostile.attack import Attack


def load() -> None:
    """Load all of them."""
    for module in pkgutil.iter_modules(__path__):
        of(module.name)


def of(*names: str) -> list[Attack]:
    """Those of some modules."""
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return [one for module in modules for one in vars(module).values() if isinstance(one, Attack)]
