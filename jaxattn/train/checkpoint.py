"""Checkpoints of a run: written in the background, whole or not at all, and checked before they are believed.

A run keeps each of them in a folder named after its step:

    checkpoints/300/arrays/         every array of the state, by Orbax
    checkpoints/300/manifest.json   step, metric, position in the data, and the size and checksum of every file

Until the manifest, which is written last, is in it, the folder is called `300.partial`: what bears a step's name is
whole. Orbax's own `training.Checkpointer` commits before a manifest can be written, and loads an array with a flipped
bit without complaint; so it writes the arrays here, and the few lines around it are these.
"""

import contextlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from jaxattn.errors import InputError, needs_extra
from jaxattn.files import open_file, read_small, reason

HANDLES = 64  # open files
FOLDER, ARRAYS, MANIFEST = "checkpoints", "arrays", "manifest.json"


class Damaged(Exception):
    """A checkpoint is not what was written."""


class Restored(NamedTuple):
    """What a checkpoint held."""

    step: int
    tree: Any
    position: dict


class Checkpoints:
    """The checkpoints of the folder `run`: the `keep_last` newest and the `keep_best` of the highest metric.

    Each bears the `identity` that is given, and one of another is not restored.

    `save` returns as soon as the arrays are copied from the device, so they may be donated at once; a thread writes
    them. A process killed at any moment leaves the checkpoints that were whole before, and at most one `.partial`,
    which the next `Checkpoints` removes. All processes of a job call every method, on a file system that they share.

    Raises:
      InputError: the folder cannot be written to, or its disk is full.

    >>> run = Path(tempfile.mkdtemp())
    >>> with Checkpoints(run) as checkpoints:
    ...     checkpoints.save(10, {"kernel": jax.numpy.ones(3, "float32")}, {"next image": 40}, metric=0.9)
    >>> Checkpoints(run).restore({"kernel": jax.ShapeDtypeStruct((3,), "float32")})
    Restored(step=10, tree={'kernel': Array([1., 1., 1.], dtype=float32)}, position={'next image': 40})
    """

    def __init__(self, run: Path, *, keep_last: int = 2, keep_best: int = 1, identity: str = ""):
        for name, count, least in (("keep_last", keep_last, 1), ("keep_best", keep_best, 0)):
            if count < least:
                raise InputError(f"{name} (={count}) must be at least {least}")
        self.folder = run.absolute() / FOLDER
        self._keep_last, self._keep_best, self._identity = keep_last, keep_best, identity
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[Path, Future] | None = None
        check_handles()
        if jax.process_index() == 0:
            _probe(self.folder)
            for abandoned in self.folder.glob("*.partial"):
                shutil.rmtree(abandoned, ignore_errors=True)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_):
        self.close()

    def steps(self) -> list[int]:
        """The steps whose checkpoints are on disk, in ascending order."""
        return _steps(self.folder)

    def save(self, step: int, tree: Any, position: dict, metric: float | None = None):
        """Begins to save, when the save before it has ended. A step that is on disk already is left as it is.

        Args:
          step: names the checkpoint.
          tree: any pytree of arrays: `nnx.State`, optax's tuples, keys; sharded in any way.
          position: where the data are, as JSON can hold it.
          metric: what the best have most of; None and NaN count as less than any number.

        Raises:
          InputError: this save or the one before it could not be written. The older checkpoints are as they were.
        """
        with needs_extra("train"):
            from orbax.checkpoint import v1 as ocp
        self.wait()
        path = self.folder / str(step)
        with self._writing(path):
            if path.exists():
                return
            if not self.folder.is_dir():  # Orbax would make it anew, and nothing else of the run
                raise OSError(f"the folder {self.folder} was removed")
        arrays = _by_name(tree)
        manifest = {
            "step": step,
            "metric": metric,
            "position": position,
            "run": self._identity,
            "arrays": _describe(arrays),
        }
        manifest = json.loads(json.dumps(manifest))  # a copy, as it will be read
        # where folders are made in the background, one that cannot be made has Orbax wait five minutes for it
        context = ocp.Context()
        context.asynchronous.create_directories_asynchronously = False
        with self._writing(path), context:
            response = ocp.save_async(str(_partial(path) / ARRAYS), arrays)
        self._pending = path, self._writer.submit(self._finish, response, path, manifest)

    def wait(self):
        """Returns when the last save is on disk; raises what `save` raises if it could not be written."""
        if self._pending is not None:
            (path, written), self._pending = self._pending, None
            with self._writing(path):
                written.result()
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices(f"checkpoint {path.name}")

    def restore(self, like: Any) -> Restored | None:
        """The newest checkpoint that is whole, or None if there is none at all.

        A damaged one is reported by a warning, called `STEP.damaged` from then on, and the one before it is used.

        Args:
          like: a pytree as it was saved, of arrays or `jax.ShapeDtypeStruct`. Their shardings are those of the result,
            whatever the mesh was that saved it; without one, an array is put on the first device.

        Raises:
          InputError: all of them are damaged; the checkpoint is of a run with another identity; or it holds other
            arrays than `like`, which it then names.
        """
        self.wait()
        step, damaged = -1, {}
        if jax.process_index() == 0:  # which decides for all
            step, damaged = _first_whole(self.folder, self.steps()[::-1])
        step, lost = _agreed(step, len(damaged))
        if step < 0 and lost:
            raise InputError(f"{self.folder}: no checkpoint is whole: {'; '.join(damaged.values())}")
        if step < 0:
            return None
        for name in damaged:
            _set_aside(self.folder / str(name))
        path = self.folder / str(step)
        manifest = _read_manifest(path)
        found = manifest.get("run", "")
        if found and self._identity and found != self._identity:
            raise InputError(
                f"{path}: is a checkpoint of other settings or data (of {found}, and these are {self._identity}): "
                "another process wrote it into this folder; replace the run with --overwrite"
            )
        return Restored(step, _load(path, manifest["arrays"], like), manifest["position"])

    def close(self):
        """Waits for the last save, and ends the thread."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def _finish(self, response: Any, path: Path, manifest: dict):
        """What the thread does: waits for every array of every process, seals and names the folder, removes others."""
        response.result()
        if jax.process_index() == 0:
            _write_manifest(_partial(path), manifest)
            _partial(path).rename(path)
            self._prune()

    def _prune(self):
        """Removes the checkpoints that are neither among the newest nor among the best."""
        keep = self.steps()[-self._keep_last :] + _best_first(self.folder)[: self._keep_best]
        for step in set(self.steps()).difference(keep):
            # half removed, it must not bear a step's name
            shutil.rmtree((self.folder / str(step)).rename(_partial(self.folder / str(step))))

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Around a part of a save: tensorstore reports a full disk as a ValueError."""
        try:
            yield
        except (OSError, ValueError) as error:
            shutil.rmtree(_partial(path), ignore_errors=True)
            rest = f"whole are those of the steps {self.steps()}" if self.steps() else "there is no older one"
            raise InputError(f"{path}: the checkpoint cannot be written: {error}; {rest}") from error


def load_weights(
    run: Path, model: nnx.Module, which: Literal["best", "last"] = "best", learned: Any = nnx.Param
) -> int:
    """Loads a network's weights and statistics from a run's checkpoint into `model`, and returns the step.

    The weights are their moving average where the run kept one. A damaged checkpoint is reported by a warning, and
    the next one used.

    Args:
      run: the folder that `Checkpoints` was given; nothing in it is changed.
      model: the network that was trained, with any weights; their dtypes and shardings stay.
      which: the highest metric, the newest among equals; or the newest.
      learned: an nnx filter, of the weights that the run changed (`jaxattn.train.finetune.learned`).

    Raises:
      InputError: no checkpoint there is whole; or its arrays are not those of `model`, in which case both are named.
    """
    if which not in ("best", "last"):
        raise InputError(f"which (={which!r}) must be 'best' or 'last'")
    folder = run.absolute() / FOLDER
    steps = _best_first(folder) if which == "best" else _steps(folder)[::-1]
    step, damaged = _first_whole(folder, steps)
    if step < 0:
        said = f"no checkpoint is whole: {'; '.join(damaged.values())}" if damaged else f"{FOLDER} is missing or empty"
        raise InputError(f"run (={run}) must be a whole run: {said}")
    path = folder / str(step)
    saved = _read_manifest(path)["arrays"]
    kind = "average" if any(name.startswith("average/") for name in saved) else "weights"
    others = [name for name in saved if name.partition("/")[0] not in (kind, "rest")]
    rest = nnx.state(model, nnx.Not(nnx.Any(learned, nnx.RngState)))
    state = _load(path, saved, {kind: nnx.state(model, learned), "rest": rest}, others)
    nnx.update(model, state[kind], state["rest"])
    return step


def _by_name(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by their paths, such as `weights/stem/kernel`: one name for dicts, tuples and modules."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    return dict(zip(names, jax.tree.leaves(tree), strict=True))


def _describe(arrays: dict[str, Any]) -> dict[str, str]:
    """Type and shape, such as `float32[3, 4]`."""
    return {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}


def _compare(path: Path, saved: dict[str, str], wanted: dict[str, str]):
    """Raises an error that names every array which is not the same on both sides."""
    if saved == wanted:
        return
    sides = {
        "only in the checkpoint": [f"{name} {saved[name]}" for name in saved if name not in wanted],
        "only in the network": [f"{name} {wanted[name]}" for name in wanted if name not in saved],
        "different": [
            f"{name} is {saved[name]} in the checkpoint, {wanted[name]} in the network"
            for name in saved
            if wanted.get(name, saved[name]) != saved[name]
        ],
    }
    said = "; ".join(f"{side}: {', '.join(names)}" for side, names in sides.items() if names)
    if sides["only in the checkpoint"] and sides["only in the network"]:
        said += (
            "; if both are the same network, it was saved by a version of jaxattn whose layers named their arrays "
            "otherwise: load it with that version, or train it anew"
        )
    raise InputError(f"{path}: does not fit the network: {said}")


def _load(path: Path, saved: dict[str, str], like: Any, others: Sequence[str] = ()) -> Any:
    """Loads what `like` holds, to where its shardings say: exactly what was saved but for the `others`."""
    with needs_extra("train"):
        from orbax.checkpoint import v1 as ocp
    arrays = _by_name(like)
    _compare(path, {name: kept for name, kept in saved.items() if name not in others}, _describe(arrays))
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=getattr(array, "sharding", None) or first)
        for name, array in arrays.items()
    }
    loaded = ocp.load(str(path / ARRAYS), wanted | dict.fromkeys(others, ocp.PLACEHOLDER))
    return jax.tree.unflatten(jax.tree.structure(like), [loaded[name] for name in arrays])


def _first_whole(folder: Path, steps: Iterable[int]) -> tuple[int, dict[int, str]]:
    """The first step whose checkpoint is whole, or -1, and what ails those before it, which a warning says."""
    damaged = {}
    for step in steps:
        try:
            _check(folder / str(step))
        except Damaged as error:
            damaged[step] = str(error)
            continue
        for said in damaged.values():
            warnings.warn(f"{said}; using the checkpoint of step {step}", stacklevel=3)
        return step, damaged
    return -1, damaged


def _check(path: Path):
    """Raises `Damaged` unless every file of a checkpoint is as it was written."""
    for name, written in _read_manifest(path)["files"].items():
        try:
            found = _checksum(path / name)
        except OSError as error:
            raise Damaged(f"{path} is damaged: {error}") from error
        if found != written:
            raise Damaged(f"{path} is damaged: {name} is not what was written")


def _read_manifest(path: Path) -> dict:
    """The manifest of a checkpoint; raises `Damaged` unless it is as it was written."""
    try:
        content, checksum = json.loads(read_small(path / MANIFEST))
        whole = zlib.crc32(json.dumps(content).encode()) == checksum
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise Damaged(f"{path} is damaged: {MANIFEST}: {reason(error)}") from error
    if not whole or not _is_manifest(content):
        raise Damaged(f"{path} is damaged: {MANIFEST} is not what was written")
    return content


def _is_manifest(content: Any) -> bool:
    """Whether it has all that is asked of it: a checksum can be right of anything."""
    kinds = {"step": int, "metric": int | float | None, "position": dict, "arrays": dict, "files": dict}
    return (
        isinstance(content, dict)
        and all(name in content and isinstance(content[name], kind) for name, kind in kinds.items())
        and all(isinstance(said, str) for said in content["arrays"].values())
        and all(isinstance(sums, list) and len(sums) == 2 for sums in content["files"].values())
    )


def _write_manifest(path: Path, manifest: dict):
    """Writes the manifest, with the size and checksum of every file, and its own checksum behind it."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    content = manifest | {"files": {file.relative_to(path).as_posix(): _checksum(file) for file in files}}
    sealed = [content, zlib.crc32(json.dumps(content).encode())]
    with open(path / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(sealed, file)
        file.flush()
        os.fsync(file.fileno())


def _checksum(path: Path) -> list[int]:
    """Size in bytes and CRC-32 of a file."""
    crc = 0
    with open_file(path) as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
        return [file.tell(), crc]


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.glob("*") if re.fullmatch("0|[1-9][0-9]{0,17}", path.name))


def _best_first(folder: Path) -> list[int]:
    """The steps by their metrics, the highest first; among equals, the newest."""

    def rank(step: int) -> tuple[float, int]:
        try:
            metric = _read_manifest(folder / str(step))["metric"]
        except Damaged:
            metric = None
        return (-math.inf if metric is None or math.isnan(metric) else metric), step

    return sorted(_steps(folder), key=rank, reverse=True)


def _partial(path: Path) -> Path:
    """What a checkpoint is called while it is not whole."""
    return path.with_name(f"{path.name}.partial")


def _set_aside(path: Path):
    """Renames a damaged checkpoint, so that its step can be saved again and no step counts it."""
    aside = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def _agreed(*numbers: int) -> list[int]:
    """What the first process says, in all processes."""
    if jax.process_count() == 1:
        return list(numbers)
    return [int(number) for number in multihost_utils.broadcast_one_to_all(np.array(numbers, np.int32))]


def check_handles():
    """Raises an error if this process may not open the files that a save opens side by side (`ulimit -n`)."""
    if sys.platform == "win32":
        return
    import resource

    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= allowed < HANDLES:
        raise InputError(f"the limit of open files (ulimit -n, ={allowed}) must be at least {HANDLES} for checkpoints")


def _probe(folder: Path):
    """Raises an error if nothing can be written to `folder`: before the training, not after its first hour."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{folder}: checkpoints cannot be written there: {error}") from error
