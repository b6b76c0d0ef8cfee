"""Files of weights: safetensors' and PyTorch's."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxattn.errors import needs_extra
from jaxattn.files import open_file, reading
from jaxattn.torch_file import read_torch

# what holds the network's tensors in a training checkpoint; averages of the weights come first, as in timm
HOLDERS = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "module")
# what wrappers put before every name: data parallelism, a compiled module, a trainer's attribute
PREFIXES = ("module.", "_orig_mod.", "model.")


def read_weights(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a file of weights, by name: `.safetensors`, or PyTorch's `.pth`, `.pt`, `.bin`.

    A training checkpoint is unwrapped: the tensors are found under `state_dict`, `model` or the like, an average of the
    weights before the weights, and `module.` before every name is cut off. What else such a file holds is read as inert
    objects, so nothing in it is imported or called.

    Args:
      path: the file. Its ending says of which kind it is.

    Raises:
      ImportError: safetensors is not installed, and the file is one.
      ValueError: the file is damaged, or holds no dictionary of tensors.

    >>> read_weights("weights.onnx")
    Traceback (most recent call last):
    ...
    ValueError: read_weights: path (='weights.onnx') must end in .safetensors, .pth, .pt, .tar or .bin
    """
    name = os.fspath(path)
    if name.endswith(".safetensors"):
        arrays = _read_safetensors(name)
    elif name.endswith((".pth", ".pt", ".tar", ".bin")):
        arrays = read_torch(name, unwrap=unwrap)
    else:
        raise ValueError(f"read_weights: path (={name!r}) must end in .safetensors, .pth, .pt, .tar or .bin")
    for prefix in PREFIXES:
        if arrays and all(key.startswith(prefix) for key in arrays):
            arrays = {key.removeprefix(prefix): array for key, array in arrays.items()}
    return arrays


def unwrap(loaded: Any) -> Any:
    """The dictionary of the network's tensors in what a checkpoint holds.

    >>> unwrap({"epoch": 3, "model": {"weight": 1}})
    {'weight': 1}
    """
    while isinstance(loaded, dict):
        # a pickle may give a dictionary an attribute of any name, so its methods are taken from the class
        found = [dict.get(loaded, key) for key in HOLDERS]
        inner = next((value for value in found if isinstance(value, dict) and dict.__len__(value)), None)
        if inner is None:
            break
        loaded = inner
    return loaded


def _read_safetensors(path: str) -> dict[str, np.ndarray]:
    with needs_extra("pretrained"):
        from safetensors import numpy as safetensors
    open_file(path).close()  # it would wait for a pipe
    with reading(path, "read_weights: {}: damaged, or not of safetensors: "):
        return safetensors.load_file(path)


def write_safetensors(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a file that PyTorch's side loads as it does its own: whole, or what stood there stays."""
    with needs_extra("pretrained"):
        from safetensors.numpy import save_file
    whole, partial = Path(path), Path(f"{os.fspath(path)}.partial")
    try:
        # "pt" is what Hugging Face's loaders ask for
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial, {"format": "pt"})
        partial.replace(whole)
    finally:
        partial.unlink(missing_ok=True)
