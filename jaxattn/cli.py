"""Convolution, attention, and everything between: train a network, evaluate a run, study, measure the speed."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from jaxattn.bench.run import run as run_benchmark
from jaxattn.errors import InputError, needs_extra
from jaxattn.study.run import study as run_study
from jaxattn.study.run import summary
from jaxattn.train import session
from jaxattn.train.compile import describe, plan_step, write_report
from jaxattn.train.config import Config, Options
from jaxattn.train.recipes import recipe
from jaxattn.train.run import read_config

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
        session.train(config, options)

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
        report = plan_step(config, topology, mesh, image_shape, classes)
        print(describe(report))
        if json is not None:
            write_report(report, json)

    return compile


def eval_run(run: Positional[Path]):
    """Evaluate a run on its test images: the accuracy that its training printed.

    Args:
      run: a folder that `jaxattn train` wrote.
    """
    session.evaluate_run(run)


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
