"""Writes the README's table of layers: `python docs/readme.py`, as `zoo.table()` prints it now."""

import contextlib
import io
import pathlib
import re

from jaxattn import zoo

README = pathlib.Path(__file__).parent.parent / "README.md"
TABLE = re.compile(r"^\| layer .*?\n(?!\|)", re.MULTILINE | re.DOTALL)


def table() -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        zoo.table()
    return printed.getvalue()


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(TABLE.sub(lambda found: table(), text, count=1), encoding="utf-8")
