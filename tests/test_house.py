"""The house rules that a machine can check: a file imports only from floors below."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "jaxattn"
FLOOR = {
    "boundary": 0,
    "machine": 0,
    "units": 0,
    "promotion": 0,
    "platforms": 1,
    "functions": 0,
    "errors": 0,
    "files": 1,
    "pickles": 2,
    "notation": 0,
    "sizes": 0,
    "torch_file": 3,
    "checked": 1,
    "extents": 1,
    "window": 1,
    "normalize": 1,
    "position": 2,
    "explicit": 2,
    "kernels": 2,
    "plots": 2,
    "lowerings": 2,
    "arguments": 3,
    "head_groups": 3,
    "einsum": 3,
    "attention": 4,
    "attention_plan": 5,
    "halo": 5,
    "parts": 5,
    "at": 5,
    "measure": 5,
    "zoo": 6,
    "nn": 7,
    "equivalence": 8,
    "models": 9,
    "pretrained": 10,
    "train": 11,
    "bench": 12,
    "study": 12,
    "cli": 13,
    "__main__": 14,
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(path: pathlib.Path) -> list[str]:
    """The `jaxattn` modules that a file imports anywhere in it, by full name."""
    here = ("jaxattn", *path.relative_to(PACKAGE).with_suffix("").parts)
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names += [module] if node.module and module != "jaxattn" else []
            names += [f"{module}.{alias.name}" for alias in node.names if not node.module or module == "jaxattn"]
    return [name for name in names if name.split(".")[0] == "jaxattn"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_floors_below(path):
    unit = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert unit in FLOOR, f"{unit} has no floor: give it one in {__file__}"
    for name in imported(path):
        parts = name.split(".")
        assert len(parts) > 1, f"{path} imports the package itself; import the module that holds the name"
        other = parts[1]
        assert other in FLOOR, f"{path} imports {name}, which has no floor: import the module that holds the name"
        assert other == unit or FLOOR[other] < FLOOR[unit], (
            f"{path} (floor {FLOOR[unit]}) imports {name} (floor {FLOOR[other]}): imports run down only"
        )


def test_every_file_is_seen():
    assert len(FILES) >= 5


def test_an_assert_says_what_is_wrong():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            said = not isinstance(node, ast.Assert) or node.msg is not None
            assert said, f"{path}: an assert without a message; better none, where the types can tell"


def test_the_types_are_rarely_silenced():
    silenced = [path.name for path in FILES for line in path.read_text().splitlines() if "pyright: ignore" in line]
    assert len(silenced) <= 9, f"{len(silenced)} times 'pyright: ignore': {', '.join(silenced)}; give better types"


def test_a_network_is_read_at_a_sitting():
    """A family's file has at most 250 lines, docstrings and tables of names included."""
    lines = {path.name: len(path.read_text().splitlines()) for path in FILES if path.parent.name == "models"}
    assert len(lines) > 20
    long = {name: count for name, count in lines.items() if count > 250}
    assert not long, f"divide by idea, as vit_tokens.py is out of vit.py: {long}"
