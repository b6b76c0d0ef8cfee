"""Where a layer that drops takes its key from."""

from typing import Any

from flax import nnx


def dropout_key(layer: Any, deterministic: bool | None, rngs: nnx.Rngs | nnx.RngStream | None) -> Any:
    """A key of the call's random stream, or else of the layer's own; None where nothing is dropped."""
    where = type(layer).__name__
    deterministic = layer.deterministic if deterministic is None else deterministic
    if layer.dropout_rate == 0.0 or deterministic:
        return None
    if deterministic is None:
        raise ValueError(
            f"{where}: with dropout_rate (={layer.dropout_rate}), deterministic must be given to the "
            "constructor or the call, or set by train() or eval(); got None"
        )
    stream = layer.rngs if rngs is None else rngs.dropout if isinstance(rngs, nnx.Rngs) else rngs
    if stream is not None and not isinstance(stream, nnx.RngStream):
        raise ValueError(f"{where}: rngs must be nnx.Rngs or one of its streams, got {type(rngs).__name__}")
    if stream is None:
        raise ValueError(f"{where}: with keep_rngs=False, a call that drops must be given rngs; got None")
    return stream()
