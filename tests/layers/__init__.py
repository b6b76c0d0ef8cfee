"""The records of the layers, one file for a file of `jaxattn.zoo` and of `jaxattn.nn`; the tests' tables are made here.

A file has the loops of its layers, in NumPy's float64 and from their papers' formulas, and for each a `LayerCase`.
"""

import importlib
import pkgutil

from jaxattn import zoo

from .case import GRID, LayerCase, X


def found() -> dict[str, LayerCase]:
    """Every record in this folder by the function's name, in the registry's order."""
    modules = [importlib.import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__)]
    records = [value for module in modules for value in vars(module).values() if isinstance(value, LayerCase)]
    by_name = {record.function.__name__: record for record in records}
    order = list(zoo.ROWS)
    return {name: by_name[name] for name in sorted(by_name, key=order.index)}


LAYERS = found()


def of(family: str) -> dict[str, LayerCase]:
    return {name: layer for name, layer in LAYERS.items() if layer.family == family}


__all__ = ["GRID", "LAYERS", "LayerCase", "X", "of"]
