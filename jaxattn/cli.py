"""Convolution, attention, and everything between: train a network, evaluate a run, measure the speed."""

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from flax import nnx

from jaxattn import plots
from jaxattn.bench.run import run as run_benchmark
from jaxattn.measure import attention_maps, mean_by_offset
from jaxattn.models.resnet import Mixer
from jaxattn.nn.conv import Conv
from jaxattn.train import evaluate, loop
from jaxattn.train.checkpoint import load_checkpoint, save_checkpoint
from jaxattn.train.config import Config
from jaxattn.train.data import Dataset, load
from jaxattn.train.extras import InputError, needs_extra
from jaxattn.train.report import MIXERS, write_report
from jaxattn.train.run import default_folder, new_run, read_config, write_config, write_json

with needs_extra("train"):
    import tyro
    from tyro.conf import OmitArgPrefixes, Positional


class Trained(NamedTuple):
    """What a report says of one run."""

    epochs: list[dict]
    results: dict[str, Any]
    figures: dict[str, Any]


def main(arguments: Sequence[str] | None = None):
    """Runs the command that `arguments` give, by default the process's own."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"train": train, "eval": eval_run, "bench": bench}, prog="jaxattn", description=__doc__, args=arguments
        )
    except InputError as error:
        sys.exit(f"jaxattn: {error}")
    except KeyboardInterrupt:
        sys.exit("jaxattn: interrupted")


def train(config: OmitArgPrefixes[Config], out: Path | None = None, overwrite: bool = False):
    """Train a network; with no arguments, a small one twice, by convolution and by local attention, with a report.

    Args:
      config: what is trained.
      out: the folder of the run; by default one under runs/, named after data, network, mix and seed.
      overwrite: replace the run that `out` holds.
    """
    config.check()
    out = out or default_folder(config)
    with new_run(out, overwrite) as folder:
        data = load(config.data, config.seed)
        if config.mix == "both":
            train_both(config, data, folder)
        else:
            train_one(config, data, folder)
    print(f"report: {out / 'report.html'}" if config.mix == "both" else f"run: {out}")


def train_one(config: Config, data: Dataset, folder: Path) -> Trained:
    """Trains one network and writes its run into `folder`."""
    folder.mkdir(exist_ok=True)
    write_config(config, folder)
    start, epochs = time.perf_counter(), []
    with open(folder / "metrics.jsonl", "w") as lines:

        def log(epoch: dict):
            epochs.append(epoch)
            lines.write(json.dumps(epoch) + "\n")
            lines.flush()

        model = loop.train(config, data, log)
    seconds = time.perf_counter() - start
    correct, total = evaluate.evaluate(model, data.test_images, data.test_labels), len(data.test_labels)
    print(accuracy_line(config.mix, correct, total), flush=True)
    results = {
        "test_accuracy": correct / total,
        "test_correct": correct,
        "test_images": total,
        "parameters": evaluate.count_parameters(model),
        "flops_per_image": evaluate.flops_per_image(model, data.test_images[0]),
        "train_images_per_second": float(np.median([epoch["images_per_second"] for epoch in epochs])),
        "seconds": seconds,
    }
    write_json(folder / "results.json", results)
    save_checkpoint(folder, model)
    figures = look_inside(model, data)
    save_figures(folder, figures | {"learning_curves": plots.learning_curves({MIXERS[config.mix]: epochs})})
    return Trained(epochs, results, figures)


def train_both(config: Config, data: Dataset, folder: Path):
    """Trains by convolution and by local attention, into a folder each, and writes the report of both."""
    write_config(config, folder)
    runs = {mix: train_one(dataclasses.replace(config, mix=mix), data, folder / mix) for mix in MIXERS}
    figures = {"learning_curves": plots.learning_curves({MIXERS[mix]: run.epochs for mix, run in runs.items()})}
    for run in runs.values():
        figures |= run.figures
    save_figures(folder, figures)
    pictures = {name: plots.inline_svg(figure, name) for name, figure in figures.items()}
    write_report(folder / "report.html", config, data, {mix: run.results for mix, run in runs.items()}, pictures)


def eval_run(run: Positional[Path]):
    """Evaluate a run on its test images: the accuracy that its training printed.

    Args:
      run: a folder that `jaxattn train` wrote.
    """
    both = read_config(run).mix == "both"
    for folder in [run / mix for mix in MIXERS] if both else [run]:
        config = read_config(folder)
        data = load(config.data, config.seed)
        model = loop.build(config, data)
        load_checkpoint(folder, model)
        correct = evaluate.evaluate(model, data.test_images, data.test_labels)
        print(accuracy_line(config.mix, correct, len(data.test_labels)))


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


def accuracy_line(mix: str, correct: int, total: int) -> str:
    """What `train` and `eval` print."""
    return f"{mix}: test accuracy {correct / total:.2%} ({correct} of {total})"


def look_inside(model: nnx.Module, data: Dataset) -> dict[str, Any]:
    """Figures of the first mixer: the kernels of its convolution, or where the heads of its attention look."""
    path, layer = next((path, mixer.layer) for path, mixer in nnx.iter_modules(model) if isinstance(mixer, Mixer))
    if isinstance(layer, Conv):
        return {"kernels": plots.kernels(np.asarray(layer.kernel[...]))}
    # one test image of each class, and others for the mean
    first = [int(np.argmax(data.test_labels == label)) for label in range(len(data.class_names))]
    images = np.concatenate([data.test_images[first], data.test_images[:200]])
    weights = evaluate.attention_weights(model, images, (*path, "layer"))  # [images, *grid, heads, slots]
    grid = weights.shape[1:3]
    indices = layer.window.indices(grid)  # pyright: ignore[reportOptionalMemberAccess]  a mixer's attention has a window
    pictures = images[: len(first)].mean(-1)
    brightest = [np.unravel_index(picture.argmax(), picture.shape) for picture in pictures]
    queries = np.array(brightest) * grid // pictures.shape[1:]
    maps = [attention_maps(weights[n], indices, grid)[tuple(query)] for n, query in enumerate(queries)]
    return {
        "attention_maps": plots.attention_maps(pictures, queries, np.stack(maps), data.class_names),
        "mean_attention": plots.mean_attention(*mean_by_offset(weights[len(first) :], indices)),
    }


def save_figures(folder: Path, figures: Mapping[str, Any]):
    """Writes each figure as `folder/figures/NAME.png`."""
    (folder / "figures").mkdir()
    for name, figure in figures.items():
        figure.savefig(folder / "figures" / f"{name}.png", dpi=160, facecolor="white")
