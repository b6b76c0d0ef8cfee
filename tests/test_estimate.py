"""What a TPU's compiler estimates: how its schedules are read, and the table; with the compiler, five figures of it."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from jaxattn import cli
from jaxattn.bench import estimate
from jaxattn.bench.cases import AttentionCase, ConvCase, select
from jaxattn.bench.chip_ways import WAYS
from jaxattn.train import schedule
from jaxattn.window import Window

RECORDED = pathlib.Path(__file__).parent / "recorded_schedule.txt"
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None


@pytest.fixture
def recorded(tmp_path):
    """The folder and the program's text of a recorded compilation: the backward kernel of [2, 16, 16, 1, 128], float32,
    3×3. Of its schedule stand here the bundles without what is in them, and some lines of how they use the units."""
    *parts, text = RECORDED.read_text().split("#### ")[1:]
    for part in parts:
        name, _, lines = part.partition("\n")
        (tmp_path / name).write_text(lines)
    return tmp_path, text


def test_a_recorded_schedule(recorded):
    """The bundles, counted with grep: 31 outside the loop over the grid of two steps, 1140 in it, 34 and 37 in the
    loops that zero and write sixteen rows, eight at a time."""
    (kernel,) = schedule.read_kernels(*recorded)
    assert kernel.name == "windowed_attention_backward.1"
    assert (kernel.steps, kernel.loops, kernel.known) == (2, (2, 2), True)
    assert kernel.cycles == 31 + 2 * (1140 + 2 * 34 + 2 * 37)
    assert kernel.bundles == 31 + 1140 + 34 + 37
    assert kernel.vmem == 2277376
    # what 79 bundles ask of the units, 2, 18, 6 and 105, over 4, 3, 1 and 2 that these can do in one
    assert kernel.units == {"VALU": 1, "VLOAD": 6, "VSTORE": 6, "SALU": 53}


def test_a_loop_that_the_schedule_lacks_is_said():
    """The compiler may write one out, or its length may hang on data."""
    runs = [(0, -1, 1), (1, 0, 5), (2, 1, 7)]
    assert schedule.count(runs, 2, []) == (25, False)
    assert schedule.count(runs, 2, [None]) == (25, False)
    assert schedule.count([(0, -1, 1), (1, 0, 5)], 1, [3]) == (16, True)  # one step has no loop


def test_a_kernel_without_a_schedule_is_not_counted(recorded):
    folder, text = recorded
    for path in folder.glob("*packed*"):
        path.unlink()
    assert schedule.read_kernels(folder, text) == []


def test_several_that_are_the_same_are_compiled_once_and_all_count(recorded):
    """Whichever of them the compiler wrote of; another program of the same name does not count as it."""
    folder, text = recorded
    call = next(line for line in text.splitlines() if "tpu_custom_call" in line).replace("ROOT ", "")
    of = lambda number, body: call.replace("backward.1 ", f"backward.{number} ") + f'"body":"{body}"'
    found = schedule.read_kernels(folder, "\n".join([of(7, "same"), of(1, "same"), of(2, "other"), of(3, "same")]))
    assert [kernel.name.rpartition(".")[2] for kernel in found] == ["7", "1", "3"]
    assert [kernel.cycles for kernel in found] == 3 * [31 + 2 * (1140 + 2 * 34 + 2 * 37)]


OF = AttentionCase("made-up", (1, 4, 4, 2, 8), Window((3, 3)), "bfloat16")


def made_up():
    kernel = schedule.Kernel("k", 1000, 2, (5,), True, 100, 3 * 10**6, {"SPILL": 25})
    ours = dict(scheduled_seconds=3e-6, moved_seconds=2e-6, temporaries=10**6, compile_seconds=4.2, kernels=[kernel])
    return [
        estimate.Estimate("ours", "forward", True, **ours),
        estimate.Estimate("ours", "backward", True, **(ours | {"known": False})),
        estimate.Estimate("unable", "forward", status="cannot", note="it is too large"),
        estimate.Estimate("unable", "backward", status="cannot", note="it is too large"),
    ]


def test_the_table_says_what_there_is():
    said = estimate.table(OF, {"forward": 1e-6, "backward": 2e-6}, made_up()).splitlines()
    row = next(line for line in said if line.startswith("  ours"))
    assert row.split() == ["ours", "3", "3.00", "1.0", "3", "25%", "4", "3?", "1.50", "1.0", "3", "25%", "4"]
    assert said[-1] == "  unable: cannot: it is too large"
    assert "bound: forward 1 us, backward 2 us" in said[0]
    written = estimate.as_json({}, estimate.CHIPS["v5e"], [(OF, {"forward": 1e-6}, made_up())])
    first = json.loads(json.dumps(written))["cases"][0]["estimates"][0]
    assert (first["seconds"], first["kernels"][0]["cycles"]) == (3e-6, 1000)
    assert written["header"]["estimates"]


def test_a_table_for_a_page():
    said = estimate.markdown("v5e:1x1", [(OF, {"forward": 1e-6, "backward": 2e-6}, made_up())]).splitlines()
    assert "which no chip has measured: v5e:1x1" in said[0]
    assert said[2] == "| case | forward, bound | forward, ours | backward, bound | backward, ours |"
    assert said[4].endswith("| 1 | 3 (3.0) | 2 | 3 (1.5) |")


def test_the_bound_moves_everything_once():
    """Forward q, k, v and o; backward q, k, v and do, and dq, dk and dv."""
    token = 2 * 16 * 2 * 8
    assert (OF.bytes("forward"), OF.bytes("backward")) == (4 * token, 7 * token)
    conv = ConvCase("c", "n i+r c, r c o -> n i o", (1, 10, 3), (3, 3, 5), ((1, 1),))
    assert conv.bytes("backward") == 4 * (2 * (30 + 45) + 50)


def test_tokens_come_with_their_heads_side_by_side():
    nat = next(case for case in select("attention", False, ["nat-mask"], chip=True))
    assert estimate.flat(nat) == [(8, 56, 56, 512)] * 3 + [(16, 13, 13), (8, 56, 56, 512)]
    assert {case.dtype for case in select("all", False, [], chip=True)} == {"bfloat16"}
    assert [way.name for way in WAYS["attention"] if way.ours] == ["jaxattn, tpu", "jaxattn, splash", "jaxattn, xla"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["attention", "--topology", "v5e"], "topology (='v5e') must be KIND:SHAPE"),
        (["attention", "--topology", "cpu:2"], "topology (='cpu:2') must be a TPU's"),
        (["attention", "--topology", "v5e:1x1", "--cases", "none"], "cases (=none) must name some of"),
        (["attention", "--topology", "v5e:1x1", "--json", "no/x"], "json (=no/x) must be in a folder"),
        (["attention", "--topology", "v5e:1x1", "--markdown", "no/x"], "markdown (=no/x) must be in a folder"),
        (["attention", "--topology", "v5e:1x1", "--ways", "cudnn"], "ways (=cudnn) must name some of these"),
        (["attention", "--ways", "splash"], "ways (=('splash',)) must come with a topology"),
    ],
)
def test_mistakes_are_said_before_anything_is_compiled(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", *arguments])
    assert said in str(stopped.value.code)


def estimated(file, *arguments):
    """What `bench` prints and writes, in a process of its own: the compiler writes where its first use in one says."""
    environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    start = [sys.executable, "-c", "from jaxattn.cli import main; main()", "bench"]
    command = [*start, *arguments, "--topology", "v5e:1x1", "--json", str(file)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout, json.loads(file.read_text())["cases"]


@pytest.mark.full
@pytest.mark.skipif(not HAS_LIBTPU, reason="the TPU's compiler is not installed")
def test_the_command(tmp_path):
    printed, (attention, conv) = estimated(
        tmp_path / "estimates.json", "all", "--quick", "--cases", "2d-mask", "dense-1x1"
    )
    assert "ESTIMATES of the TPU's compiler" in printed
    assert (attention["name"], conv["name"]) == ("2d-mask", "dense-1x1")
    found = {(x["way"], x["mode"]): x for x in attention["estimates"]}
    for mode in ("forward", "backward"):
        ours = found["jaxattn, tpu", mode]
        assert ours["known"]
        assert attention["bound_seconds"][mode] < ours["seconds"] < found["splash", mode]["seconds"]
    assert len(found["splash", "backward"]["kernels"]) == 3  # its forward pass, dq, and dk with dv
    assert found["reshape + jax.nn", "forward"]["note"] == "the windows overlap"
    assert all(x["status"] == "ok" and x["seconds"] > 0 for x in conv["estimates"])


HELD = {  # microseconds with libtpu 0.0.52: another may schedule worse, and so may a change of ours
    "2d-mask": (186, 518),
    "nat-mask": (250, 658),
    "swin": (144, 450),
    "2d-head128-shift": (165, 436),
    "2d-wrap": (214, 629),
}


@pytest.mark.full
@pytest.mark.skipif(not HAS_LIBTPU, reason="the TPU's compiler is not installed")
def test_what_the_compiler_expects_of_five_cases(tmp_path):
    _, cases = estimated(tmp_path / "e.json", "attention", "--cases", *HELD, "--ways", "jaxattn, tpu")
    found = {case["name"]: [1e6 * each["seconds"] for each in case["estimates"]] for case in cases}
    assert found == {name: pytest.approx(held, rel=0.05) for name, held in HELD.items()}
