"""Convolution, attention, and everything between: train a network, evaluate a run, study, measure the speed."""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx

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
from jaxattn.train.config import Config, Options
from jaxattn.train.data import Dataset, load
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
        tyro.extras.subcommand_cli_from_dict(
            {"train": train_command(arguments), "eval": eval_run, "study": study, "bench": bench},
            prog="jaxattn",
            description=__doc__,
            args=arguments,
        )
    except loop.Stopped as stopped:
        print(f"jaxattn: {stopped}")
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


def train_run(config: Config, options: Options):
    """Trains what `config` says, as `options` say."""
    config.check()
    options.check()
    out, resume = options.out or default_folder(config), options.resume
    mesh = None if options.mesh is None else make_mesh(options.mesh)
    check_out(out, config, resume=resume, overwrite=options.overwrite)
    data = load(config.data, config.seed, config.skip_bad)
    if mesh is not None:
        check_batch(mesh, config.batch_size, data.image_shape)
    start_run(out, config, resume=resume, overwrite=options.overwrite)
    for image in data.skipped:
        print(f"left out: {image}", file=sys.stderr)
    how = {"resume": resume, "checkpoint_every": options.checkpoint_every, "mesh": mesh}
    if config.mix == "both":
        for mix in MIXERS:
            one = dataclasses.replace(config, mix=mix)
            start_run(out / mix, one, resume=resume)
            train_one(one, data, out / mix, **how)
        report(config, data, out)
        print(f"report: {out / 'report.html'}")
    else:
        train_one(config, data, out, **how)
        draw(config, data, out)
        print(f"run: {out}")


def train_one(config: Config, data: Dataset, folder: Path, **how: Any):
    """Trains one network into its folder, unless it is trained already, and prints its accuracy on the test images."""
    if not is_whole(folder):
        trained = loop.train(config, data, folder, **how)
        correct, total = evaluate.evaluate(trained.model, data, data.test), len(data.test)
        results = {
            "test_accuracy": correct / total,
            "test_correct": correct,
            "test_images": total,
            "parameters": evaluate.count_parameters(trained.model),
            "flops_per_image": evaluate.flops_per_image(trained.model, data),
            "train_images_per_second": float(np.median([epoch["images_per_second"] for epoch in trained.epochs])),
            "seconds": trained.seconds,
        }
        end_run(folder, results)
    results = read_results(folder)
    print(accuracy_line(config.mix, results["test_correct"], results["test_images"]), flush=True)


def draw(config: Config, data: Dataset, folder: Path) -> dict[str, Any]:
    """The figures of a run: how it learned, and what its first mixer looks like. They are saved in its folder too."""
    figures = look_inside(load_model(config, data, folder), data)
    save_figures(folder, figures | {"learning_curves": plots.learning_curves({config.mix: read_epochs(folder)})})
    return figures


def report(config: Config, data: Dataset, folder: Path):
    """Writes the report of two runs, one by convolution and one by local attention."""
    runs = {mix: folder / mix for mix in MIXERS}
    curves = {MIXERS[mix]: read_epochs(run) for mix, run in runs.items()}
    figures = {"learning_curves": plots.learning_curves(curves)}
    for mix, run in runs.items():
        figures |= draw(dataclasses.replace(config, mix=mix), data, run)
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


def study(
    claims: str | None = None,
    profile: Literal["quick", "full"] = "quick",
    seeds: int | None = None,
    data: str = "digits",
    out: Path = Path("runs/study"),
):
    """Is a CNN a kind of local self-attention? Each claim of that debate as an experiment, with a verdict.

    What was measured is kept in the folder, so that a study that was interrupted goes on.

    Args:
      claims: their numbers, as 5,10,21; all of them by default.
      profile: quick, or full with more seeds.
      seeds: how many; by default 3, and 5 in the full profile.
      data: the images, as in `jaxattn train`.
      out: a folder for report.html and report.json.
    """
    print(summary(run_study(claims, profile, seeds, data, out)))
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
