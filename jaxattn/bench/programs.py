"""A way made ready: compiled, its inputs on the device, to be called and waited for."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxattn.bench.torch_ways import device
from jaxattn.bench.ways import Function, Way, cannot_unless, optional

MODES = ("forward", "both")  # both: the output, and the gradients of sum(output · cotangent) by every input


class Program(NamedTuple):
    """`run()` computes and waits, and returns what `numpy` makes arrays of: the output and, in mode "both", gradients.

    Compile seconds and bytes of temporaries are None where the framework does not tell.
    """

    run: Callable[[], Any]
    numpy: Callable[[Any], list[np.ndarray]]
    compile_seconds: float | None = None
    temporaries: int | None = None


def make_program(way: Way, case, mode: str, inputs: Sequence, cotangent) -> Program:
    """Compiles the way's function of a case, and for mode "both" its derivative, from scratch."""
    function = way.make(case)
    build = {"jax": jax_program, "torch": torch_program}[way.framework]
    return build(function, mode, inputs, cotangent)


def jax_program(function: Function, mode: str, inputs, cotangent) -> Program:
    def forward(inputs, cotangent):
        return [function.call(*inputs)]

    def both(inputs, cotangent):
        output, pull = jax.vjp(function.call, *inputs)
        return [output, *pull(cotangent)]

    arguments = jax.device_put((list(inputs), cotangent))
    jax.clear_caches()  # what another program has traced or compiled does not count as this one's
    start = time.perf_counter()
    compiled = jax.jit(both if mode == "both" else forward).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return Program(
        lambda: jax.block_until_ready(compiled(*arguments)),
        lambda outputs: [np.asarray(x) for x in outputs],
        seconds,
        None if memory is None else memory.temp_size_in_bytes,
    )


def torch_program(function: Function, mode: str, inputs, cotangent) -> Program:
    torch = optional("torch")
    place = device(torch)

    def tensor(x, index: int) -> Any:
        dtype = getattr(torch, str(x.dtype))
        tensor = torch.from_numpy(np.array(x, np.float32)).to(place, dtype)
        return function.layout(index).enter(tensor).detach().requires_grad_(mode == "both")

    tensors = [tensor(x, index) for index, x in enumerate(inputs)]
    weights = tensor(cotangent, -1).detach()

    def run():
        if mode == "both":
            output = function.call(*tensors)
            outputs = [output, *torch.autograd.grad(output, tensors, weights)]
        else:
            with torch.no_grad():
                outputs = [function.call(*tensors)]
        if place == "cuda":
            torch.cuda.synchronize()
        return outputs

    def to_numpy(outputs) -> list[np.ndarray]:
        leave = [function.layout(index).leave for index in (-1, *range(len(inputs)))]
        return [f(x).detach().float().cpu().numpy() for f, x in zip(leave, outputs, strict=False)]

    cannot_unless(place == "cpu" or tensors[0].is_cuda, "torch sees no GPU")
    run()  # what is compiled is compiled now
    return Program(run, to_numpy)
