"""Tests run with 64-bit types available, on the CPU unless told otherwise."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import pytest
import quick
import tiers
from jaxtyping import install_import_hook

os.environ["XLA_FLAGS"] = " ".join([os.environ["XLA_FLAGS"], *quick.FLAGS])
quick.quick()
jax.config.update("jax_enable_x64", True)
# The modules whose signatures carry shapes. The others take what users give them, and answer for themselves.
CHECKED = ("kernels", "lowerings", "nn", "models", "train", "normalize", "measure", "plots")

# Compilation makes the first example slow, so no deadline. Derandomised: CI tests the same examples every time;
# HYPOTHESIS_PROFILE=explore draws new ones.
for name, examples in tiers.PROFILES.items():
    ours = {"derandomize": True, "print_blob": True} if name != "explore" else {}
    hypothesis.settings.register_profile(name, deadline=None, max_examples=examples, **ours)


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="all tests; by default the core, which leaves out many cases")
    parser.addoption("--part", metavar="K/N", help="of the tests that are asked for, one of N parts, as CI takes them")
    parser.addoption("--shapes", action="store_true", help="check every shape annotation, as --full does: a sixth more")


def pytest_configure(config):
    tier = "full" if config.getoption("--full") else "core"
    if config.getoption("--full") or config.getoption("--shapes"):
        install_import_hook([f"jaxattn.{name}" for name in CHECKED], "beartype.beartype")
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", tier))


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config, items):
    """Without --full, what is marked `full` is left out, unless it is asked for by its name."""
    tiers.mark(items)
    everything = config.getoption("--full") or any("::" in str(argument) for argument in config.args)
    part = config.getoption("--part")
    chosen = [
        (everything or not item.get_closest_marker("full")) and (part is None or tiers.is_of(part, item.nodeid))
        for item in items
    ]
    left_out = [item for item, taken in zip(items, chosen, strict=True) if not taken]
    items[:] = [item for item, taken in zip(items, chosen, strict=True) if taken]
    config.hook.pytest_deselected(items=left_out)
