"""Writes the three lists of layers, by `python docs/lists.py`: the names that `jaxattn/zoo/__init__.py` and
`jaxattn/nn/__init__.py` have from their files, and the README's table.

A function is a layer if it has a row, and a class if it is called as one, without the underscores.
"""

import ast
import contextlib
import io
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
README, NN, ZOO = ROOT / "README.md", ROOT / "jaxattn" / "nn", ROOT / "jaxattn" / "zoo"
NAME = re.compile(r"^from \.(\w+) import (\w+) as \2\n", re.MULTILINE)
TABLE = re.compile(r"^\| layer .*?\n(?!\|)", re.MULTILINE | re.DOTALL)


def layers(folder: pathlib.Path) -> set[tuple[str, str]]:
    """The file and the name of each layer of zoo/ or nn/."""
    # the files are read, not imported: a module of nn/ needs its function in zoo's list
    written = [(path.stem, node) for path in folder.glob("*.py") for node in ast.parse(path.read_text("utf-8")).body]
    if folder == ZOO:
        functions = [(file, node) for file, node in written if isinstance(node, ast.FunctionDef)]
        return {(file, node.name) for file, node in functions if any(map(_is_row, node.decorator_list))}
    known = {name.replace("_", "") for _, name in layers(ZOO)}
    classes = [(file, node.name) for file, node in written if isinstance(node, ast.ClassDef)]
    return {(file, name) for file, name in classes if name.lower() in known}


def _is_row(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == "row"


def imports(folder: pathlib.Path, text: str) -> str:
    """The text of a folder's `__init__` with a line for each layer, and what else it names."""
    names = sorted({*layers(folder), *NAME.findall(text)}, key=lambda at: (at[0], not at[1].isupper(), at[1]))
    return NAME.sub("", text) + "".join(f"from .{file} import {name} as {name}\n" for file, name in names)


def table(text: str) -> str:
    """The README's text with the table that `zoo.table()` prints now."""
    from jaxattn import zoo  # when its list is written

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        zoo.table()
    return TABLE.sub(lambda _: printed.getvalue(), text, count=1)


if __name__ == "__main__":
    for folder in (ZOO, NN):
        path = folder / "__init__.py"
        path.write_text(imports(folder, path.read_text("utf-8")), "utf-8")
    README.write_text(table(README.read_text("utf-8")), "utf-8")
