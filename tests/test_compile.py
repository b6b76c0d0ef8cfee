"""`jaxattn compile`: the collectives of real compiled programs, and the command for eight virtual devices."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxattn import cli, machine
from jaxattn.kernels.tpu import plan
from jaxattn.train import hlo
from jaxattn.train.compile import compile_report, describe, find_devices

MESH = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))


def compiled(function):
    """The text of a program on eight devices, each of which holds 16 numbers of float32."""
    mapped = partial(jax.shard_map, mesh=MESH, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))
    x = jax.ShapeDtypeStruct((128,), jnp.float32, sharding=NamedSharding(MESH, PartitionSpec("x")))
    return jax.jit(mapped(function)).lower(x).compile().as_text()


ROUND = [(n, (n + 1) % 8) for n in range(8)]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (jnp.sin, ()),
        (lambda x: x * lax.psum(jnp.sin(x), "x"), [("all-reduce", 1, 64)]),
        (lambda x: x * lax.all_gather(x, "x", tiled=True).max(), [("all-gather", 1, 512)]),
        (lambda x: lax.ppermute(x, "x", ROUND), [("collective-permute", 1, 64)]),
        (lambda x: lax.psum_scatter(x, "x", tiled=True), [("reduce-scatter", 1, 64)]),
        (lambda x: lax.all_to_all(x.reshape(8, 2), "x", 0, 0).reshape(16), [("all-to-all", 1, 64)]),
        (
            lambda x: lax.scan(lambda c, _: (jnp.sin(lax.ppermute(c, "x", ROUND)), None), x, length=5)[0],
            [("collective-permute", 5, 320)],
        ),
    ],
)
def test_collectives(function, expected):
    assert hlo.read(compiled(function)).collectives == tuple(expected)


def test_loops_within_loops_multiply():
    inner = lambda x: lax.scan(lambda c, _: (jnp.sin(lax.ppermute(c, "x", ROUND)), None), x, length=5)[0]
    read = hlo.read(compiled(lambda x: lax.scan(lambda c, _: (jnp.cos(inner(c)), None), x, length=3)[0]))
    assert read.collectives == (("collective-permute", 15, 960),)
    assert read.unknown == 0


def test_a_loop_of_unknown_length_counts_once():
    far = lambda x: lax.psum(x.max(), "x") < 7.0
    step = lambda x: 2 * lax.ppermute(x, "x", ROUND)
    read = hlo.read(compiled(lambda x: lax.while_loop(far, step, x)))
    assert read.unknown == 1
    assert ("collective-permute", 1, 64) in read.collectives


def test_a_kernel_in_a_loop_runs_as_often():
    text = """HloModule m
%body (p: f32[2]) -> f32[2] {
  ROOT %kernel.1 = f32[2]{0} custom-call(%p), custom_call_target="tpu_custom_call"
}
ENTRY %main (x: f32[2]) -> f32[2] {
  %kernel.2 = f32[2]{0} custom-call(%x), custom_call_target="tpu_custom_call"
  ROOT %loop = f32[2]{0} while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""
    read = hlo.read(text)
    assert dict(read.kernels) == {"kernel.2": 1, "kernel.1": 5}
    assert (read.runs("kernel.1"), read.runs("another")) == (5, 1)


def test_a_report_counts_memory():
    """Weights given back in their own place, beside a batch: float32, eight devices."""
    devices = find_devices("cpu:8")
    step = jax.jit(lambda w, x: (w - x.sum(), x.max()), donate_argnums=0)
    w = jax.ShapeDtypeStruct((1024,), jnp.float32, sharding=NamedSharding(MESH, PartitionSpec()))
    x = jax.ShapeDtypeStruct((8 * 256,), jnp.float32, sharding=NamedSharding(MESH, PartitionSpec("x")))
    report = compile_report(step, w, x, topology="cpu:8", devices=len(devices))
    assert report.arguments == 4096 + 1024
    assert report.aliased == 4096
    assert report.peak == 4096 + 1024 + report.outputs - 4096 + report.temporaries + report.code
    assert report.limit is None
    assert report.fits
    fitting = report._replace(topology="v5e:2x4", limit=16 * 2**30)
    assert "fits 16.00 GiB" in describe(fitting)
    assert "DOES NOT FIT 16.00 GiB" in describe(fitting._replace(peak=17 * 2**30))


def test_what_is_traced_for_another_machine():
    here = machine.backend(), machine.device_count()
    with machine.traced_for("tpu", 256):
        assert (machine.backend(), machine.device_count()) == ("tpu", 256)
    assert (machine.backend(), machine.device_count()) == here


def test_which_chip_is_traced_for():
    assert (machine.chip(), plan.chip()) == (None, "v5e")
    with machine.traced_for("tpu", 1, "v6e"):
        assert machine.chip() == plan.chip() == "v6e"
    for backend, chip in (("cpu", "v5e"), ("tpu", "v3")):
        with pytest.raises(
            ValueError, match=rf"traced_for: chip \(={chip!r}\) must be None, or with 'tpu' one of 'v4'"
        ):
            machine.traced_for(backend, chip=chip)


def run(*arguments):
    shape = ["--image-shape", "8", "8", "1", "--classes", "10", "--batch-size", "16"]
    cli.main(["compile", "--recipe", "digits", *shape, *arguments])


def test_the_command(tmp_path, capsys):
    """Attention in windows over a grid that is split: halos go round, and gradients are summed."""
    out = tmp_path / "report.json"
    run("--mix", "attention", "--topology", "cpu:8", "--mesh", "data=4,space=2", "--json", str(out))
    said, report = capsys.readouterr().out, json.loads(out.read_text())
    assert said.startswith("cpu:8: 8 devices, compiled in")
    assert "memory per device" in said
    found = {each["kind"]: each for each in report["text"]["collectives"]}
    assert {"all-reduce", "collective-permute"} <= set(found)
    for each in found.values():
        assert re.search(rf"{each['kind']} +{each['number']}  ", said)
    assert report["peak"] > report["arguments"] > 0


@pytest.mark.full
def test_a_volume_is_split(capsys):
    """Windows in three dimensions: the halo goes round, and a split grid takes less memory."""
    network = ["compile", "--model", "volume_small", "--mix", "attention", "--batch-size", "1"]
    volume = ["--shift", "0", "--no-flip", "--image-shape", "64", "16", "16", "1", "--classes", "3"]
    temporaries = {}
    for count in (1, 4):
        cli.main([*network, *volume, "--topology", f"cpu:{count}", "--mesh", f"space={count}"])
        said = capsys.readouterr().out
        assert ("collective-permute" in said) == (count > 1)
        value, unit = re.search(r"temporaries +([\d.]+) (\w+)", said).groups()
        temporaries[count] = float(value) * {"KiB": 2**10, "MiB": 2**20}[unit]
    assert temporaries[4] < temporaries[1] / 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9:2x2"], "topology (='v9:2x2') must be KIND:SHAPE, such as v5e:4x4"),
        (["--topology", "v5e:2"], "topology (='v5e:2') must be KIND:SHAPE"),
        (["--topology", "cpu:64"], "topology (='cpu:64') must be cpu:1 to cpu:8"),
        (["--topology", "cpu:8", "--mesh", "data=3"], "takes 3 devices and there are 8"),
        (["--topology", "cpu:8", "--batch-size", "9"], "batch_size (=9) must be a multiple of data·fsdp (=8)"),
        (["--topology", "cpu:8", "--mix", "both"], "mix (='both') must be one network"),
        (
            ["--topology", "cpu:8", "--model", "volume_small", "--mix", "attention"],
            "images (=(8, 8, 1)) must have 3 axes and channels",
        ),
        (
            ["--topology", "cpu:8", "--image-shape", "8", "8", "8", "1"],
            "images (=(8, 8, 8, 1)) must have 2 axes and channels for model (='tiny')",
        ),
        (
            [
                "--topology",
                "cpu:8",
                "--model",
                "volume_small",
                "--mix",
                "attention",
                "--image-shape",
                "8",
                "8",
                "8",
                "1",
            ],
            "shift (=1) must be off for volumes",
        ),
    ],
)
def test_a_mistake_is_explained(arguments, message):
    with pytest.raises(SystemExit) as stopped:
        run("--mix", "conv", *arguments)
    assert message in str(stopped.value.code)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'jaxattn[tpu]'")):
        find_devices("v5e:2x2")


PALLAS = """
import jax, jax.numpy as jnp, json
from jax.sharding import SingleDeviceSharding
import jaxattn
from jaxattn.train import schedule
from jaxattn.train.compile import compile_report, describe, find_devices

folder = schedule.ask()
x = jax.ShapeDtypeStruct((2, 16, 16, 128), jnp.bfloat16, sharding=SingleDeviceSharding(find_devices("v5e:1x1")[0]))

def layer(x, _):
    y = x.reshape(2, 16, 16, 2, 64)
    return jaxattn.attention(y, y, y, window=jaxattn.Window((3, 3)), implementation="tpu").reshape(x.shape), None

reports = {}
for depth in (1, 3):
    step = jax.jit(lambda x: jax.lax.scan(layer, x, length=depth)[0])
    reports[depth] = compile_report(step, x, topology="v5e:1x1", devices=1, folder=folder)
print(describe(reports[3]))
step = jax.jit(lambda x: layer(layer(x, None)[0], None)[0])  # both written out
reports[2] = compile_report(step, x, topology="v5e:1x1", devices=1, folder=folder)
print(json.dumps([(r.of_kernels, r.text.cycles, r.unread, r.flops, r.bytes) for r in reports.values()]))
"""


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is not installed")
def test_pallas_kernels_count():
    """As often as they run, attention's and that of its score table. XLA's count of operations takes a loop's contents
    once, and has what a kernel says of itself: at least what the windows ask for."""
    environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", PALLAS], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    *said, last = run.stdout.splitlines()
    once, thrice, twice = json.loads(last)
    assert once[0] > 500
    assert thrice[0] == pytest.approx(3 * once[0], rel=0.05)  # alone, a few bundles are scheduled otherwise
    assert twice[0] == pytest.approx(2 * once[0], rel=0.3)  # they share a score table
    assert once[2] == thrice[2] == twice[2] == 0
    assert once[3] > 2 * 2 * (2 * 16 * 16) * 9 * 128
    assert once[4] >= 4 * (2 * 16 * 16 * 128) * 2
    assert any(f"{thrice[0]:,}" in line and "6 runs of 2 kernels" in line for line in said)
