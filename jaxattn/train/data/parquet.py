"""Parquet files with images and labels, as the Hugging Face hub serves them."""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxattn.errors import InputError, needs_extra
from jaxattn.train.data.images import Encoded, decode_all
from jaxattn.train.data.options import whole_number
from jaxattn.train.data.split import Found

SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}


def read_parquet(path: Path, options: Mapping[str, str], skip_bad: bool) -> Found:
    """The files of a folder whose path in it has the word train, test or validation, such as data/train-00000.parquet.

    The image column holds encoded JPEG or PNG files, as binary or as structs {bytes, path}; the label column whole
    numbers. They are those called image or img and label or fine_label, or the only ones of their types, or
    `?image=NAME&label=NAME`. The names of the classes come from the Hugging Face metadata of the schema; without it
    the classes are the numbers up to the largest label.
    """
    size = whole_number(options, "size", None, least=1)
    files = _files(path)
    tables = {split: [_read_table(file) for file in found] for split, found in files.items()}
    first = tables["train"][0].schema
    image, label = _columns(files["train"][0], first, options)
    rows: dict[str, list[Encoded]] = {}
    for split, found in tables.items():
        each = [_rows(file, table, image, label) for file, table in zip(files[split], found, strict=True)]
        rows[split] = [row for part in each for row in part]
    count = 1 + max((row.label for row in rows["train"]), default=-1)
    names = _class_names(first, label) or tuple(map(str, range(count)))
    skipped: list[str] = []
    parts = {split: decode_all(found, size, skip_bad, skipped) for split, found in rows.items()}
    validation, test = parts.get("validation"), parts.get("test")
    if test is None:  # as for folders
        validation, test = None, validation
    return Found(str(path), names, parts["train"], validation, test, tuple(skipped))


def _files(path: Path) -> dict[str, list[Path]]:
    """The files of each part, by the words in their paths."""
    files: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*.parquet")):
        words = re.split("[^a-z]+", str(file.relative_to(path)).lower())
        splits = sorted({SPLITS[word] for word in words if word in SPLITS})
        if len(splits) > 1:
            raise InputError(f"{file}: is it of {' or of '.join(splits)}? Its path in {path} has both words")
        for split in splits:
            files.setdefault(split, []).append(file)
    if "train" not in files:
        raise InputError(f"{path}: has no *.parquet file with the word train in its name")
    return files


def _read_table(file: Path) -> Any:
    with needs_extra("parquet"):
        import pyarrow
        import pyarrow.parquet
    try:
        return pyarrow.parquet.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{file}: cannot be read: {error}") from error


def _columns(file: Path, schema: Any, options: Mapping[str, str]) -> tuple[str, str]:
    """The names of the image column and of the label column."""
    from pyarrow import types

    is_bytes = lambda kind: types.is_binary(kind) or types.is_large_binary(kind)
    is_image = lambda kind: (
        is_bytes(kind)
        or (types.is_struct(kind) and any(field.name == "bytes" and is_bytes(field.type) for field in kind))
    )
    found = []
    for what, usual, fits in (
        ("image", ("image", "img"), is_image),
        ("label", ("label", "fine_label"), types.is_integer),
    ):
        named = [field.name for field in schema if fits(field.type)]
        wanted = [options[what]] if what in options else [*filter(named.__contains__, usual)][:1] or named
        if len(wanted) != 1 or wanted[0] not in named:
            columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise InputError(
                f"{file}: which column is the {what}? It has {columns}: append ?{what}=NAME to the data's name"
            )
        found += wanted
    return found[0], found[1]


def _rows(file: Path, table: Any, image: str, label: str) -> list[Encoded]:
    missing = {image, label} - set(table.column_names)
    if missing:
        raise InputError(
            f"{file}: lacks the column {', '.join(sorted(missing))}; it has {', '.join(table.column_names)}"
        )
    labels = table.column(label).to_pylist()
    read = functools.partial(_bytes, table.column(image))
    return [
        Encoded(functools.partial(read, i), -1 if label is None else label, f"{file}: row {i}")
        for i, label in enumerate(labels)
    ]


def _bytes(column: Any, row: int) -> bytes:
    value = column[row].as_py()
    content = value.get("bytes") if isinstance(value, dict) else value
    if content is None:
        raise ValueError("the row holds no bytes")
    return content


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    """What the hub's metadata say: {"info": {"features": {label: {"names": [...]}}}}; or nothing."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError):
        return ()
    return tuple(map(str, names))
