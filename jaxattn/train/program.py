"""A configuration as pure functions of arrays, for one device or a mesh: what the loop runs and `compile` compiles."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxattn.train import finetune
from jaxattn.train.build import build
from jaxattn.train.config import Config
from jaxattn.train.data import Dataset
from jaxattn.train.evaluate import make_predict
from jaxattn.train.optimizer import make_optimizer
from jaxattn.train.sharding import (
    batch_sharding,
    check_batch,
    on_mesh,
    sharded,
    sharded_predict,
    state_shardings,
    weight_specs,
)
from jaxattn.train.step import State, init_state, make_loss, make_step

FED = ("image", "label")  # what a step takes of a batch


class Program(NamedTuple):
    """Training and prediction, split once into structure and arrays.

    Args:
      step: (state, batch) -> state, metrics, jitted, in the memory of the state that it is given.
      predict: (weights, rest, images) -> classes, jitted.
      state: the untrained one, as `jax.ShapeDtypeStruct`s that know where they lie on the mesh.
      init: (filled=True) -> the state before the first step; filled with the weights of the file that the settings
        name, if they name one.
      place: a batch, or this process's part of it, to where the step wants it.
      gather: arrays of the state, whole, on every process.
    """

    step: jax.stages.Wrapped
    predict: jax.stages.Wrapped
    state: State
    init: Callable[..., State]
    place: Callable[[Mapping[str, Any]], dict[str, Any]]
    gather: Callable[[Any], Any]


def assemble(config: Config, data: Dataset, steps: int, mesh: Mesh | None = None) -> Program:
    """The program of a configuration.

    Args:
      config: of the run.
      data: what it is trained on; of its images, only the shape, mean and deviation matter here.
      steps: of the whole run.
      mesh: of `make_mesh`; None for one device.

    Raises:
      ValueError: a batch or images that the mesh does not divide, a layer that it cannot split.
    """
    make = lambda: build(config, data.image_shape, len(data.class_names))
    model, optimizer = nnx.eval_shape(make), make_optimizer(config, steps)
    learned = finetune.learned(config, model)
    state = jax.eval_shape(lambda: init_state(config, make(), optimizer, learned))
    if mesh is not None:
        check_batch(mesh, config.batch_size, data.image_shape)
        on_mesh(model, mesh)
    model.eval()
    predict = make_predict(nnx.graphdef(model), data)
    model.train()
    finetune.freeze(config, model)
    loss_fn = make_loss(nnx.graphdef(model), config, learned)

    def init(filled: bool = True) -> State:
        model = make()
        if filled:
            finetune.fill(config, model)
        return init_state(config, model, optimizer, learned)

    if mesh is None:
        return Program(
            step=jax.jit(make_step(config, data, loss_fn, optimizer), donate_argnums=0),
            predict=jax.jit(predict),
            state=state,
            init=init,
            place=lambda batch: {name: batch[name] for name in FED},
            gather=lambda arrays: arrays,
        )
    specs, lies, everywhere = (
        weight_specs(mesh, state.weights),
        batch_sharding(mesh),
        NamedSharding(mesh, PartitionSpec()),
    )
    shardings = state_shardings(mesh, state)
    step = make_step(config, data, sharded(loss_fn, mesh, specs), optimizer)
    return Program(
        step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere)),
        predict=jax.jit(sharded_predict(predict, mesh, specs), out_shardings=everywhere),
        state=jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, shardings),
        init=lambda filled=True: jax.device_put(init(filled), shardings),
        place=lambda batch: {name: jax.make_array_from_process_local_data(lies[name], batch[name]) for name in FED},
        gather=lambda arrays: jax.device_get(jax.jit(lambda x: x, out_shardings=everywhere)(arrays)),
    )
