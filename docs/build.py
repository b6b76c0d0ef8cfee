"""The site, in build/docs: `python docs/build.py`. A warning is an error.

mkdocs does the work, by mkdocs.yml; docs/hooks.py makes the pages that are not in this folder.
"""

import argparse
import os
import pathlib
import sys

from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = pathlib.Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(". ")[0])
    parser.add_argument("--no-notebooks", action="store_true", help="show them as they are, and do not run them")
    options = parser.parse_args()
    os.chdir(ROOT)
    config = load_config("mkdocs.yml", strict=True)
    config.extra["notebooks"] = not options.no_notebooks
    try:
        build(config)
    except Abort as error:
        sys.exit(f"docs/build.py: {error}")
    print("build/docs/index.html; to read it with its search: python -m http.server -d build/docs")


if __name__ == "__main__":
    os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")  # what mkdocs-material says of a mkdocs that is not installed
    main()
