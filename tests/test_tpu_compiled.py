"""The TPU's kernels, through the TPU's own compiler: what is interpreted rightly may still be refused by it."""

import importlib.util
import os
import subprocess
import sys

import pytest

COMPILED = """
import re
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
import jaxattn
from jaxattn.kernels.tpu import plan
from jaxattn.train.compile import find_devices

one = SingleDeviceSharding(find_devices("v5e:1x1")[0])
EVERYTHING = ("bias", "mask", "segments", "extra", "cap", "lse")

def compile(grid, given, names=EVERYTHING, dtype=jnp.bfloat16, heads=4, key_heads=2, dim=64, tables=0, **settings):
    window = jaxattn.Window(**given)
    of = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=one)
    queries, offsets = window.query_grid(grid), [2 * k - 1 for k in window.sizes]
    tokens = of(2, *grid, key_heads, dim)
    arrays = dict(query=of(2, *queries, heads, dim), key=tokens, value=tokens)
    if "bias" in names:
        arrays["relative_bias"] = of(heads, *offsets)
    if "extra" in names:
        arrays |= {f"extra_{name}": of(2, 3, key_heads, dim) for name in ("key", "value")}
    fixed = {"mask": of(2, *grid, dtype=bool)} if "mask" in names else {}
    if "segments" in names:
        fixed["segment_ids"] = of(2, *queries, dtype=jnp.int32), of(2, *grid, dtype=jnp.int32)
    if "shared" in names:
        fixed["segment_ids"] = of(*queries, dtype=jnp.int32), of(*grid, dtype=jnp.int32)
    settings |= dict(window=window, implementation="tpu", return_residuals="lse" in names)
    settings |= dict(logits_soft_cap=30.0) if "cap" in names else {}

    def loss(arrays, fixed):
        found = jaxattn.attention(**arrays, **fixed, **settings)
        return sum((x.astype(jnp.float32) ** 2).sum() for x in jax.tree.leaves(found))

    with jaxattn.traced_for("tpu", 1):
        compiled = jax.jit(jax.grad(loss)).trace(arrays, fixed).lower(lowering_platforms=("tpu",)).compile()
    text = compiled.as_text()
    assert len(re.findall(r"%score_table[_a-z.\\d]* = ", text)) == tables, (grid, given)
    assert text.count('custom_call_target="tpu_custom_call"') == 2 + tables, (grid, given)
    print("compiled", grid, given, flush=True)

compile((64,), dict(size=9, causal=True, boundary="mask"))
compile((64,), dict(size=9), names=(), heads=2)
compile((64,), dict(size=9, boundary="wrap", dilation=2), dtype=jnp.float32)
compile((15, 17), dict(size=(3, 5), dilation=(2, 1)), names=("lse",), dtype=jnp.float32, dim=32)
compile((16, 16), dict(size=(4, 4), block=4, boundary="zero"), dim=32)
compile((7, 28), dict(size=(7, 7), block=7), names=("bias", "lse"), dim=32, tables=3)
compile((16, 16), dict(size=(7, 7)), names=("bias",), dim=32, tables=2)
compile((8, 16), dict(size=(3, 3), stride=2, boundary="mask"), names=("mask",), dim=256, tables=2)
compile((2, 4, 16), dict(size=(1, 3, 3)), names=("cap", "extra"), dim=128)
compile((15, 17), dict(size=(3, 5), dilation=(2, 3), boundary="reflect"), names=("lse", "segments"))
compile((300,), dict(size=9, boundary="edge", dilation=2), names=("mask",))
compile((4, 6, 14), dict(size=(3, 3, 3), dilation=(1, 1, 2), boundary=("edge", "zero", "wrap")), names=("lse",))

compile((16, 48), dict(size=(5, 5), dilation=2), names=("bias",), dim=32, tables=2)  # rows of more than 16 keys
compile((16, 64), dict(size=(3, 9)), names=("bias",), dim=32, tables=2, tile=(4, 16))  # and of more than 18
compile((16, 80), dict(size=(3, 21), stride=(1, 20)), names=("bias",), dim=32)  # steps of 20
compile((14, 14), dict(size=(7, 7), block=7), names=("bias",), heads=2, dim=32, tables=2)  # half of the lanes
compile((14, 14), dict(size=(3, 3), boundary="wrap"), ("bias", "mask", "extra", "cap"), heads=3, key_heads=3, dim=32)
compile((14, 14), dict(size=(3, 3), dilation=2), ("mask", "segments"), jnp.float32, heads=1, key_heads=1, dim=32)
heads = dict(heads=6, key_heads=6)  # which leave half a block empty
compile((14, 28), dict(size=(7, 7), block=7), names=("bias",), dim=32, tables=2, **heads)
compile((15, 17), dict(size=(3, 5), boundary="wrap", dilation=(2, 1)), ("lse", "bias"), dim=20, tables=2, **heads)
compile((16, 16), dict(size=(5, 5)), names=("bias",), dim=16, heads=8, key_heads=8, tables=2)
compile((9, 128), dict(size=(3, 3)), names=(), dim=16, heads=8, key_heads=8, tile=(1, 128))  # heads apart

plan.VMEM["v5e"] = 12 * plan.MIB  # strips of the first axis
compile((24, 64), dict(size=(7, 7), boundary="mask"), names=("mask", "segments", "extra", "cap", "lse"))
compile((24, 50), dict(size=(5, 3), boundary="wrap", dilation=(2, 1)), names=("mask", "lse"))
compile((24, 64), dict(size=(7, 7), boundary="mask"), names=("mask",), heads=3, key_heads=3, dim=32, tables=1)
compile((24, 64), dict(size=(7, 7), boundary="mask"), names=("shared",), tables=2)
plan.VMEM["v5e"] = 48 * plan.MIB
compile((8, 24, 30), dict(size=(3, 3, 3)), names=("bias",), dtype=jnp.float32)
"""


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is not installed")
def test_the_compiler_takes_them():
    """In a process of its own, for libtpu ends the one whose XLA_FLAGS it does not know."""
    environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("compiled") == 27
