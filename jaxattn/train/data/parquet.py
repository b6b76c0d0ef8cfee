"""Parquet files with images and labels, as the Hugging Face hub serves them."""

import functools
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from jaxattn.errors import InputError, needs_extra
from jaxattn.files import Room, open_file, reading, shown, size_of
from jaxattn.train.data.images import Encoded, decode_parts
from jaxattn.train.data.options import whole_number
from jaxattn.train.data.split import Found, words

USUAL = {"image": ("image", "img"), "label": ("label", "fine_label")}
OTHERS = ("extra", "unsupervised", "unlabeled", "unlabelled")  # files of parts that are not trained or tested on
ROWS = 128  # read at a time
LARGEST = 2**62  # of a label


class Columns(NamedTuple):
    """The names of the image column and the label column, and what kind the labels are."""

    image: str
    label: str
    kind: str


def read_parquet(path: Path, options: Mapping[str, str], skip_bad: bool, limit: int | None = None) -> Found:
    """The files of a folder whose path in it has a word for a part, such as data/train-00000.parquet; or one file.

    The words are train or training; validation, valid, val, dev or eval; and test or testing. The image column holds
    encoded images, as binary or as structs {bytes, path}; the label column whole numbers, text, or true and false. They
    are those called image or img and label or fine_label, or else the only ones of their types (but not one that has
    another value in every row), or `?image=NAME&label=NAME`. The names of the classes are the labels themselves, or
    come from the Hugging Face metadata of the schema; without it the classes are the numbers up to the largest label.
    """
    with needs_extra("parquet"):
        import pyarrow.parquet  # noqa: F401
    size = whole_number(options, "size", None, least=1)
    files = _files(path)
    first = files["train"][0]
    schema = _read_schema(first)
    columns = _columns(first, schema, options)
    tables = {part: [(file, _read_table(file, columns, limit)) for file in found] for part, found in files.items()}
    said = [value for _, table in tables["train"] for value in table.column(columns.label).to_pylist()]
    if columns.label not in (options.get("label"), *USUAL["label"]) and len(set(said)) == len(said) > 1:
        raise InputError(
            f"{first}: which column is the label? {columns.label}, the only one that could be, has another value in "
            "every row, as the number of a row has: append ?label=NAME to the data's name if it is"
        )
    if columns.kind == "number":
        names = _hub_names(first, schema, columns.label)
        number = None
    else:
        names = tuple(sorted({str(value) for value in said if value is not None}))
        number = {name: n for n, name in enumerate(names)}
    rows = {part: [row for each in found for row in _rows(*each, columns, number)] for part, found in tables.items()}
    skipped: list[str] = []
    parts = decode_parts(rows, size, skip_bad, skipped)
    validation, test = parts.get("validation"), parts.get("test")
    if test is None:  # as for folders
        validation, test = None, validation
    return Found(str(path), names, parts["train"], validation, test, tuple(skipped))


def _files(path: Path) -> dict[str, list[Path]]:
    """The files of each part, by the words in their paths."""
    if path.exists() and not path.is_dir():
        return {"train": [path]}
    files: dict[str, list[Path]] = {}
    with reading(path):
        found = sorted(path.rglob("*.parquet"))
    for file in found:
        inside = str(file.relative_to(path))
        parts = words(inside)
        if len(parts) > 1:
            raise InputError(f"{file}: is it of {' or of '.join(parts)}? Its path in {path} has both words")
        if not parts and not any(word in inside.lower() for word in OTHERS):
            raise InputError(f"{file}: of which part is it? Its path in {path} has none of train, validation and test")
        for part in parts:
            files.setdefault(part, []).append(file)
    if "train" not in files:
        raise InputError(f"{path}: has no *.parquet file with the word train in its name")
    return files


def _open(file: IO[bytes]) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file)


def _read_schema(path: Path) -> Any:
    with reading(path, form=(b"PAR1",)), open_file(path) as file:
        return _open(file).schema_arrow


def _read_table(path: Path, columns: Columns, limit: int | None) -> Any:
    """The two columns of a file, if they are what they are in the first one."""
    import pyarrow

    with reading(path, form=(b"PAR1",)), open_file(path) as file:
        source, room = _open(file), Room(path, size_of(file), limit)
        schema = source.schema_arrow
        missing = {columns.image, columns.label} - set(schema.names)
        if missing:
            raise InputError(f"{path}: lacks the column {', '.join(sorted(missing))}; it has {', '.join(schema.names)}")
        kinds = {name: schema.field(name).type for name in (columns.image, columns.label)}
        if not _is_image(kinds[columns.image]) or _label_kind(kinds[columns.label]) != columns.kind:
            said = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            raise InputError(f"{path}: has {said}, of other types than in the first file of the training part")
        batches = []
        # a few rows at a time, so that what repeats a long value is noticed in time
        for batch in source.iter_batches(ROWS, columns=[columns.image, columns.label], use_threads=False):
            room.take(batch.nbytes, f"{source.metadata.num_rows:,} rows")
            batches.append(batch)
        return pyarrow.Table.from_batches(batches, None if batches else _only(schema, columns))


def _only(schema: Any, columns: Columns) -> Any:
    import pyarrow

    return pyarrow.schema([schema.field(columns.image), schema.field(columns.label)])


def _is_image(kind: Any) -> bool:
    from pyarrow import types

    is_bytes = lambda kind: types.is_binary(kind) or types.is_large_binary(kind)
    inner = list(kind) if types.is_struct(kind) else []
    return is_bytes(kind) or any(field.name == "bytes" and is_bytes(field.type) for field in inner)


def _label_kind(kind: Any) -> str | None:
    """What labels of an Arrow type are; None if they are none."""
    from pyarrow import types

    if types.is_dictionary(kind):  # where every value is said once, and then by its number
        kind = kind.value_type
    if types.is_integer(kind):
        return "number"
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    return "true or false" if types.is_boolean(kind) else None


def _columns(path: Path, schema: Any, options: Mapping[str, str]) -> Columns:
    """The image column and the label column: those that are asked for, or of a usual name, or alone of their types."""
    found = []
    for what, fits in (("image", _is_image), ("label", _label_kind)):
        named = [field.name for field in schema if fits(field.type)]
        usual = [name for name in USUAL[what] if name in schema.names][:1]  # even of a type that does not fit
        wanted = [options[what]] if what in options else usual or named
        if len(wanted) != 1 or wanted[0] not in named:
            said = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise InputError(
                f"{path}: which column is the {what}? It has {said}: append ?{what}=NAME to the data's name"
            )
        found += wanted
    return Columns(found[0], found[1], str(_label_kind(schema.field(found[1]).type)))


def _rows(path: Path, table: Any, columns: Columns, number: Mapping[str, int] | None) -> Sequence[Encoded]:
    labels = table.column(columns.label).to_pylist()
    read = functools.partial(_bytes, table.column(columns.image))
    return [
        Encoded(functools.partial(read, i), *_label(label, number, f"{path}: row {i}"))
        for i, label in enumerate(labels)
    ]


def _label(label: Any, number: Mapping[str, int] | None, origin: str) -> tuple[int, str, str | None]:
    """A label as a number, where it lies, and what is wrong with it."""
    if label is None:
        return -1, origin, "its label is missing"
    if number is None:
        return (label, origin, None) if abs(label) < LARGEST else (-1, origin, f"a label is {label}, which is no class")
    if str(label) in number:
        return number[str(label)], origin, None
    return -1, origin, f"a label is {shown(label)}, which no training image has"


def _bytes(column: Any, row: int) -> io.BufferedIOBase:
    value = column[row].as_py()
    content = value.get("bytes") if isinstance(value, dict) else value
    if content is None:
        raise ValueError("the row holds no bytes")
    return io.BytesIO(content)


def _hub_names(path: Path, schema: Any, label: str) -> tuple[str, ...] | None:
    """What the hub's metadata say: {"info": {"features": {label: {"names": [...]}}}}; or nothing."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: the names of its classes are {shown(names)}, expected a list of text")
    return tuple(names)
