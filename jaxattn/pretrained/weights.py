"""Networks filled from files of weights, and written back."""

import os
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxattn.models.layout import Entry
from jaxattn.models.translation import COUNTER, Translation
from jaxattn.pretrained.files import read_weights, write_safetensors
from jaxattn.pretrained.registry import published


def load(
    name: str,
    path: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs | None = None,
    **settings: Any,
) -> Any:
    """A published network with the weights of a file, in evaluation mode.

    The file may be timm's or of another publisher that the network's tables name (`models`); which one it is, the names
    in it say. All that the network has must be in the file and nothing else, but for the head.

    Args:
      name: one of `names()`.
      path: the file, `.safetensors` or PyTorch's. `published(name)` says where one is, and its licence.
      num_classes: size of the output. None is the file's. Another than the file's makes a new head, with a warning that
        says so. 0 leaves the head out: the network gives pooled features.
      image_size: for networks that know their images' size, an int or (height, width); positions and relative tables
        are resized to it. None is the published one.
      dtype: of the computation.
      param_dtype: of the parameters. BatchNorm's statistics have at least float32.
      rngs: for a new head; None is `nnx.Rngs(0)`.
      **settings: others of the network's constructor, as `drop_path=0.1`.

    Raises:
      ImportError: the file is of safetensors, and that is not installed.
      ValueError: no such name; a file that is damaged; or names or shapes that differ, both sides' in the message.

    >>> load("resnet18", "weights.onnx")
    Traceback (most recent call last):
    ...
    ValueError: read_weights: path (='weights.onnx') must end in .safetensors, .pth, .pt, .tar or .bin
    """
    record, arrays = published(name), read_weights(path)
    settings |= {"dtype": dtype, "param_dtype": param_dtype}
    settings |= {} if image_size is None else {"image_size": image_size}

    def make(classes: int) -> Any:
        return nnx.eval_shape(lambda: record.make(num_classes=classes, rngs=nnx.Rngs(0), **settings))

    model = make(num_classes or record.num_classes or 1000)
    translation, entries = spoken(model, arrays)
    head = _head(translation, entries)
    found = next((len(arrays[key]) for key in head if key in arrays), 0)
    num_classes = found if num_classes is None else num_classes
    kept = num_classes in (0, found)
    model = make(num_classes) if num_classes != model_classes(entries, head) else model
    if not kept:
        warnings.warn(
            f"load: the head begins anew: num_classes (={num_classes}) differs from the {found} of {os.fspath(path)}",
            stacklevel=2,
        )
        _draw_head(model, translation, rngs or nnx.Rngs(0))
    if not kept or num_classes == 0:
        arrays = {key: array for key, array in arrays.items() if key not in head}
    _widen_statistics(model, param_dtype)
    try:
        _fill(model, arrays, translation, without_head=not kept)
    except ValueError as error:
        raise ValueError(f"load: {os.fspath(path)}: {error}") from None
    model.eval()
    return model


def save(model: nnx.Module, path: str | os.PathLike[str]) -> None:
    """Writes a network's weights as safetensors, under timm's names: timm loads them with `strict=True`.

    Args:
      model: a network with `translations`, as those of `jaxattn.models` are.
      path: the file.

    Raises:
      ImportError: safetensors is not installed.
      ValueError: the network has no table of names.

    >>> save(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), "weights.safetensors")
    Traceback (most recent call last):
    ...
    ValueError: save: model (=Linear) must have translations, the tables of its names in PyTorch
    """
    write_safetensors(path, torch_arrays(model))


def torch_arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    """A network's parameters and statistics under timm's names, in PyTorch's layouts: what `fill` reads back.

    >>> from jaxattn.models import tiny
    >>> torch_arrays(tiny(rngs=nnx.Rngs(0)))["fc.weight"].shape
    (10, 64)
    """
    state = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    ours = {".".join(map(str, key)): np.asarray(variable[...]) for key, variable in state}
    translation = _translations("save", model)[0]
    entries = translation.entries(model)
    arrays = {name: entry.write([ours[key] for key in entry.ours]) for name, entry in entries.items()}
    return arrays | dict(translation.constants)


def fill(
    model: nnx.Module,
    arrays: Mapping[str, np.ndarray],
    names: Translation | Mapping[str, Any] | None = None,
    *,
    new_head: bool = False,
):
    """Sets every parameter and statistic of a model, in place, from arrays under PyTorch's names.

    Args:
      model: an nnx module.
      arrays: all that the model has and nothing else, but BatchNorm's counter and what is computed from sizes.
      names: a `jaxattn.models.translation.Translation`, or its table: path in the model to the name in PyTorch. None is
        the model's own, that one of its `translations` which the arrays' names are of.
      new_head: the layer that makes the logits stays as it is, and what the arrays have of one is passed over.

    Raises:
      ValueError: what the model has and the arrays lack, what they have beyond, and each shape that does not fit.
        The model stays as it was.

    >>> from flax import nnx
    >>> import numpy as np
    >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> fill(model, {"weight": np.ones((2, 3)), "bias": np.zeros(2)}, {})
    >>> fill(model, {"weight": np.ones((3, 2)), "gain": np.ones(1)}, {})
    Traceback (most recent call last):
    ...
    ValueError: fill: the arrays lack bias (2,); the model has no gain; weight has (3, 2), allowed is (2, 3)
    """
    if names is None:
        names, _ = spoken(model, arrays)
    translation = names if isinstance(names, Translation) else Translation("", names)
    if new_head:
        head = _head(translation, translation.entries(model))
        arrays = {key: array for key, array in arrays.items() if key not in head}
    try:
        _fill(model, arrays, translation, without_head=new_head)
    except ValueError as error:
        raise ValueError(f"fill: {error}") from None


def _head(translation: Translation, entries: Mapping[str, Entry]) -> set[str]:
    """Their names of the layer that makes the logits."""
    return {key for key, entry in entries.items() if entry.ours[0].startswith(f"{translation.head}.")}


def spoken(model: nnx.Module, arrays: Mapping[str, np.ndarray]) -> tuple[Translation, dict[str, Entry]]:
    """Whose names the arrays have, by most matches, and what each of them holds."""
    tables = [(table, table.entries(model)) for table in _translations("fill", model)]
    return max(tables, key=lambda pair: len(pair[1].keys() & arrays.keys()))


def _translations(function: str, model: Any) -> tuple[Translation, ...]:
    if not hasattr(model, "translations"):
        raise ValueError(
            f"{function}: model (={type(model).__name__}) must have translations, the tables of its names in PyTorch"
        )
    return model.translations


def _fill(model: nnx.Module, arrays: Mapping[str, np.ndarray], translation: Translation, without_head: bool = False):
    entries = translation.entries(model)
    if without_head:
        head = _head(translation, entries)
        entries = {key: entry for key, entry in entries.items() if key not in head}
    derived = (COUNTER, *translation.derived, *translation.constants)
    others = translation.beside
    given = {
        name: array for name, array in arrays.items() if not name.endswith(derived) and not name.startswith(others)
    }
    given |= {
        name: entry.resize(given[name], entry)
        for name, entry in entries.items()
        if entry.resize is not None and name in given and not _same(given[name].shape, entry.shape)
    }
    _check_fit(entries, given)
    state = dict(nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    paths = {".".join(map(str, path)): path for path in state}
    for name, entry in entries.items():
        for key, part in zip(entry.ours, entry.read(given[name]), strict=True):
            path = paths[key]
            state[path] = state[path].replace(jnp.asarray(part, state[path].dtype))
    nnx.update(model, nnx.from_flat_state(state))


def _same(given: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Axes of one in front and at the end apart: a 1 × 1 convolution is a linear map."""

    def core(shape: tuple[int, ...]) -> tuple[int, ...]:
        there = [axis for axis, n in enumerate(shape) if n != 1]
        return shape[there[0] : there[-1] + 1] if there else ()

    return core(given) == core(expected)


def _check_fit(entries: Mapping[str, Entry], given: Mapping[str, np.ndarray]) -> None:
    lacking = [f"{name} {entry.shape}" for name, entry in entries.items() if name not in given]
    beyond = [name for name in given if name not in entries]
    problems = [f"the arrays lack {', '.join(lacking)}"] if lacking else []
    problems += [f"the model has no {', '.join(beyond)}"] if beyond else []
    problems += [
        f"{name} has {given[name].shape}, allowed is {entry.shape}"
        for name, entry in entries.items()
        if name in given and not _same(given[name].shape, entry.shape)
    ]
    if problems:
        raise ValueError("; ".join(problems))


def model_classes(entries: Mapping[str, Entry], head: set[str]) -> int:
    """How many classes a network was made with, by its head's entries."""
    return next((entries[key].shape[0] for key in head), 0)


def _draw_head(model: Any, translation: Translation, rngs: nnx.Rngs) -> None:
    """Gives the head, which no file has, the values that training begins with: N(0, 0.02²), and zeros for the bias."""
    for _, module in nnx.iter_modules(getattr(model, translation.head)):
        if isinstance(module, nnx.Linear):
            layer: Any = module
            shape, dtype = layer.kernel.shape, layer.kernel.dtype
            layer.kernel.set_value(0.02 * jax.random.truncated_normal(rngs.params(), -2, 2, shape, dtype))
            layer.bias.set_value(jnp.zeros(layer.bias.shape, layer.bias.dtype))


def _widen_statistics(model: Any, dtype: Any) -> None:
    """BatchNorm's statistics are float32 in any network; beside float64's parameters they keep what the file has."""
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.BatchStat)):
        variable.set_value(jax.ShapeDtypeStruct(variable.shape, jnp.promote_types(jnp.float32, dtype)))
