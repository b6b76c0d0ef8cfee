"""Every argument of every public function and constructor, with values that it must not take.

A call with one of them is refused by a ValueError or a TypeError that is raised on a line of this package and names the
argument, before anything is compiled. A value that means something (`MEANS`) is taken, and changes no shape.
"""

import inspect
import math
import pathlib
import re
import traceback
from collections.abc import Callable, Iterator
from typing import Any, get_args

import jax
import jaxtyping
import numpy as np
import pytest
from calls import CALLS, PACKAGES, ZOO
from flax import nnx
from layers import LAYERS

import jaxattn
from jaxattn import models

HERE = str(pathlib.Path(jaxattn.__file__).parent)
# They take operands by position; what else they take has a test beside them, in test_einsum.py.
ELSEWHERE = {"einsum", "plan"}
MENDED = [function for function in CALLS if function.__name__ not in ELSEWHERE]
# Records that are returned, and a function without arguments.
UNCALLED = {"Plan", "AttentionPlan", "Row", "QueryKeyMetric", "table", "Rotary"}
POOLING = (  # with no classes
    "ResNet", "EfficientNet", "ViT", "ConvNeXt", "Swin", "NAT", "MaxViT", "CoAtNet", "BoTNet", "MetaFormer",
    "ConvMixer", "VOLO", "SAMViT", "SwinVolume",
)  # fmt: skip
BAD = {"0": 0, "-1": -1, "1.5": 1.5, "'3'": "3", "None": None, "nan": math.nan, "inf": math.inf, "1j": 1j}
BAD |= {"True": True, "(1, 'a')": (1, "a")}
ATTENTIONS = ("attention", "attention_at", "attention_scores", "attention_weights")
MEANS = {  # by the argument, or by "function.argument"
    **dict.fromkeys(("scale", "query_scale", "gate"), ("0", "-1", "1.5")),
    **dict.fromkeys(("halo", "shift", "dropout_rate", "drop_path", "dropout"), ("0",)),
    **dict.fromkeys(
        [f"{f}.alpha" for f in ("error_bound", "convert", "conv_to_attention", "remix", "remix_report")], ("1.5", "inf")
    ),
    **dict.fromkeys(("conv.x", "conv.kernel", "conv_transpose.x", "conv_transpose.kernel"), ("complex",)),
    **dict.fromkeys(("patch_kernel.kernel",), ("complex", "an axis more")),
    "conv_to_attention.kernel": ("an axis more",),  # of three dimensions
    "padding": ("0", "-1"),  # a negative one crops
    **dict.fromkeys(("conv.padding", "depthwise_conv.padding"), ("0",)),  # and here leaves nothing
    "init_as_cnn.alpha": ("1.5",),
    "logits_soft_cap": ("1.5",),
    "axis": ("0",),
    "weights": ("an axis more",),  # of a batch
    **dict.fromkeys(("attention_maps.weights", "mix.weights"), ()),
    "mask": ("no axes", "an axis more", "True"),  # what broadcasts
    **dict.fromkeys(("Conv.mask", "ConvTranspose.mask"), ("no axes",)),
    "inline_svg.name": ("'3'",),
    **{f"{network}.num_classes": ("0",) for network in POOLING},
    "ViT.registers": ("0",),
    "layer_scale": ("0", "-1", "1.5"),
    "Swin.padding": (),
    "ViT.epsilon": ("1.5",),
    "SAMViT.epsilon": ("1.5",),
    "plain.text": ("'3'",),
    "can_be_drawn.text": ("'3'",),
    **{f"{name}.bias": ("1.5", "nan", "inf", "no axes") for name in ATTENTIONS},
    **{f"{name}.mask": ("no axes", "True") for name in ATTENTIONS},
    "attention_plan.mask": ("None", "True"),
    "nearest_conv.mask": ("no axes", "True"),
    "attention.query_offset": ("0",),
    "attention_plan.window": ("None",),
    "attention_plan.bias": ("None", "1.5", "nan", "inf"),
    **dict.fromkeys(("base", "stretch", "slower"), ("1.5",)),
    "rotary.offset": ("0", "-1", "1.5"),
    "rotary_at.positions": ("an axis more",),
    **{
        f"{made.__name__}.{name}": texts
        for layer in LAYERS.values()
        for made in (layer.function, layer.module)
        for name, texts in layer.takes.items()
    },
}
KEPT = ("implementation", "axis_name")  # names, which a constructor only keeps


@pytest.fixture(autouse=True)
def as_users_have_it() -> Iterator[None]:
    """Without the checks of shapes that the tests add, which would refuse first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def bad_calls(function: Callable, kwargs: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The argument's name, the bad value's, and the call."""
    for name, annotation in arguments(function).items():
        good = kwargs.get(name)
        for text, value in [*BAD.items(), *bad_arrays(name, good)]:
            fits_no_table = (function.__name__, name, text) == ("halo_attention", "halo", "0")
            is_bool = value is True and bool in (annotation, *get_args(annotation))
            if not (fits_no_table or is_bool) and (value is not None or type(None) not in get_args(annotation)):
                yield name, text, {**kwargs, name: value}
        for entry in good if isinstance(good, dict) and name == "params" else ():
            for text, value in [*BAD.items(), *bad_arrays(entry, good[entry])]:
                yield f"params[{entry!r}]", text, {**kwargs, name: {**good, entry: value}}


def arguments(function: Callable) -> dict[str, Any]:
    """Those of its signature, with their annotations."""
    made = inspect.signature(function.__init__ if isinstance(function, type) else function).parameters.values()
    return {p.name: p.annotation for p in made if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name != "self"}


def bad_arrays(name: str, good: Any) -> Iterator[tuple[str, Any]]:
    """Of a wrong rank (but x, which has any number of batch axes) and dtype; for what is no array, some array."""
    array = isinstance(good, jax.Array | np.ndarray) and good.ndim > 0
    like = np.asarray(good) if array else np.ones((2, 2, 2))
    if array:
        yield "no axes", like.reshape(-1)[0]
    if name != "x":
        yield "an axis more", like[None, None]
    yield "complex", like * (1 + 1j)
    yield "strings", like.astype(str)


def outcome(function: Callable, call: dict[str, Any], name: str) -> str:
    """ "refused", "taken", or what is wrong."""
    try:
        if isinstance(function, type) and issubclass(function, nnx.Module):
            fresh = lambda: {"rngs": nnx.Rngs(0)} if isinstance(call["rngs"], nnx.Rngs) else {}
            nnx.eval_shape(lambda: function(**{**call, **fresh()}))
        elif function in ZOO:
            jax.eval_shape(lambda: function(**call))
        else:
            function(**call)
    except (ValueError, TypeError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        if not last.startswith(HERE):
            return f"refused elsewhere, in {last}: {error}"
        known = re.sub(r"params\['(\w+)'\]", r"\1", name)
        return "refused" if re.search(rf"\b{known}\b", str(error)) else f"refused without its name: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


def means(function: Callable, name: str) -> tuple[str, ...]:
    """The values of an argument that mean something."""
    kept = ("'3'",) if name in KEPT and isinstance(function, type) else ()
    return kept + MEANS.get(f"{function.__name__}.{name}", MEANS.get(name, ()))


@pytest.mark.core(4)
@pytest.mark.parametrize("function", MENDED, ids=lambda function: function.__name__)
def test_a_bad_argument_is_refused_by_name(function):
    kwargs = CALLS[function]
    assert outcome(function, kwargs, "") == "taken", "the good call"
    wrong = []
    for name, text, call in bad_calls(function, kwargs):
        found = outcome(function, call, name)
        if found != ("taken" if text in means(function, name) else "refused"):
            wrong.append(f"{name} {text}: {found.partition(chr(10))[0]}")
    assert not set(wrong), f"{len(wrong)} calls: " + "; ".join(wrong)


def test_every_public_callable_is_here():
    """Networks of a usual size hand their arguments to the class, which is here."""
    usual = {name for name, value in vars(models).items() if inspect.isfunction(value)}
    public = {
        value
        for package in PACKAGES
        for name, value in vars(package).items()
        if callable(value)
        and not name.startswith("_")
        and getattr(value, "__module__", "").startswith(package.__name__)
    }
    assert {value.__name__ for value in public - set(CALLS)} - usual == UNCALLED
    assert {value.__name__ for value in CALLS} >= ELSEWHERE
