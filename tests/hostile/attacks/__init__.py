"""The attacks, in one module for each subject. Importing a module registers its attacks."""

from __future__ import annotations

import importlib
import pkgutil

from tests.hostile.attack import Attack


def load() -> None:
    """Register all attacks."""
    for module in pkgutil.iter_modules(__path__):
        of(module.name)


def of(*names: str) -> list[Attack]:
    """Return the attacks of some modules."""
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return [one for module in modules for one in vars(module).values() if isinstance(one, Attack)]
