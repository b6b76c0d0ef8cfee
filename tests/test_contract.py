"""The contract of `attention` in float64: every implementation × geometry × argument, values and all gradients."""

import pytest
from contract import ARGUMENTS, GEOMETRIES, SMALL, check, problem


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(
    ("implementation", "arguments"),
    [("xla", "plain"), (SMALL, "plain"), (SMALL, "everything"), ("reference", "everything")],
)
def test_geometries(geometry, arguments, implementation):
    check(problem(geometry, arguments), implementation)


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize(
    ("implementation", "geometry"),
    [
        ("reference", "5 x 5, mask"),
        ("xla", "257 of 600"),
        (SMALL, "halo"),
        (SMALL, "global, more keys"),
    ],
)
def test_arguments(implementation, geometry, arguments):
    check(problem(geometry, arguments), implementation)
