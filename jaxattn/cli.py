"""Convolution, attention, and everything between: train a network, evaluate a run, study, measure the speed."""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from jaxattn import plots
from jaxattn.bench.run import run as run_benchmark
from jaxattn.measure import attention_maps, mean_by_offset
from jaxattn.models.resnet import Mixer
from jaxattn.models.vit import ViT
from jaxattn.nn.conv import Conv
from jaxattn.nn.quadratic import QuadraticAttention
from jaxattn.study.run import study as run_study
from jaxattn.study.run import summary
from jaxattn.train import evaluate, loop
from jaxattn.train.augment import normalise
from jaxattn.train.build import build
from jaxattn.train.checkpoint import load_weights
from jaxattn.train.compile import describe, plan
from jaxattn.train.compile import write_report as write_json_report
from jaxattn.train.config import Config, Options
from jaxattn.train.data import Dataset, load
from jaxattn.train.distributed import is_main, joined
from jaxattn.train.extras import InputError, needs_extra
from jaxattn.train.recipes import recipe
from jaxattn.train.report import MIXERS, write_report
from jaxattn.train.run import (
    check_out,
    default_folder,
    end_run,
    is_whole,
    read_config,
    read_epochs,
    read_results,
    start_run,
)
from jaxattn.train.sharding import check_batch, make_mesh

with needs_extra("train"):
    import tyro
    from tyro.conf import OmitArgPrefixes, Positional


def main(arguments: Sequence[str] | None = None):
    """Runs the command that `arguments` give, by default the process's own."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax shows the traceback of what is reported below
    try:
        commands = {
            "train": train_command(arguments),
            "eval": eval_run,
            "study": study,
            "bench": bench,
            "compile": compile_command(arguments),
        }
        tyro.extras.subcommand_cli_from_dict(commands, prog="jaxattn", description=__doc__, args=arguments)
    except InputError as error:
        sys.exit(f"jaxattn: {error}")
    except KeyboardInterrupt:
        sys.exit("jaxattn: interrupted")


def train_command(arguments: Sequence[str]) -> Callable:
    """`train`, whose settings default to the recipe that the arguments name, or to the run that is to go on."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("recipe", "data", "out"):
        peek.add_argument(f"--{name}")
    peek.add_argument("--resume", action="store_true")
    given, _ = peek.parse_known_args(arguments)
    goes_on = given.resume and given.out and (Path(given.out) / "config.json").is_file()
    default = read_config(Path(given.out)) if goes_on else recipe(given.recipe, given.data)

    def train(config: OmitArgPrefixes[Config] = default, options: OmitArgPrefixes[Options] = Options()):  # noqa: B008
        """Train a network; with no arguments, a small one twice, by convolution and by attention, with a report."""
        train_run(config, options)

    return train


def compile_command(arguments: Sequence[str]) -> Callable:
    """`compile`, whose settings default to the recipe that the arguments name."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--recipe")
    default = recipe(peek.parse_known_args(arguments)[0].recipe, None)

    def compile(
        config: OmitArgPrefixes[Config] = default,
        topology: str = "v5e:4x4",
        mesh: str = "",
        image_shape: tuple[int, ...] = (224, 224, 3),
        classes: int = 1000,
        json: Path | None = None,
    ):
        """Compile a training step for a machine that need not be there: its memory, operations and collectives.

        Args:
          config: what would be trained; the data need not be there either.
          topology: v4, v5e, v5p or v6e and its shape, such as v5e:16x16 (this needs libtpu), or cpu:N.
          mesh: as in `train`; by default the batch is split over all devices.
          image_shape: height, width and channels of the images; or depth before them, for `volume_small`.
          classes: their number.
          json: a file for the same figures.
        """
        report = plan(config, topology, mesh, image_shape, classes)
        print(describe(report))
        if json is not None:
            write_json_report(report, json)

    return compile


def train_run(config: Config, options: Options):
    """Trains what `config` says, as `options` say, alone or as one of several processes."""
    config.check()
    options.check()
    with joined(options.coordinator, options.processes, options.process):
        try:
            train_here(config, options)
        except loop.Stopped as stopped:
            say(f"jaxattn: {stopped}")


def train_here(config: Config, options: Options):
    """Trains in this process. The first of several writes the files and talks; the others compute."""
    out, resume = options.out or default_folder(config), options.resume
    mesh = make_mesh(options.mesh or "") if options.mesh is not None or jax.process_count() > 1 else None
    if is_main():
        check_out(out, config, resume=resume, overwrite=options.overwrite)
    data = load(config.data, config.seed, config.skip_bad)
    if mesh is not None:
        check_batch(mesh, config.batch_size, data.image_shape)
    if is_main():
        start_run(out, config, resume=resume, overwrite=options.overwrite)
    for image in data.skipped:
        say(f"left out: {image}", file=sys.stderr)
    how = {"resume": resume, "checkpoint_every": options.checkpoint_every, "mesh": mesh}
    if config.mix != "both":
        model = train_one(config, data, out, **how)
        if is_main():
            draw(config, data, out, model)
        say(f"run: {out}")
        return
    models = {}
    for mix in MIXERS:
        one = dataclasses.replace(config, mix=mix)
        if is_main():
            start_run(out / mix, one, resume=resume)
        models[mix] = train_one(one, data, out / mix, **how)
    if is_main():
        report(config, data, out, models)
    say(f"report: {out / 'report.html'}")


def train_one(config: Config, data: Dataset, folder: Path, **how: Any) -> nnx.Module:
    """Trains one network into its folder, unless it is trained already, and says its accuracy on the test images."""
    together(f"start {folder}")  # the folder is there now, for every process
    whole = is_whole(folder)
    together(f"seen {folder}")
    if whole:
        model = load_model(config, data, folder)
    else:
        trained = loop.train(config, data, folder, **how)
        model = trained.model
        if is_main():
            end_run(folder, measure(trained, data))
    if is_main():
        results = read_results(folder)
        say(accuracy_line(config.mix, results["test_correct"], results["test_images"]))
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


def draw(config: Config, data: Dataset, folder: Path, model: nnx.Module) -> dict[str, Any]:
    """The figures of a run: how it learned, and what its first mixer looks like. They are saved in its folder too."""
    figures = look_inside(model, data)
    save_figures(folder, figures | {"learning_curves": plots.learning_curves({config.mix: read_epochs(folder)})})
    return figures


def report(config: Config, data: Dataset, folder: Path, models: Mapping[str, nnx.Module]):
    """Writes the report of two runs, one by convolution and one by local attention."""
    runs = {mix: folder / mix for mix in MIXERS}
    curves = {MIXERS[mix]: read_epochs(run) for mix, run in runs.items()}
    figures = {"learning_curves": plots.learning_curves(curves)}
    for mix, run in runs.items():
        figures |= draw(dataclasses.replace(config, mix=mix), data, run, models[mix])
    save_figures(folder, figures)
    pictures = {name: plots.inline_svg(figure, name) for name, figure in figures.items()}
    results = {mix: read_results(run) for mix, run in runs.items()}
    write_report(folder / "report.html", config, data, results, pictures)
    end_run(folder, results)


def load_model(config: Config, data: Dataset, folder: Path) -> nnx.Module:
    """The network of a run, as it ended."""
    model = build(config, data.image_shape, len(data.class_names))
    load_weights(folder, model, "last")
    return model


def eval_run(run: Positional[Path]):
    """Evaluate a run on its test images: the accuracy that its training printed.

    Args:
      run: a folder that `jaxattn train` wrote.
    """
    both = read_config(run).mix == "both"
    for folder in [run / mix for mix in MIXERS] if both else [run]:
        config = read_config(folder)
        data = load(config.data, config.seed, config.skip_bad)
        correct = evaluate.evaluate(load_model(config, data, folder), data, data.test)
        print(accuracy_line(config.mix, correct, len(data.test)))


def bench(
    what: Positional[Literal["attention", "conv", "all"]],
    quick: bool = False,
    cases: tuple[str, ...] = (),
    json: Path | None = None,
    out: Path = Path("runs/bench"),
):
    """Measure this library against its peers: time, temporaries and compile time, in one run.

    Peers that are not installed (torch, NATTEN) are left out; `taskset -c 0,1 jaxattn bench ...` chooses the cores.

    Args:
      what: which cases.
      quick: small shapes and few rounds, to see that everything works; the numbers say little.
      cases: names of cases, in which * stands for anything; all of them by default.
      json: a file for everything that was measured; it grows with every case.
      out: a folder for the figures, which replace those of an earlier run.
    """
    run_benchmark(what, quick, cases, out, json)


def say(text: str, file: TextIO | None = None):
    """Prints, if this is the first process."""
    if is_main():
        print(text, file=file, flush=True)


def together(what: str):
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def study(
    claims: str | None = None,
    profile: Literal["quick", "full"] = "quick",
    seeds: int | None = None,
    data: str = "digits",
    out: Path = Path("runs/study"),
    jobs: int | None = None,
):
    """Is a CNN a kind of local self-attention? Each claim of that debate as an experiment, with a verdict.

    What was measured is kept in the folder, so that a study that was interrupted goes on.

    Args:
      claims: their numbers, as 5,10,21; all of them by default.
      profile: quick, or full, of larger networks and more seeds.
      seeds: how many; by default 3, and 5 in the full profile. Where networks are compared, one decides nothing.
      data: the images, as in `jaxattn train`.
      out: a folder for report.html, report.json and verdicts.md.
      jobs: how many processes; by default as many as there are cores, and one on an accelerator.
    """
    print(summary(run_study(claims, profile, seeds, data, out, jobs)))
    print(f"report: {out / 'report.html'}")


def accuracy_line(mix: str, correct: int, total: int) -> str:
    """What `train` and `eval` print."""
    return f"{mix}: test accuracy {correct / total:.2%} ({correct} of {total})"


def look_inside(model: nnx.Module, data: Dataset) -> dict[str, Any]:
    """Figures of the first mixer: the kernels of its convolution, or where the heads of its attention look."""
    if isinstance(model, ViT):
        # of a transformer, where its quadratic heads look
        quadratic = any(isinstance(layer, QuadraticAttention) for _, layer in nnx.iter_modules(model))
        return {"head_centers": plots.head_centers_on_grid(model.centers(), model.spreads())} if quadratic else {}
    path, layer = next((path, mixer.layer) for path, mixer in nnx.iter_modules(model) if isinstance(mixer, Mixer))
    if isinstance(layer, Conv):
        return {"kernels": plots.kernels(np.asarray(layer.kernel[...]))}
    # one test image of each class, and others for the mean
    images, labels = data.test.fetch(np.arange(min(len(data.test), 2000)))
    first = np.unique(labels, return_index=True)[1]
    images = np.asarray(normalise(np.concatenate([images[first], images[:200]]), data.mean, data.std))
    weights = evaluate.attention_weights(model, images, (*path, "layer"))  # [images, *grid, heads, slots]
    grid = weights.shape[1:3]
    indices = layer.window.indices(grid)  # pyright: ignore[reportOptionalMemberAccess]  a mixer's attention has a window
    pictures = images[: len(first)].mean(-1)
    brightest = [np.unravel_index(picture.argmax(), picture.shape) for picture in pictures]
    queries = np.array(brightest) * grid // pictures.shape[1:]
    maps = [attention_maps(weights[n], indices, grid)[tuple(query)] for n, query in enumerate(queries)]
    names = [data.class_names[label] for label in labels[first]]
    return {
        "attention_maps": plots.attention_maps(pictures, queries, np.stack(maps), names),
        "mean_attention": plots.mean_attention(*mean_by_offset(weights[len(first) :], indices)),
    }


def save_figures(folder: Path, figures: Mapping[str, Any]):
    """Writes each figure as `folder/figures/NAME.png`."""
    (folder / "figures").mkdir(exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / "figures" / f"{name}.png", dpi=160, facecolor="white")
