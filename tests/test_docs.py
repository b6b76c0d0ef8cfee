"""The examples of the docstrings, of the README and of the pages run, and say what they print."""

import doctest
import importlib
import json
import pathlib
import pkgutil
import re

import jax
import jax.numpy as jnp
import pytest

import jaxattn
from jaxattn.study.claims.curves import little_and_much

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
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
    blocks = BLOCK.findall(text)
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


PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "```python" in path.read_text())


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.full] * (path.stem != "recipes")) for path in PAGES],
)
def test_pages(path, capsys):
    """Every block of a page runs, after those before it; it asserts what it says, and the page shows what it prints."""
    text, scope = path.read_text(), {}
    shown = re.sub(r"^    ", "", text, flags=re.MULTILINE)
    with jax.enable_x64(False):  # as a reader has it
        for block in BLOCK.findall(text):
            exec(block, scope)
            assert capsys.readouterr().out.strip() in shown, f"{path.name} shows something else than is printed"


@pytest.mark.parametrize("name", ["AFTConv", "GPSA", "aft_conv"])
def test_the_lists_of_layers_are_written_by_a_command(name, monkeypatch):
    """A layer's line is added, and no other is changed."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    lists = importlib.import_module("lists")
    for folder in (lists.ZOO, lists.NN):
        text = (folder / "__init__.py").read_text(encoding="utf-8")
        without = re.sub(rf"^from \.\w+ import {name} as {name}\n", "", text, flags=re.MULTILINE)
        assert lists.imports(folder, without) == text, f"{folder.name} has an old list: python docs/lists.py"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert lists.table(readme) == readme, "the README's table of layers is an old one: python docs/lists.py"


def test_readme_shows_what_claim_10_gave(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    claim10 = importlib.import_module("claim10")
    readme = (ROOT / "README.md").read_text()
    assert claim10.table() in readme, "the README's table of claim 10 is an old one: python docs/claim10.py"
    made = little_and_much(claim10.numbers())
    assert f"| 10 | Little data favours the CNN, much data favours attention. | 吼吼 | {made.verdict} |" in readme
    said = re.search(r"^- Claim 10\. (.*?)\. \[", readme, re.MULTILINE)
    assert said is not None
    assert said[1].replace("55,000", "55000") in made.notes


def test_what_is_taken_of_a_report_names_no_place(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    claim10 = importlib.import_module("claim10")
    settings = {"profile": "full", "data": "fashion-mnist:/there"}
    claims = [{"number": 9, "numbers": {}}, {"number": 10, "numbers": claim10.numbers()}]
    taken = json.loads(claim10.taken({"environment": {"jax": "0"}, "settings": settings, "claims": claims}))
    assert taken["settings"] == {"profile": "full", "data": "fashion-mnist"}
    assert taken["made_with"] == {"jax": "0"}
    assert taken["numbers"] == claim10.numbers()


def test_every_file_that_contributors_are_sent_to_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = set(re.findall(r"`((?:[\w.-]+/)+[\w<>.-]*|[\w-]+\.(?:md|toml))`", text)) - {"verdicts.md"}
    assert len(files) >= 20
    for name in files:
        path = ROOT / name
        path = path.parent if "<" in path.name else path
        assert path.exists(), f"CONTRIBUTING.md names {name}, which is not there"
