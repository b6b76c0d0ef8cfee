"""A trained network as a file for others: weights that PyTorch's side loads, or a program that needs JAX alone."""

import contextlib
import importlib
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from jaxattn.errors import InputError, needs_extra
from jaxattn.files import reason
from jaxattn.machine import PLATFORMS, traced_for
from jaxattn.pretrained.weights import save
from jaxattn.train.classifier import Classifier, find


def export(text: str, form: str, platforms: str, batch: str, out: Path | None) -> str:
    """Writes a network's file, whole or not at all, and returns what to say of it.

    Args:
      text: which network, as in `jaxattn.train.classifier.find`.
      form: "safetensors", the weights under timm's names, or "stablehlo", the program with its weights.
      platforms: names of PLATFORMS, with commas between: where the program runs.
      batch: "symbolic" for any number of images, or their number.
      out: the file; None for one in the current folder, called as the network or the run.

    Raises:
      ValueError: no such network, form, platform or batch; a network of which no such file is made; a place that cannot
        be written to.
    """
    there = platforms.split(",")
    if not set(there) <= set(PLATFORMS) or len(set(there)) < len(there):
        raise InputError(f"platforms (={platforms!r}) must be some of {', '.join(PLATFORMS)}, with commas between")
    if batch != "symbolic" and not (batch.isascii() and batch.isdecimal() and 0 < int(batch) < 1 << 31):
        raise InputError(f"batch (={batch!r}) must be 'symbolic' or a number of images, at least 1")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise InputError(f"out (={out}) must be a file in a folder that is there")
    if out is not None and form == "safetensors" and out.suffix != ".safetensors":
        raise InputError(f"out (={out}) must end in .safetensors")
    if form == "stablehlo":
        with needs_extra("export"):
            importlib.import_module("flatbuffers")
    network = find(text)
    path = out or Path(f"{network.name}.{form}")
    try:
        if form == "safetensors":
            # whose ending says what it is
            save(network.model, path)
            return f"{path}: the weights under timm's names"
        _write(path, program(network, there, batch))
    except OSError as error:
        raise InputError(f"out (={path}) cannot be written to: {reason(error)}") from error
    except ValueError as error:
        raise InputError(f"network (={text!r}) cannot be written as {form}: {error}") from error
    height, width, channels = network.image_shape
    count = "batch" if batch == "symbolic" else batch
    return (
        f"{path}: float32 [{count}, {height}, {width}, {channels}], pixels from 0 to 1, to {len(network.classes)} "
        f"logits; on {', '.join(there)}"
    )


def program(network: Classifier, platforms: list[str], batch: str = "symbolic") -> bytes:
    """What `jax.export.deserialize` reads: the function of images `[batch, *image_shape]`, float32 from 0 to 1, that
    gives the logits. The weights are in it.

    Of several platforms, each has its own tiles and ways to compute; which kernels serve, this machine decides.
    """
    state = nnx.state(network.model)
    function = network.logits()
    count = jax.export.symbolic_shape("batch") if batch == "symbolic" else (int(batch),)
    images = jax.ShapeDtypeStruct((*count, *network.image_shape), jnp.float32)
    alone = len(platforms) == 1
    with traced_for(PLATFORMS[platforms[0]]) if alone else contextlib.nullcontext():
        exported = jax.export.export(jax.jit(lambda images: function(state, images)), platforms=platforms)(images)
    return bytes(exported.serialize())


def _write(path: Path, content: bytes):
    """One file, which is there whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
