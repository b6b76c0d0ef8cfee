"""Meshes: the batch split over devices, the weights, and the grid itself.

A mesh has three axes. The batch is split over "data" and "fsdp", the weights (and the optimiser's moments) over "fsdp",
and the first axis of the images' grid over "space".
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxattn.errors import InputError
from jaxattn.nn.grid import Splittable
from jaxattn.nn.rows import RowLinear

AXES = ("data", "fsdp", "space")
BATCH = ("data", "fsdp")
# Layers of Flax that treat every token alike, and what holds layers.
TOKENWISE = (
    nnx.Linear, nnx.LinearGeneral, RowLinear, nnx.LayerNorm, nnx.RMSNorm, nnx.Sequential, nnx.List, nnx.Dict,
    nnx.Rngs, nnx.RngStream,
)  # fmt: skip


def make_mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that `text` describes: sizes of "data", "fsdp" and "space", as in "data=4,space=2".

    Args:
      text: an axis that it does not name has size 1; nothing at all puts every device on "data".
      devices: all of which the mesh is made; None: those of all processes.

    Raises:
      ValueError: an axis that is none of these, a size that is no number, or as many devices as there are not.

    >>> dict(make_mesh("").shape) == {"data": jax.device_count(), "fsdp": 1, "space": 1}
    True
    """
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    seen = set()
    for part in filter(None, text.replace(" ", "").split(",")):
        match = re.fullmatch(r"(\w+)=(\d+)", part)
        if match is None or match[1] not in AXES or match[1] in seen or int(match[2]) < 1:
            raise InputError(
                f"mesh (={text!r}): {part!r} must be one of {', '.join(f'{axis}=SIZE' for axis in AXES)}, each once, "
                "with a SIZE of at least 1"
            )
        seen.add(match[1])
        sizes[match[1]] = int(match[2])
    devices = jax.devices() if devices is None else devices
    if not seen:
        sizes["data"] = len(devices)
    asked, given = math.prod(sizes.values()), len(devices)
    if asked != given:
        raise InputError(f"mesh (={text!r}) takes {asked} devices and there are {given}; {_advice(sizes, given)}")
    axis_types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types, devices=devices)


def _advice(sizes: dict[str, int], devices: int) -> str:
    """A mesh that fits, as near as one axis brings it."""
    for axis in AXES:
        others = math.prod(size for name, size in sizes.items() if name != axis)
        if devices % others == 0:
            fitting = {**sizes, axis: devices // others}
            return "this fits: " + ",".join(f"{name}={size}" for name, size in fitting.items())
    return f"this fits: data={devices}"


def check_batch(mesh: Mesh, batch_size: int, image_shape: tuple[int, ...]) -> None:
    """Raises a ValueError where a batch of images `[height, width, channels]` can't be split over the mesh."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise InputError(
            f"batch_size (={batch_size}) must be a multiple of data·fsdp (={parts}), over which the mesh splits it"
        )
    if image_shape[0] % mesh.shape["space"]:
        raise InputError(
            f"the images' height (={image_shape[0]}) must be a multiple of space (={mesh.shape['space']}), over which "
            "the mesh splits it"
        )


def batch_sharding(mesh: Mesh) -> dict[str, NamedSharding]:
    """How a batch lies on the mesh: {"image", "label", "index"}."""
    image = NamedSharding(mesh, _image_spec(mesh))
    label = NamedSharding(mesh, PartitionSpec(BATCH))
    return {"image": image, "label": label, "index": label}


def _image_spec(mesh: Mesh) -> PartitionSpec:
    # an axis of size 1 is left out: no network needs to know of it
    return PartitionSpec(BATCH, "space") if mesh.shape["space"] > 1 else PartitionSpec(BATCH)


def weight_specs(mesh: Mesh | AbstractMesh, weights: PyTree) -> PyTree:
    """How each array of `weights` is split over "fsdp": along the largest axis that it divides; otherwise not at all.

    >>> mesh = jax.sharding.AbstractMesh((2, 4, 1), ("data", "fsdp", "space"))
    >>> weight_specs(mesh, np.ones((3, 3, 8, 16))) == PartitionSpec(None, None, None, "fsdp")
    True
    >>> weight_specs(mesh, np.ones(7)) == PartitionSpec()
    True
    """
    parts = mesh.shape["fsdp"]

    def spec(array):
        fitting = [axis for axis, n in enumerate(np.shape(array)) if n and n % parts == 0]
        if parts == 1 or not fitting:
            return PartitionSpec()
        longest = max(fitting, key=lambda axis: np.shape(array)[axis])
        return PartitionSpec(*(None,) * longest, "fsdp")

    return jax.tree.map(spec, weights)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """How the state of the training lies on the mesh: weights, their averages and the optimiser's moments over "fsdp".

    A moment has its weight's shape, and so its sharding. The rest of the state (BatchNorm's statistics, which every
    device computes alike, and counts) is everywhere.

    Args:
      mesh: of `make_mesh`.
      state: a `jaxattn.train.step.State` of arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      The same tree, of `NamedSharding`s.
    """
    sharded = functools.partial(jax.tree.map, functools.partial(NamedSharding, mesh))
    everywhere = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), state)
    split = sharded(weight_specs(mesh, state))
    return everywhere._replace(weights=split.weights, moments=split.moments, average=split.average)


def on_mesh(model: nnx.Module, mesh: Mesh) -> None:
    """Prepares a network for `sharded`: BatchNorm takes its statistics over the whole batch, and the grid is split."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.axis_name = AXES if mesh.shape["space"] > 1 else BATCH  # pyright: ignore[reportAttributeAccessIssue]
    split_grid(model, "space" if mesh.shape["space"] > 1 else None)


def split_grid(model: nnx.Module, axis_name: str | None) -> None:
    """Tells every layer of a network that the grid's first axis is split over a mesh axis; None: that it is whole.

    A layer or a network that looks beyond a token is a `Splittable`, which says whether it can be split.

    Raises:
      ValueError: a layer that can't be split, named by its path in the network, and why.

    >>> from jaxattn.models import tiny
    >>> split_grid(tiny(mix="attention", rngs=nnx.Rngs(0)), "space")
    """
    modules = list(nnx.iter_modules(model))
    if axis_name is not None:
        for path, module in modules:
            if reason := _needs_whole_grid(module):
                where = ".".join(map(str, path)) or "the network itself"
                raise InputError(
                    f"{type(module).__name__} ({where}) can't be computed on a grid that is split over {axis_name!r}: "
                    f"{reason}"
                )
    for _, module in modules:
        if isinstance(module, Splittable):
            module.axis_name = axis_name


def _needs_whole_grid(module: nnx.Module) -> str | None:
    """Why a module's own operations, not those of the modules that it holds, are wrong on a split grid, if they are."""
    if isinstance(module, nnx.Dropout):
        # one draw for a whole example is every shard's
        alike = module.rate == 0 or len(module.broadcast_dims) > 0
        return None if alike else "its draw for each token would be repeated on each shard"
    if type(module) in (*TOKENWISE, nnx.BatchNorm):
        return None
    unknown = "it is no jaxattn.nn.grid.Splittable, and none of Flax's layers that treat every token alike"
    return module.needs_whole_grid if isinstance(module, Splittable) else unknown


def sharded(loss_fn: Callable, mesh: Mesh, specs: PyTree) -> Callable:
    """`loss_fn` of arrays that lie on a mesh: the same loss, and under `jax.grad` the same gradients.

    Each device gathers the weights, computes the loss of its part of the batch and of the grid, and the mean is taken
    over all of them. The gradients come out split as the weights are: transposed, a gather is a reduce-scatter. What is
    random differs between parts of the batch, but not between parts of one image, so that it is not one device's draw.

    Args:
      loss_fn: `(weights, rest, key, images, targets) -> loss, (rest, accuracy)`, of a network that went through
        `on_mesh`; both are means over the batch.
      mesh: of `make_mesh`.
      specs: how the weights are split, `weight_specs(mesh, weights)`.

    Returns:
      A function of the same arguments, whole arrays, to be jitted.
    """

    def local(weights, rest, key, images, targets):
        key = jax.random.fold_in(key, lax.axis_index(BATCH))
        loss, (rest, accuracy) = loss_fn(_gathered(weights, specs), rest, key, images, targets)
        return lax.pmean(loss, BATCH), (rest, lax.pmean(accuracy, BATCH))

    here, batch = PartitionSpec(), PartitionSpec(BATCH)
    in_specs = (specs, here, here, _image_spec(mesh), batch)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=(here, (here, here)))


def sharded_predict(predict: Callable, mesh: Mesh, specs: PyTree) -> Callable:
    """`predict`, `(weights, rest, images) -> logits [batch, classes]`, of arrays that lie on a mesh; see `sharded`."""
    in_specs = (specs, PartitionSpec(), _image_spec(mesh))
    return jax.shard_map(
        lambda weights, rest, images: predict(_gathered(weights, specs), rest, images),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=PartitionSpec(BATCH),
    )


def _gathered(weights: PyTree, specs: PyTree) -> PyTree:
    """The whole weights, of a device's parts."""

    def gather(array, spec):
        return lax.all_gather(array, "fsdp", axis=spec.index("fsdp"), tiled=True) if "fsdp" in spec else array

    return jax.tree.map(gather, weights, specs)
