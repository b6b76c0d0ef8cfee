"""The checker of the built site (docs/check.py) finds each kind of fault, and nothing in a page that has none."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn import zoo

DOCS = pathlib.Path(__file__).parent.parent / "docs"


def module(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


check = module("check")


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "MUST_HOLD", {"index.html": 'x: Float[Array, "*batch"]'})
    (tmp_path / "api").mkdir()
    (tmp_path / "site.css").write_text("p { background: url(data:image/png;base64,) }")
    (tmp_path / "api" / "a.html").write_text('<h1 id="top">a</h1><a href="../index.html#é">up</a><em>emphasis</em>')
    (tmp_path / "index.html").write_text(
        '<h1 id="é">x: <a href="api/a.html">Float</a>[Array, <span class="s">&quot;*batch&quot;</span>]</h1>'
        '<link href="site.css"><a href="https://arxiv.org">out</a><a href="#%C3%A9">here</a>'
    )
    return tmp_path


def test_a_site_without_faults_has_none(site):
    assert list(check.faults(site)) == []


@pytest.mark.parametrize(
    ("name", "addition", "fault"),
    [
        ("index.html", '<a href="b.html">b</a>', "index.html: b.html leads nowhere"),
        ("api/a.html", '<a href="b.html">b</a>', "api/a.html: b.html leads nowhere"),
        ("index.html", '<img src="weights.png">', "index.html: weights.png leads nowhere"),
        ("index.html", '<a href="api/a.html#middle">b</a>', "index.html: api/a.html#middle has no such place"),
        ("index.html", '<a href="#middle">b</a>', "index.html: #middle has no such place"),
        ("index.html", '<script src="https://cdn.example/x.js"></script>', "fetches https://cdn.example/x.js"),
        ("index.html", '<link href="//fonts.example/x.css">', "fetches //fonts.example/x.css"),
        ("site.css", "@import 'https://fonts.example/x.css'", "site.css fetches https://fonts.example/x.css"),
        ("api/a.html", "[<em>batch, </em>grid] and <em>a·b</em>", "stars were taken for emphasis: a·b"),
        ("api/jaxattn.kernels.html", "", "api/jaxattn.kernels.html is private"),
    ],
)
def test_a_fault_is_named(site, name, addition, fault):
    path = site / name
    path.write_text((path.read_text() if path.exists() else "") + addition)
    assert any(fault in found for found in check.faults(site))


def test_what_must_be_there_is_missed(site):
    path = site / "index.html"
    path.write_text(path.read_text().replace("*batch", "batch"))
    assert list(check.faults(site)) == ["index.html lacks 'x: Float[Array, \"*batch\"]'"]


def test_docstrings_are_made_readable():
    pytest.importorskip("griffe", reason="the site needs `pip install 'jaxattn[docs]'`")
    readable = module("as_written").readable
    text = "Adds.\n\n>>> f(1)\n2\n\nArgs:\n  a, b,\n    c: numbers, and\n    more of them\n  d: one"
    made = "Adds.\n\n```pycon\n>>> f(1)\n2\n```\n\nArgs:\n  a, b, c: numbers, and\n    more of them\n  d: one"
    assert readable(text) == made


@pytest.mark.full
def test_where_a_layer_looks_is_its_weights(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    looks = module("looks")
    with jax.enable_x64(False):
        found = looks.weights("global_attention")
    assert set(looks.DRAWN) | {"parameter_key_attention"} == set(zoo.ROWS)  # which looks at no pixel
    for name in looks.DRAWN:
        shape = (1, looks.SIDE, looks.SIDE, looks.FEATURES)
        nnx.eval_shape(lambda name=name, shape=shape: looks.made(name)(jnp.zeros(shape)))
    x = np.asarray(looks.scene()[1], np.float64).reshape(-1, looks.FEATURES)
    at = [i * looks.SIDE + j for i, j in looks.PIXELS]
    scores = looks.SHARP**2 * x[at] @ x.T / np.sqrt(looks.FEATURES)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    values = looks.SHARP**2  # of the linear maps of the values and of the output
    np.testing.assert_allclose(found.reshape(2, -1), values * weights, rtol=1e-3, atol=1e-4)
