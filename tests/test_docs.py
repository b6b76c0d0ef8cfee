"""The examples of the docstrings and of the README run, and say what they print."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import jax
import jax.numpy as jnp
import pytest

import jaxattn
from jaxattn import zoo

ROOT = pathlib.Path(__file__).parent.parent
MODULES = ["jaxattn", *sorted(module.name for module in pkgutil.walk_packages(jaxattn.__path__, "jaxattn."))]
# Of the modules that are built up alike, the core takes some.
CORE = [name for n, name in enumerate(MODULES) if n % 3 == 0 or name.count(".") < 2]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] * (n not in CORE)) for n in MODULES])
def test_docstrings(name):
    module = importlib.import_module(name)
    with jax.enable_x64(False):  # as a reader has it
        found = doctest.testmod(module, extraglobs={"jnp": jnp, "jaxattn": jaxattn}, optionflags=doctest.ELLIPSIS)
    assert found.failed == 0


def test_public_functions_have_examples():
    public = [getattr(jaxattn, name) for name in dir(jaxattn) if not name.startswith("_")]
    public = [thing for thing in public if callable(thing) and thing is not jaxattn.Plan]
    assert len(public) >= 5
    for thing in public:
        assert ">>> " in (thing.__doc__ or ""), f"{thing.__name__} has no example"


def test_readme(capsys):
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    scope, printed = {}, []
    with jax.enable_x64(False):  # as a reader has it
        for block in blocks:
            exec(block, scope)
            printed.append(capsys.readouterr().out.strip())
    assert len([text for text in printed if text]) == 2
    shown = re.sub(r"^    ", "", text, flags=re.MULTILINE)
    for output in printed:
        assert output in shown, "the README shows another plan than the one that is printed"


def test_recipes():
    """Each block asserts what it says."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 9
    scope = {}
    with jax.enable_x64(False):
        for block in blocks:
            exec(block, scope)


def test_readme_shows_the_table_of_layers(capsys):
    zoo.table()
    assert capsys.readouterr().out in (ROOT / "README.md").read_text()


def test_every_file_that_contributors_are_sent_to_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = set(re.findall(r"`((?:[\w.-]+/)+[\w<>.-]*|[\w-]+\.(?:md|toml))`", text)) - {"verdicts.md"}
    assert len(files) >= 20
    for name in files:
        path = ROOT / name
        path = path.parent if "<" in path.name else path
        assert path.exists(), f"CONTRIBUTING.md names {name}, which is not there"
