"""What one seed of an experiment gave, kept on disk, so that a study that was interrupted goes on."""

import dataclasses
import re
import time
import warnings
from pathlib import Path
from xml.etree import ElementTree

import jax

from jaxattn.errors import InputError
from jaxattn.files import cut, read_json, reading
from jaxattn.plots import inline_svg
from jaxattn.study.claim import Claim, Measurement, Setting
from jaxattn.train.run import digest, write_json

# the elements of our figures
DRAWS = {
    *("svg", "g", "defs", "style", "title", "text", "tspan", "path", "use", "clipPath", "image", "animate"),
    *("rect", "circle", "ellipse", "line", "polyline", "polygon"),
}
PACKAGE = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Kept:
    """What one seed of an experiment gave, as it is kept."""

    numbers: dict[str, float]
    verdict: str
    notes: str
    svg: str
    seconds: float


def kept(claim: Claim, path: Path, setting: Setting) -> Kept:
    """What is kept at `path`, or a new run, which is kept. Two claims may share an experiment, and so its runs."""
    if path.exists():
        try:
            return read_kept(path)
        except InputError as error:  # whatever damaged it, it can be had again
            warnings.warn(f"{error}; it is run anew", stacklevel=2)
    start = time.perf_counter()
    with jax.default_matmul_precision("highest"):  # by default GPUs and TPUs round products of float32
        run = claim.experiment(setting)
    seconds = time.perf_counter() - start
    numbers = {name: float(value) for name, value in run.numbers.items()}
    result = Kept(numbers, run.verdict, run.notes, drawing(run, claim), seconds)
    write_json(path, dataclasses.asdict(result))
    return result


def read_kept(path: Path) -> Kept:
    """What is kept in a file.

    Raises:
      InputError: it is not what `kept` writes, with its name. Its figure stands in the report as it is, so it must be
        a figure and nothing else.
    """
    found = read_json(path)
    kinds = {"numbers": dict, "verdict": str, "notes": str, "svg": str, "seconds": int | float}
    whole = found.keys() == kinds.keys() and all(isinstance(found[name], kind) for name, kind in kinds.items())
    if not whole or not all(isinstance(number, int | float) for number in found["numbers"].values()):
        raise InputError(f"{path}: is not what one seed of an experiment gave")
    return Kept(**{**found, "svg": drawn_alone(path, found["svg"])})


def drawn_alone(path: Path, svg: str) -> str:
    """SVG that draws, runs nothing, and fetches nothing, written anew: a browser and an XML parser may differ in how
    they read what others wrote.

    >>> drawn_alone(Path("x"), '<svg><g id="a"><path d="M0 0"/></g><use href="#a"/></svg>')
    '<svg><g id="a"><path d="M0 0" /></g><use href="#a" /></svg>'
    >>> drawn_alone(Path("x.json"), "<svg><script>alert(1)</script></svg>")
    Traceback (most recent call last):
    ...
    jaxattn.errors.InputError: x.json: svg holds more than a figure: script
    """
    with reading(path):
        drawings = list(ElementTree.fromstring(f"<all>{svg}</all>"))
        for element in (element for drawing in drawings for element in drawing.iter()):
            if not _draws(element):
                raise InputError(f"{path}: svg holds more than a figure: {cut(str(element.tag))}")
        return "".join(ElementTree.tostring(drawing, "unicode") for drawing in drawings)


def _draws(element: ElementTree.Element) -> bool:
    attributes = [*element.attrib.items(), ("style", element.text or "" if element.tag == "style" else "")]
    return element.tag in DRAWS and all(_still(name, value) for name, value in attributes)


def _still(name: str, value: str) -> bool:
    """Whether an attribute does nothing but say how something looks."""
    if name.lower().startswith("on") or re.search(r"url\((?!#)|@import|javascript:", value, re.IGNORECASE):
        return False
    return not name.endswith("href") or value.startswith(("#", "data:image/png;base64,"))


def drawing(made: Measurement, claim: Claim) -> str:
    """A measurement's figures as SVG, one after the other."""
    drawn = enumerate(made.figures)
    return "".join(f if isinstance(f, str) else inline_svg(f, f"claim{claim.number}-{n}") for n, f in drawn)


def code_version() -> str:
    """A digest of the library's sources: a result of other code is not taken from the cache."""
    return digest(*(path.read_bytes() for path in sorted(PACKAGE.rglob("*.py"))))
