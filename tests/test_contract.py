"""The contract of `attention` in float64: every implementation × geometry × argument, values and all gradients."""

import pytest
from contract import ARGUMENTS, GEOMETRIES, SMALL, check, parts, problem

OF_GEOMETRIES = [("xla", "plain"), (SMALL, "everything"), ("reference", "everything")]
OF_ARGUMENTS = [
    ("reference", "5 x 5, mask"),
    (SMALL, "halo"),
    (SMALL, "global, more keys"),
    ("xla", "129 of 300"),
]
CASES = [(how, geometry, arguments) for geometry in GEOMETRIES for how, arguments in OF_GEOMETRIES]
CASES += [(how, geometry, arguments) for arguments in ARGUMENTS for how, geometry in OF_ARGUMENTS]


@pytest.mark.core("each", parts=parts)
@pytest.mark.parametrize(("implementation", "geometry", "arguments"), dict.fromkeys(CASES))
def test_values_and_gradients(implementation, geometry, arguments):
    check(problem(geometry, arguments), implementation)
