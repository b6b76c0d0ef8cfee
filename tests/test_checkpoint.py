"""Checkpoints on disk: every bit comes back; what was killed, damaged or cut short is noticed, and costs no other."""

import contextlib
import functools
import gc
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxattn import nn
from jaxattn.errors import InputError
from jaxattn.train import checkpoint
from jaxattn.train.checkpoint import Checkpoints, Restored, load_weights


class State(NamedTuple):
    """What the training loop keeps."""

    step: jax.Array
    weights: nnx.State
    rest: nnx.State
    moments: Any
    average: nnx.State | None


class Network(nnx.Module):
    """A list, statistics, two dtypes and a random state."""

    def __init__(self, features: int = 4, *, rngs: nnx.Rngs):
        half = nnx.Linear(features, 2, param_dtype=jnp.bfloat16, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(3, features, rngs=rngs), half])
        self.norm = nnx.BatchNorm(features, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def make_state(network: nnx.Module, average: bool = False) -> State:
    weights = nnx.state(network, nnx.Param)
    rest = nnx.state(network, nnx.BatchStat)
    decaying = lambda weights: jax.tree.map(lambda weight: weight.ndim > 1, weights)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1.0, 9), mask=decaying)
    )
    mean = jax.tree.map(lambda weight: weight / 2, weights) if average else None
    return State(jnp.int32(7), weights, rest, optimizer.init(weights), mean)


def abstract(tree: Any) -> Any:
    return jax.eval_shape(lambda: tree)


def assert_same(one: Any, two: Any):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def tree_of(step: int) -> dict[str, jax.Array]:
    """A tree that says which step it is of."""
    return {"weights": jax.random.normal(jax.random.key(step), (40, 5), jnp.float32), "step": jnp.int32(step)}


LIKE = abstract(tree_of(0))


def restore(checkpoints: Checkpoints, like: Any = LIKE) -> Restored:
    restored = checkpoints.restore(like)
    assert restored is not None
    return restored


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with the checkpoints of steps 1 and 2."""
    with Checkpoints(tmp_path / "run") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, tree_of(step), {"next": step})
    return tmp_path / "run"


# What comes back


@pytest.mark.parametrize("average", [False, True])
def test_every_bit_comes_back(tmp_path, average):
    state = make_state(Network(rngs=nnx.Rngs(0)), average)
    position = {"epoch": 3, "next": [4, 5], "rng": {"seed": 2**40, "share": 0.1}}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(state)) is None
        checkpoints.save(7, state, position, 0.25)
        restored = restore(checkpoints, abstract(state))
    assert (restored.step, restored.position) == (7, position)
    assert_same(restored.tree, state)


def test_keys_and_every_dtype_come_back(tmp_path):
    tree = {"key": jax.random.key(3), "keys": jax.random.split(jax.random.key(4), 3)}
    tree |= {
        dtype: jnp.arange(5).astype(dtype) for dtype in ("float64", "float32", "float16", "bool", "uint8", "int64")
    }
    tree |= {"special": jnp.array([jnp.nan, jnp.inf, -0.0], "float32"), "bfloat16": jnp.arange(5, dtype="bfloat16")}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, tree, {})
        loaded = restore(checkpoints, abstract(tree)).tree
    data = lambda tree: tree | {name: jax.random.key_data(tree[name]) for name in ("key", "keys")}
    assert loaded["keys"].dtype == tree["keys"].dtype
    assert_same(data(loaded), data(tree))
    assert np.signbit(loaded["special"][2].astype(np.float32))


def test_meshes_may_change(tmp_path):
    """Saved on eight devices, restored on one, on another mesh of eight, and the other way round."""
    weights = jnp.arange(64.0).reshape(8, 8)
    eight = NamedSharding(jax.make_mesh((8,), ("fsdp",)), P("fsdp"))
    square = NamedSharding(jax.make_mesh((2, 4), ("data", "fsdp")), P("fsdp", "data"))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for n, (before, after) in enumerate(itertools.permutations([eight, square, one], 2)):
        with Checkpoints(tmp_path / str(n)) as checkpoints:
            checkpoints.save(1, {"weights": jax.device_put(weights, before)}, {})
            like = {"weights": jax.ShapeDtypeStruct((8, 8), weights.dtype, sharding=after)}
            loaded = restore(checkpoints, like).tree["weights"]
        assert loaded.sharding == after
        np.testing.assert_array_equal(loaded, weights)


def test_another_structure_is_refused_by_name(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.zeros(3, "float32"), "b": jnp.zeros(2, "float32"), "c": jnp.zeros(1)}, {})
        like = {"a": (3,), "b": (4,), "d": (1,)}
        with pytest.raises(InputError) as caught:
            restore(checkpoints, {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in like.items()})
        assert checkpoints.steps() == [1]
    assert (
        "checkpoints/1: does not fit the network: only in the checkpoint: c float64[1]; only in the network: "
        "d float32[1]; different: b is float32[2] in the checkpoint, float32[4] in the network; if both are the same"
    ) in str(caught.value)


def test_layers_that_named_their_arrays_otherwise(tmp_path):
    """`SASA` had "query" where it has "query.kernel" now: the error names both, and says where they come from."""
    layer = nn.SASA(1, 2, window=3, rngs=nnx.Rngs(0))
    like = nnx.state(layer, nnx.Param)
    old = {name: jnp.zeros((2, 1, 2), "float32") for name in ("query", "key", "value")}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"weights": old | {"embedding_0": jnp.zeros((1, 5, 2), "float32")}}, {})
        with pytest.raises(
            InputError, match=r"weights/query float32.*weights/query/kernel.*saved by a version of jaxattn"
        ):
            restore(checkpoints, {"weights": like})


# In the background


def test_save_returns_before_the_checkpoint_is_there(tmp_path, monkeypatch):
    go, write = threading.Event(), checkpoint._write_manifest

    def held(*arguments):
        assert go.wait(60)
        write(*arguments)

    monkeypatch.setattr(checkpoint, "_write_manifest", held)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree_of(1), {})
        assert checkpoints.steps() == []
        go.set()
        checkpoints.wait()
        assert checkpoints.steps() == [1]


def test_buffers_may_be_donated_while_they_are_written(tmp_path):
    """The steps after a save overwrite 8 MB of weights, which are on disk as they were."""
    step = jax.jit(lambda weights: weights * 0.5 + 1, donate_argnums=0)
    with Checkpoints(tmp_path, keep_last=4) as checkpoints:
        weights, expected = step(jax.random.normal(jax.random.key(0), (1000, 1000))), []
        for n in range(4):
            expected.append(np.array(weights, copy=True))
            checkpoints.save(n, {"weights": weights}, {})
            for _ in range(5):
                weights = step(weights)
    like = {"weights": jax.ShapeDtypeStruct(weights.shape, weights.dtype)}
    for n in (3, 2, 1, 0):
        np.testing.assert_array_equal(restore(Checkpoints(tmp_path), like).tree["weights"], expected[n])
        shutil.rmtree(tmp_path / "checkpoints" / str(n))


# Which are kept


@pytest.mark.parametrize(
    ("metrics", "keep_last", "keep_best", "kept"),
    [
        ([None] * 5, 2, 1, [3, 4]),
        ([0.1, 0.9, 0.2, 0.3, 0.4], 2, 1, [1, 3, 4]),
        ([0.1, 0.9, 0.9, 0.3, 0.4], 2, 1, [2, 3, 4]),  # the newest among equals
        ([0.1, 0.9, 0.8, 0.3, 0.4], 1, 2, [1, 2, 4]),
        ([-3.0, -1.0, float("nan"), None, -2.0], 1, 1, [1, 4]),
        ([0.9, 0.8, 0.7, 0.6, 0.5], 3, 0, [2, 3, 4]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, metrics, keep_last, keep_best, kept):
    with Checkpoints(tmp_path, keep_last=keep_last, keep_best=keep_best) as checkpoints:
        for step, metric in enumerate(metrics):
            checkpoints.save(step, tree_of(step), {}, metric)
    assert Checkpoints(tmp_path).steps() == kept
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [str(step) for step in kept]


def test_steps_are_numbers_and_not_words(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (9, 10, 100):
            checkpoints.save(step, tree_of(step), {})
        checkpoints.wait()
        assert checkpoints.steps() == [10, 100]
        assert restore(checkpoints).step == 100


def test_a_step_that_is_there_is_left_as_it_is(run):
    with Checkpoints(run) as checkpoints:
        checkpoints.save(2, tree_of(5), {"next": 5})
        restored = restore(checkpoints)
    assert restored.position == {"next": 2}
    assert_same(restored.tree, tree_of(2))


# Damage


def flip(path: Path):
    content = bytearray(path.read_bytes() or b"\0")
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def into_a_folder(path: Path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "removed": Path.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"}"),
    "flipped": flip,
    "overwritten": lambda path: path.write_bytes(bytes(len(path.read_bytes()) or 1)),
    "a folder": into_a_folder,
}


@pytest.mark.core(1)
@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_is_damaged_the_one_before_is_used(run, tmp_path, damage):
    files = [path.relative_to(run) for path in run.rglob("checkpoints/2/**/*") if path.is_file()]
    assert len(files) >= 5
    for file in files:
        damaged = tmp_path / "damaged"
        shutil.copytree(run, damaged)
        if damage in ("emptied", "truncated") and not (damaged / file).stat().st_size:
            shutil.rmtree(damaged)  # empty by nature
            continue
        DAMAGES[damage](damaged / file)
        with Checkpoints(damaged) as checkpoints:
            with pytest.warns(UserWarning, match=r"checkpoints/2 is damaged: .*; using the checkpoint of step 1"):
                restored = restore(checkpoints)
            assert restored.step == 1
            assert restored.position == {"next": 1}
            assert_same(restored.tree, tree_of(1))
            checkpoints.save(2, tree_of(2), {"next": 2})  # the damaged one is not in the way
            assert restore(checkpoints).step == 2
        assert sorted(path.name for path in (damaged / "checkpoints").iterdir()) == ["1", "2", "2.damaged"]
        shutil.rmtree(damaged)


def test_orbax_alone_would_load_a_flipped_bit(tmp_path):
    """Why there is a manifest: without it, this damage is read as weights."""
    from orbax.checkpoint import v1 as ocp

    weights = jax.random.normal(jax.random.key(0), (64, 64))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"weights": weights}, {})
    path = tmp_path / "checkpoints" / "1"
    largest = max(filter(Path.is_file, path.rglob("*")), key=lambda file: file.stat().st_size)
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"weights": jax.ShapeDtypeStruct(weights.shape, weights.dtype, sharding=first)}
    flip(largest)
    assert (ocp.load(path / "arrays", like)["weights"] != weights).any()
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(InputError, match="is not what was written"):
        restore(checkpoints, like)


def test_when_all_are_damaged_all_are_named_and_stay(run):
    for step in (1, 2):
        (run / "checkpoints" / str(step) / "manifest.json").write_text(json.dumps([{"step": step}, 0]))
    for _ in range(2):  # the second attempt does not begin anew in silence
        with Checkpoints(run) as checkpoints, pytest.raises(InputError) as caught:
            restore(checkpoints)
        assert "checkpoints: no checkpoint is whole: " in str(caught.value)
        for step in (1, 2):
            assert f"checkpoints/{step} is damaged: manifest.json is not what was written" in str(caught.value)
    with pytest.raises(InputError, match=r"must be a whole run: no checkpoint is whole: .*/1 is damaged"):
        load_weights(run, Network(rngs=nnx.Rngs(0)))


def test_half_written_checkpoints_are_ignored_and_removed(run):
    shutil.copytree(run / "checkpoints" / "2", run / "checkpoints" / "3.partial")
    (run / "checkpoints" / "4.partial" / "arrays.orbax-checkpoint-tmp").mkdir(parents=True)
    with Checkpoints(run) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert restore(checkpoints).step == 2
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["1", "2"]


SAVER = """
import sys
from pathlib import Path
import jax
from jaxattn.train.checkpoint import Checkpoints
with Checkpoints(Path(sys.argv[1])) as checkpoints:
    steps = checkpoints.steps()
    for step in range(steps[-1] + 1 if steps else 1, 10**6):
        tree = {"weights": jax.random.normal(jax.random.key(step), (40, 5), "float32"), "step": jax.numpy.int32(step)}
        checkpoints.save(step, tree, {"next": step})  # which waits for the one before it
        print(step - 1, flush=True)
"""


@pytest.mark.core(1)
@pytest.mark.parametrize("moment", [1, 4, 9])
def test_a_kill_leaves_what_was_saved(tmp_path, moment):
    """A process that does nothing but save is killed at no particular moment: all that it said was saved is there."""
    child = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    said = [child.stdout.readline() for _ in range(moment)]
    threading.Event().wait(0.003 * moment)
    child.send_signal(signal.SIGKILL)
    said += child.communicate()[0].splitlines()
    saved = max(int(line) for line in said if line.strip())
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(LIKE)
    assert (restored.step if restored else 0) >= saved
    if restored is not None:
        assert restored.position == {"next": restored.step}
        assert_same(restored.tree, tree_of(restored.step))


# A disk that does not take it

# A save that fails may leave work on orbax's event loop, which complains when collected after the loop was closed.
failing = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond 100 kB: writing fails as on a full disk, with another number."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def read_only(folder: Path):
    """Root may write everywhere, so root is somebody else for as long."""
    mode, user = folder.stat().st_mode, os.geteuid()
    folder.chmod(0o555)
    os.seteuid(65534 if user == 0 else user)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(mode)


def test_a_full_disk_is_an_error_before_training(tmp_path):
    with full_disk(), pytest.raises(InputError, match=r"checkpoints: checkpoints cannot be written there: .*too large"):
        Checkpoints(tmp_path)


def test_a_read_only_folder_is_an_error_before_training(tmp_path):
    with read_only(tmp_path), pytest.raises(InputError, match=r"checkpoints cannot be written there: .*denied"):
        Checkpoints(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="checkpoints cannot be written there"):
        Checkpoints(tmp_path / "file")


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # orbax's loop, collected after the error
@pytest.mark.parametrize("where", ["arrays", "manifest"])
def test_a_disk_that_fills_costs_only_the_checkpoint_being_written(run, where, monkeypatch):
    large = tree_of(3) | {"more": jax.random.normal(jax.random.key(0), (400, 400))}
    with Checkpoints(run) as checkpoints:
        if where == "manifest":
            no_space = OSError(28, "No space left on device")
            monkeypatch.setattr(checkpoint, "_write_manifest", functools.partial(_raise, no_space))
            checkpoints.save(3, large, {})
            with pytest.raises(InputError, match=r"/3: the checkpoint cannot be written: .*No space left"):
                checkpoints.wait()
            monkeypatch.undo()
        else:
            with full_disk():
                checkpoints.save(3, large, {})
                with pytest.raises(InputError, match=r"cannot be written: .*too large.*; whole are .* \[1, 2\]"):
                    checkpoints.save(4, large, {})
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["1", "2"]
        assert_same(restore(checkpoints).tree, tree_of(2))
        checkpoints.save(3, large, {})  # there is space again
        assert restore(checkpoints, abstract(large)).step == 3
    gc.collect()


def _raise(error: Exception, *_):
    raise error


@failing
def test_a_folder_that_becomes_read_only_is_an_error_at_the_save(run):
    for folder in (run, *run.parents):  # pytest lets nobody else in
        if "pytest-" in str(folder):
            folder.chmod(0o755)
    with Checkpoints(run) as checkpoints:
        with (
            read_only(run / "checkpoints"),
            pytest.raises(InputError, match=r"/3: the checkpoint cannot be written: .*denied"),
        ):
            checkpoints.save(3, tree_of(3), {})
        assert checkpoints.steps() == [1, 2]
        assert_same(restore(checkpoints).tree, tree_of(2))
    gc.collect()


# Weights alone


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict[int, State]]:
    run, states = tmp_path_factory.mktemp("trained"), {}
    with Checkpoints(run) as checkpoints:
        for step, metric in ((1, 0.9), (2, 0.5), (3, 0.6)):
            states[step] = make_state(Network(rngs=nnx.Rngs(step)))
            checkpoints.save(step, states[step], {}, metric)
    return run, states


@pytest.mark.parametrize(("which", "step"), [("best", 1), ("last", 3)])
def test_weights_load_into_a_network(trained, which, step):
    run, states = trained
    before = sorted(run.rglob("*"))
    network = Network(rngs=nnx.Rngs(9))
    assert load_weights(run, network, which) == step
    assert_same(nnx.state(network, nnx.Param), states[step].weights)
    assert_same(nnx.state(network, nnx.BatchStat), states[step].rest)
    assert sorted(run.rglob("*")) == before


def test_the_moving_average_is_what_is_loaded(tmp_path):
    state = make_state(Network(rngs=nnx.Rngs(0)), average=True)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    network = Network(rngs=nnx.Rngs(9))
    load_weights(tmp_path, network)
    assert_same(nnx.state(network, nnx.Param), state.average)
    assert_same(nnx.state(network, nnx.BatchStat), state.rest)


def test_a_damaged_best_gives_way_to_the_next(trained, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "1" / "arrays" / "state")
    with pytest.warns(UserWarning, match=r"checkpoints/1 is damaged: .*; using the checkpoint of step 3"):
        assert load_weights(run, Network(rngs=nnx.Rngs(9))) == 3
    assert (run / "checkpoints" / "1").is_dir()


def test_another_network_is_refused_by_name(trained):
    network = Network(5, rngs=nnx.Rngs(0))
    network.layers.append(nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0)))
    del network.norm
    before = jax.tree.map(jnp.copy, nnx.state(network, nnx.Param))
    with pytest.raises(InputError, match="does not fit the network") as caught:
        load_weights(trained[0], network)
    for said in (
        "only in the checkpoint: weights/norm/bias float32[4], weights/norm/scale float32[4], rest/norm",
        "only in the network: weights/layers/2/kernel float32[2, 1]",
        "weights/layers/0/kernel is float32[3, 4] in the checkpoint, float32[3, 5] in the network",
    ):
        assert said in str(caught.value)
    assert_same(nnx.state(network, nnx.Param), before)


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(InputError, match=r"keep_last \(=0\) must be at least 1"):
        Checkpoints(tmp_path, keep_last=0)
    with pytest.raises(InputError, match=r"keep_best \(=-1\) must be at least 0"):
        Checkpoints(tmp_path, keep_best=-1)
    with pytest.raises(InputError, match="must be a whole run: checkpoints is missing or empty"):
        load_weights(tmp_path, Network(rngs=nnx.Rngs(0)))
