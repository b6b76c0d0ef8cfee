"""A small network for handwritten digits."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Num

from jaxattn.checked import checked
from jaxattn.models.translation import Rule, Translation
from jaxattn.nn.conv import Conv

PACKAGED = Translation(
    "digit-recognizer-py",
    {
        "conv1": "conv_layers.0",
        "conv2": "conv_layers.3",
        "conv3": "conv_layers.6",
        # PyTorch flattens channels first
        "hidden": Rule("fc_layers.0", {"kernel": "h w i o -> o (i h w)"}),
        "classifier": "fc_layers.2",
    },
    head="classifier",
)


class DigitNet(nnx.Module):
    """Three 3 × 3 convolutions, each followed by relu and a 2 × 2 maximum, and two linear layers: 28 × 28 pixels to ten
    logits, in the manner of LeNet (LeCun et al. 1998).

    Args:
      dtype: of the computation.
      param_dtype: of the parameters.
      rngs: `nnx.Rngs`; `params` is used.

    Raises:
      ValueError: images whose shape does not fit.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> nnx.eval_shape(lambda x: DigitNet(rngs=nnx.Rngs(0))(x), jnp.ones((2, 28, 28, 1))).shape
    (2, 10)
    """

    translations = (PACKAGED,)

    @checked
    def __init__(self, *, dtype: DTypeLike | None = None, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv1 = Conv(1, 32, (3, 3), **kwargs)
        self.conv2 = Conv(32, 64, (3, 3), **kwargs)
        self.conv3 = Conv(64, 128, (3, 3), **kwargs)
        # over all that three maxima leave of the grid
        self.hidden = nnx.LinearGeneral((3, 3, 128), 256, axis=(-3, -2, -1), **kwargs)
        self.classifier = nnx.Linear(256, 10, **kwargs)

    def __call__(self, images: Num[ArrayLike, "..."]) -> Float[Array, "*batch classes"]:
        """Logits of `images` `[*batch, 28, 28, 1]`."""
        x = jnp.asarray(images)
        if x.shape[-3:] != (28, 28, 1):
            raise ValueError(f"DigitNet: images (={x.shape}) must be [*batch, 28, 28, 1]")
        for conv in (self.conv1, self.conv2, self.conv3):
            x = nnx.max_pool(jax.nn.relu(conv(x)), (2, 2), (2, 2))
        return self.classifier(jax.nn.relu(self.hidden(x)))
