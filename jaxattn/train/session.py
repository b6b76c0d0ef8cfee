"""A training session, from its settings to the figures and the report: what `jaxattn train` and `jaxattn eval` do."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from jaxattn import plots
from jaxattn.errors import InputError
from jaxattn.files import path_of, reason
from jaxattn.measure import attention_maps, mean_by_offset
from jaxattn.models.resnet_blocks import GridMixer
from jaxattn.models.vit import ViT
from jaxattn.nn.attention import Attention
from jaxattn.nn.conv import Conv
from jaxattn.nn.quadratic import QuadraticAttention
from jaxattn.train import evaluate, loop
from jaxattn.train.augment import normalize
from jaxattn.train.build import build
from jaxattn.train.checkpoint import FOLDER as CHECKPOINTS
from jaxattn.train.checkpoint import check_handles, load_weights
from jaxattn.train.config import Config, Options
from jaxattn.train.data import Dataset, absolute, fingerprint, load
from jaxattn.train.distributed import is_main, joined
from jaxattn.train.finetune import learned
from jaxattn.train.fits import check_fits, check_weights
from jaxattn.train.lock import locked
from jaxattn.train.report import COMPARED, write_report
from jaxattn.train.run import (
    Source,
    Task,
    check_out,
    check_same,
    default_folder,
    end_run,
    identity,
    is_whole,
    read_config,
    read_epochs,
    read_results,
    read_source,
    start_run,
    write_source,
    write_task,
)
from jaxattn.train.sharding import check_batch, make_mesh
from jaxattn.window import Window

MEASURED = (
    "test_accuracy",
    "test_correct",
    "test_images",
    "parameters",
    "flops_per_image",
    "train_images_per_second",
    "seconds",
)  # of a network
MOST_CLASSES = 12  # that a figure shows, one a column
SIGNALLED = 128  # and a signal's number: the exit status of what that signal ended

# ======================================================================================================================
# Training


def train(config: Config, options: Options):
    """Trains what `config` says, as `options` say, alone or as one of several processes.

    Raises:
      SystemExit: SIGTERM or SIGINT stopped it, and all is saved; with 143 or 130, as a process that a signal ended.
    """
    config.check()
    options.check()
    if config.recipe == "finetune" and not config.weights:
        raise InputError("weights (='') must be a file for the recipe finetune, which begins with it")
    code = 0
    with joined(options.coordinator, options.processes, options.process):
        try:
            train_here(config, options)
        except loop.Stopped as stopped:
            say(f"jaxattn: {stopped}", file=sys.stderr)
            code = SIGNALLED + stopped.signal
    if code:
        sys.exit(code)


def train_here(config: Config, options: Options):
    """Trains in this process. The first of several writes the files and talks; the others compute."""
    out, resume = path_of(options.out or default_folder(config)), options.resume

    # What can be wrong is said before anything is written
    check_handles()
    mesh = make_mesh(options.mesh or "") if options.mesh is not None or jax.process_count() > 1 else None
    if is_main():
        check_out(out, config, resume=resume, overwrite=options.overwrite)
    with contextlib.ExitStack() as stack:
        if is_main():
            stack.enter_context(locked(out))
            check_out(out, config, resume=resume, overwrite=options.overwrite)  # now that nobody else changes it
        data = load(config.data, config.seed, config.skip_bad)
        digest = fingerprint(data)
        if is_main() and resume and (out / "config.json").is_file():
            check_same(out, config.data, digest)
        for one, folder in networks(config, out):
            check_fits(one, data)
            if not (resume and (folder / CHECKPOINTS).exists()):
                check_weights(one, data)
        if mesh is not None:
            check_batch(mesh, config.batch_size, data.image_shape)

        # The networks: one, or two that are compared, each in a folder of its own
        source = Source(absolute(config.data), digest)
        task = Task(data.image_shape, tuple(data.mean.tolist()), tuple(data.std.tolist()), data.class_names)
        if is_main():
            start_run(out, config, resume=resume, overwrite=options.overwrite)
            write_source(source, out)
            write_task(task, out)
        for image in data.skipped:
            say(f"left out: {image}", file=sys.stderr)
        models, done = {}, is_whole(out) and (out / "figures").is_dir()
        for one, folder in networks(config, out):
            if is_main() and folder != out:
                stack.enter_context(locked(folder))
                start_run(folder, one, resume=resume)
                write_source(source, folder)
                write_task(task, folder)
            how = {"resume": resume, "checkpoint_every": options.checkpoint_every, "mesh": mesh}
            models[one.mix] = train_one(one, data, folder, identity=identity(one, digest), **how)

        # The figures, and the report of a comparison
        if config.mix == "both":
            if is_main() and not done:
                report(config, data, out, models)
            say(f"report: {out / 'report.html'}")
        else:
            if is_main() and not done:
                draw(config, data, out, models[config.mix])
            say(f"run: {out}")


def networks(config: Config, out: Path) -> list[tuple[Config, Path]]:
    """The configuration of every network that a run trains, and the folder where it is."""
    if config.mix != "both":
        return [(config, out)]
    return [(dataclasses.replace(config, mix=mix), out / mix) for mix in COMPARED]


def train_one(config: Config, data: Dataset, folder: Path, **how: Any) -> nnx.Module:
    """Trains one network into its folder, unless it is trained already, and says its accuracy on the test images."""
    together(f"start {folder}")  # the folder is there now, for every process
    whole = is_whole(folder)
    together(f"seen {folder}")
    if whole:
        model = load_model(config, data.image_shape, len(data.class_names), folder)
    else:
        trained = loop.train(config, data, folder, **how)
        model = trained.model
        if is_main():
            end_run(folder, measure(trained, data))
    if is_main():
        results = read_results(folder, *MEASURED)
        say(accuracy_line(config.label, results["test_correct"], results["test_images"]))
    return model


def measure(trained: loop.Trained, data: Dataset) -> dict[str, Any]:
    """What results.json says of a network."""
    model, total = trained.model, len(data.test)
    correct = evaluate.evaluate(model, data, data.test)
    return {
        "test_accuracy": correct / total,
        "test_correct": correct,
        "test_images": total,
        "parameters": evaluate.count_parameters(model),
        "flops_per_image": evaluate.flops_per_image(model, data),
        "train_images_per_second": float(np.median([epoch["images_per_second"] for epoch in trained.epochs])),
        "seconds": trained.seconds,
    }


# ======================================================================================================================
# Figures and the report


def draw(config: Config, data: Dataset, folder: Path, model: nnx.Module) -> dict[str, Any]:
    """The figures of a run: how it learned, and what its first mixer looks like. They are saved in its folder too."""
    figures = {}
    with at_no_cost(folder):
        save_figures(folder, {"learning_curves": plots.learning_curves({config.label: read_epochs(folder)})})
    with at_no_cost(folder):
        figures = look_inside(model, data)
        save_figures(folder, figures)
    return figures


@contextlib.contextmanager
def at_no_cost(folder: Path) -> Iterator[None]:
    """Figures are drawn when all else is written: one that fails costs nothing but itself."""
    try:
        yield
    except Exception as error:
        say(f"jaxattn: {folder}: a figure could not be drawn: {reason(error)}", file=sys.stderr)


def look_inside(model: nnx.Module, data: Dataset) -> dict[str, Any]:
    """Figures of the first mixer: the kernels of its convolution, or where the heads of its attention look."""
    if isinstance(model, ViT):
        # of a transformer, where its quadratic heads look
        quadratic = any(isinstance(layer, QuadraticAttention) for _, layer in nnx.iter_modules(model))
        return {"head_centers": plots.head_centers_on_grid(model.centers(), model.spreads())} if quadratic else {}
    mixers = [(path, mixer) for path, mixer in nnx.iter_modules(model) if isinstance(mixer, GridMixer)]
    if not mixers:
        return {}
    path, mixer = mixers[0]
    match mixer.layer:
        case Conv() as conv:
            return {"kernels": plots.kernels(np.asarray(conv.kernel[...]))}
        case Attention(window=Window() as window):
            return look_from(model, (*path, "layer"), window, data)
    return {}


def look_from(model: nnx.Module, path: tuple, window: Window, data: Dataset) -> dict[str, Any]:
    """Figures of where the heads of the attention at `path` look: from a pixel of some images, and in the mean."""
    # one test image of each class, as many as there is room for, and others for the mean
    images, labels = data.test.fetch(np.arange(min(len(data.test), 2000)))
    first = np.unique(labels, return_index=True)[1][:MOST_CLASSES]
    images = np.asarray(normalize(np.concatenate([images[first], images[:200]]), data.mean, data.std))
    weights = evaluate.attention_weights(model, images, path)  # [images, *grid, heads, slots]
    grid = weights.shape[1:3]
    indices = window.indices(grid)
    pictures = images[: len(first)].mean(-1)
    brightest = [np.unravel_index(picture.argmax(), picture.shape) for picture in pictures]
    queries = np.array(brightest) * grid // pictures.shape[1:]
    maps = [attention_maps(weights[n], indices, grid)[tuple(query)] for n, query in enumerate(queries)]
    names = [data.class_names[label] for label in labels[first]]
    names = [
        name if plots.can_be_drawn(name) else f"class {label}" for name, label in zip(names, labels[first], strict=True)
    ]
    return {
        "attention_maps": plots.attention_maps(pictures, queries, np.stack(maps), names),
        "mean_attention": plots.mean_attention(*mean_by_offset(weights[len(first) :], indices)),
    }


def report(config: Config, data: Dataset, folder: Path, models: Mapping[str, nnx.Module]):
    """Writes the results and the report of two runs, one by convolution and one by local attention."""
    runs = {one.mix: run for one, run in networks(config, folder)}
    results = {mix: read_results(run, *MEASURED) for mix, run in runs.items()}
    end_run(folder, results)
    figures: dict[str, Any] = {}
    pictures: dict[str, str] = {}
    with at_no_cost(folder):
        figures["learning_curves"] = plots.learning_curves(
            {COMPARED[mix]: read_epochs(run) for mix, run in runs.items()}
        )
    for mix, run in runs.items():
        figures |= draw(dataclasses.replace(config, mix=mix), data, run, models[mix])
    for name, figure in figures.items():
        with at_no_cost(folder):
            pictures[name] = plots.inline_svg(figure, name)
    write_report(folder / "report.html", config, data, results, pictures)
    with at_no_cost(folder):
        save_figures(folder, figures)


def save_figures(folder: Path, figures: Mapping[str, Any]):
    """Writes each figure as `folder/figures/NAME.png`."""
    (folder / "figures").mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / "figures" / f"{name}.png", dpi=160, facecolor="white")


# ======================================================================================================================
# Evaluation


def evaluate_run(run: Path, name: str | None = None):
    """Prints the accuracy of each network of a run on the test images, as its training did.

    Args:
      run: its folder.
      name: of its data, where they were moved; by default what the run was started with, from whatever folder.
    """
    config, source = read_config(run), read_source(run)
    if name and source is None:
        raise InputError(f"data (={name!r}) must not be given: the run in {run} did not keep what its data were")
    name = name or (source.absolute if source else config.data)
    data = load(name, config.seed, config.skip_bad)
    check_same(run, name, fingerprint(data))
    for _, folder in networks(config, run):
        one = read_config(folder)
        model = load_model(one, data.image_shape, len(data.class_names), folder)
        correct = evaluate.evaluate(model, data, data.test)
        print(accuracy_line(one.label, correct, len(data.test)))


def load_model(config: Config, image_shape: tuple[int, ...], classes: int, folder: Path) -> nnx.Module:
    """The network of a run, as it ended."""
    model = build(config, image_shape, classes)
    load_weights(folder, model, "last", learned(config, model))
    return model


def accuracy_line(label: str, correct: int, total: int) -> str:
    """What `train` and `eval` print."""
    return f"{label}: test accuracy {correct / total:.2%} ({correct} of {total})"


# ======================================================================================================================
# Several processes


def say(text: str, file: Any = None):
    """Prints, if this is the first process."""
    if is_main():
        print(text, file=file, flush=True)


def together(what: str):
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
