"""A network's weights on disk, by Orbax: loading is strict, and says what is missing on either side."""

from pathlib import Path

import jax
from flax import nnx

from jaxattn.train.extras import InputError, needs_extra


def save_checkpoint(folder: Path, model: nnx.Module):
    """Saves the weights and BatchNorm's statistics into `folder/checkpoint`."""
    with needs_extra("train"):
        from orbax.checkpoint import v1 as ocp
    ocp.save(str(folder.absolute() / "checkpoint"), nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState))))


def load_checkpoint(folder: Path, model: nnx.Module):
    """Loads into `model`, exactly: the same names, shapes and dtypes on both sides, or an error."""
    with needs_extra("train"):
        from orbax.checkpoint import v1 as ocp
    path = folder.absolute() / "checkpoint"
    if not path.is_dir():
        raise InputError(f"run (={folder}) is not a whole run: checkpoint is missing")
    expected = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState)))
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), expected)
    try:
        nnx.update(model, ocp.load(str(path), expected))
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{path}: does not fit the network of config.json, or is damaged: {error}") from error
