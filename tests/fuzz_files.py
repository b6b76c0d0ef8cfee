"""Seeded mutations of files, for `test_fuzz.py`, in a process of its own: `python fuzz_files.py FOLDER COUNT [READER]`.

Each mutant must be read, or refused by our own error that names the file, within the memory and the time that the
process has. It prints what did otherwise, by reader and number, and how many were read and refused.
"""

import faulthandler
import gzip
import importlib.util
import io
import json
import pickle
import resource
import shutil
import signal
import struct
import sys
import tarfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from jaxattn.errors import InputError
from jaxattn.pretrained import read_weights
from jaxattn.study.kept import read_kept
from jaxattn.torch_file import read_torch
from jaxattn.train.checkpoint import Damaged, _check
from jaxattn.train.config import Config
from jaxattn.train.data import load
from jaxattn.train.log import _keep
from jaxattn.train.run import read_config, read_epochs, read_results, read_source, read_task, write_config

MEMORY = 1 << 30  # beyond what the process has when it starts
SECONDS = 20  # for one mutant, on a machine that does other things too


class Reader(NamedTuple):
    """A file that is right, written by `write` into a folder, and what reads it."""

    write: Callable[[Path], Path]
    read: Callable[[Path], object]


def images(count=4, shape=(6, 5, 3)):
    return np.random.default_rng(0).integers(0, 256, (count, *shape)).astype(np.uint8)


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def text_of(said: str) -> bytes:
    return b"X" + struct.pack("<I", len(said)) + said.encode()


def torch_pickle() -> bytes:
    """As PyTorch pickles two views of a storage, by hand: a dictionary with a tensor of two axes, and a parameter."""
    text = text_of
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x06tQ"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    one = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K\x02K\x03\x86K\x03K\x01\x86" + hooks + b"tR"
    bits = b"}" + text("neg") + b"\x88s"
    two = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x02K\x02\x85K\x02\x85" + hooks + bits + b"tR"
    return b"\x80\x02}q\x01(" + text("a") + one + text("b") + two + b"u."


def checkpoint_pickle() -> bytes:
    """The same as "model", beside the author's settings: an `argparse.Namespace`, and a call of something."""
    text = text_of
    settings = b"cargparse\nNamespace\n)\x81}(" + text("lr") + b"K\x01" + text("names") + b"](K\x01K\x02eub"
    called = b"cnumpy\nfloat64\n(K\x02tR"
    inner = torch_pickle().removeprefix(b"\x80\x02").removesuffix(b".")
    return b"\x80\x02}(" + text("model") + inner + text("args") + settings + text("best") + called + b"u."


def torch_zip(folder: Path) -> Path:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", torch_pickle())
        archive.writestr("w/byteorder", "little")
        archive.writestr("w/data/0", np.arange(6, dtype=np.float32).tobytes())
    return put(folder / "w.pth", made.getvalue())


def torch_legacy(folder: Path, pickled: bytes = torch_pickle()) -> Path:
    head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    tail = [pickle.dumps(["0"], 2), struct.pack("<q", 6), np.arange(6, dtype=np.float32).tobytes()]
    return put(folder / "w.pth", b"".join([*head, pickled, *tail]))


def safetensors(folder: Path) -> Path:
    """By hand: the length of the header, the header, and the arrays."""
    head = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "I64", "shape": [2], "data_offsets": [24, 40]},
    }
    said = json.dumps(head).encode()
    return put(folder / "w.safetensors", struct.pack("<Q", len(said)) + said + bytes(40))


def npz(compress: bool) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        made = io.BytesIO()
        labels = np.arange(24) % 2
        parts = {
            "train_images": images(24),
            "train_labels": labels,
            "test_images": images(4),
            "test_labels": labels[:4],
        }
        (np.savez_compressed if compress else np.savez)(made, **parts, class_names=np.array(["cat", "dog"]))
        return put(folder / "x.npz", made.getvalue())

    return write


def idx(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


def mnist(packed: bool) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        suffix, pack = (".gz", gzip.compress) if packed else ("", bytes)
        for part, count in (("train", 60), ("t10k", 20)):
            labels = put(folder / f"{part}-labels-idx1-ubyte{suffix}", pack(idx(np.arange(count) % 10)))
            put(folder / f"{part}-images-idx3-ubyte{suffix}", pack(idx(images(count)[..., 0])))
        return labels.with_name(f"train-images-idx3-ubyte{suffix}")

    return write


def cifar_files() -> dict[str, bytes]:
    data, labels = np.zeros((10, 3072), np.uint8), list(range(10))
    dump = lambda value: pickle.dumps(value, 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    batch = dump({"labels": labels, "data": data})
    names = {"batches.meta": dump({"label_names": [f"class{n}" for n in labels]}), "test_batch": batch}
    return names | {f"data_batch_{n}": batch for n in range(1, 6)}


def cifar_folder(folder: Path) -> Path:
    for name, content in cifar_files().items():
        put(folder / name, content)
    return folder / "data_batch_2"


def cifar_binary(folder: Path) -> Path:
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        put(folder / f"{name}.bin", b"".join(bytes([n]) + bytes(3072) for n in range(10)))
    put(folder / "batches.meta.txt", "\n".join(f"class{n}" for n in range(10)).encode())
    return folder / "data_batch_2.bin"


def cifar_archive(form: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode=f"w:{form}") as archive:
            for name, content in cifar_files().items():
                info = tarfile.TarInfo(f"cifar/{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return put(folder / "x.tar", made.getvalue())

    return write


def picture(form: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        exif = Image.Exif()
        exif[0x0112] = 6
        for n, array in enumerate(images(12)):
            made = io.BytesIO()
            Image.fromarray(array).save(made, form, **({} if form == "BMP" else {"exif": exif}))
            path = put(folder / ("cat", "dog")[n % 2] / f"{n}.x", made.getvalue())
        return path

    return write


def parquet(kind: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        made, png = io.BytesIO(), []
        for array in images(12):
            file = io.BytesIO()
            Image.fromarray(array).save(file, "PNG")
            png.append(file.getvalue())
        labels = {"number": [0, 1] * 6, "text": ["cat", "dog"] * 6}[kind]
        pyarrow.parquet.write_table(pyarrow.table({"image": png, "label": labels}), made)
        return put(folder / "train.parquet", made.getvalue())

    return write


# What is behind a check sum, which would refuse nearly every mutant: the mutant is packed when it is read


def inner_array(folder: Path) -> Path:
    made = io.BytesIO()
    np.save(made, images(24))
    return put(folder / "train_images.npy", made.getvalue())


def read_inner_array(path: Path) -> object:
    whole = npz(False)(path.parent)
    with zipfile.ZipFile(whole) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(whole, "w") as archive:
        for name, content in (members | {path.name: path.read_bytes()}).items():
            archive.writestr(name, content)
    return load(f"numpy:{whole}")


def read_inner_pickle(path: Path) -> object:
    with zipfile.ZipFile(path.with_name("w.pth"), "w") as archive:
        archive.writestr("w/data.pkl", path.read_bytes())
        archive.writestr("w/data/0", np.arange(6, dtype=np.float32).tobytes())
    return read_torch(path.with_name("w.pth")), read_weights(path.with_name("w.pth"))


def read_inner_tar(path: Path) -> object:
    return load(f"cifar10:{put(path.with_name('x.tar.gz'), gzip.compress(path.read_bytes(), 1))}")


def text(name: str, content: str) -> Callable[[Path], Path]:
    return lambda folder: put(folder / name, content.encode())


def config(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    write_config(Config(), folder)
    return folder / "config.json"


def manifest(folder: Path) -> Path:
    """A mutant's checksum is set right, or it would say nothing."""
    array = put(folder / "arrays" / "x", b"hello")
    sums = {"arrays/x": [5, zlib.crc32(array.read_bytes())]}
    content = {"step": 1, "metric": 0.5, "position": {}, "arrays": {"x": "float32[3]"}, "files": sums}
    return put(folder / "manifest.json", json.dumps([content, zlib.crc32(json.dumps(content).encode())]).encode())


def check(path: Path):
    try:
        _check(path.parent)
    except Damaged as error:
        raise InputError(str(error)) from error


EPOCH = {"step": 3, "epoch": 1, "train_loss": 2.0, "train_accuracy": 0.3, "validation_accuracy": 0.5}
KEPT = {"numbers": {"x": 1.0}, "verdict": "holds", "notes": "", "svg": '<svg><g id="a"/></svg>', "seconds": 1.0}
LINES = f"{json.dumps(EPOCH)}\n" * 3
READERS = {
    "torch zip": Reader(torch_zip, read_torch),
    "torch legacy": Reader(torch_legacy, read_torch),
    "checkpoint": Reader(lambda folder: torch_legacy(folder, checkpoint_pickle()), read_weights),
    "torch zip, of any objects": Reader(torch_zip, read_weights),
    "torch legacy, of any objects": Reader(torch_legacy, read_weights),
    **({"safetensors": Reader(safetensors, read_weights)} if importlib.util.find_spec("safetensors") else {}),
    "npz": Reader(npz(False), lambda path: load(f"numpy:{path}")),
    "npz, deflated": Reader(npz(True), lambda path: load(f"numpy:{path}")),
    "npz, an array in it": Reader(inner_array, read_inner_array),
    "torch zip, the pickle in it": Reader(lambda folder: put(folder / "data.pkl", torch_pickle()), read_inner_pickle),
    "cifar, the tar in tar.gz": Reader(cifar_archive(""), read_inner_tar),
    "idx": Reader(mnist(False), lambda path: load(f"mnist:{path.parent}")),
    "idx, gzipped": Reader(mnist(True), lambda path: load(f"mnist:{path.parent}")),
    "cifar, a pickle": Reader(cifar_folder, lambda path: load(f"cifar10:{path.parent}")),
    "cifar, binary": Reader(cifar_binary, lambda path: load(f"cifar10:{path.parent}")),
    "cifar, tar": Reader(cifar_archive(""), lambda path: load(f"cifar10:{path}")),
    "cifar, tar.gz": Reader(cifar_archive("gz"), lambda path: load(f"cifar10:{path}")),
    "cifar, tar.xz": Reader(cifar_archive("xz"), lambda path: load(f"cifar10:{path}")),
    **{
        form: Reader(picture(form), lambda path: load(f"folder:{path.parent.parent}"))
        for form in ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
    },
    "parquet of numbers": Reader(parquet("number"), lambda path: load(f"parquet:{path}")),
    "parquet of text": Reader(parquet("text"), lambda path: load(f"parquet:{path}")),
    "config.json": Reader(config, lambda path: read_config(path.parent)),
    "results.json": Reader(text("results.json", '{"seconds": 1.5}'), lambda path: read_results(path.parent, "seconds")),
    "metrics.jsonl": Reader(text("metrics.jsonl", LINES), lambda path: read_epochs(path.parent)),
    "steps.jsonl": Reader(text("steps.jsonl", LINES), lambda path: _keep(path, 9)),
    "data.json": Reader(
        text("data.json", '{"absolute": "x", "fingerprint": "y"}'), lambda path: read_source(path.parent)
    ),
    "task.json": Reader(
        text("task.json", '{"image_shape": [8, 8, 1], "mean": [0.5], "std": [0.25], "classes": ["cat", "dog"]}'),
        lambda path: read_task(path.parent),
    ),
    "manifest.json": Reader(manifest, check),
    "study": Reader(text("x.json", json.dumps(KEPT)), read_kept),
}


def mutant(content: bytes, random: np.random.Generator) -> bytes:
    """The content with one to four changes: bits, bytes, numbers that may be lengths, and pieces that go or come."""
    changed = bytearray(content)
    for _ in range(random.integers(1, 5)):
        place, kind = int(random.integers(len(changed) + 1)), random.integers(8)
        end = place + int(random.integers(1, 9))
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << int(random.integers(8))
        elif kind == 1:
            changed[place:end] = random.bytes(end - place)
        elif kind == 2:
            large = random.choice([0, 1, 0x7F, 0xFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000])
            changed[place : place + 4] = struct.pack(random.choice(["<I", ">I"]), large)
        elif kind == 3:
            del changed[place:end]
        elif kind == 4:
            changed[place:place] = random.bytes(end - place)
        elif kind == 5:
            start = int(random.integers(len(changed) + 1))
            changed[place:end] = changed[start : start + 32]
        elif kind == 6 and random.integers(4) == 0:
            del changed[place:]
        else:
            changed[place:end] = bytes(random.choice([b'"', b"[", b"{", b"9", b"-", b".", b"]", b"}", b"\n"])) * 3
    return bytes(changed)


def outcome(reader: Reader, path: Path) -> str:
    """`read`, `refused`, or what went wrong."""
    start = time.monotonic()
    try:
        reader.read(path)
        said = "read"
    except (InputError, ValueError) as error:
        ours = isinstance(error, InputError) or str(error).startswith(("read_torch: ", "read_weights: "))
        named = str(path) in str(error) or str(path.parent) in str(error)
        well = ours and named and len(str(error)) < 2000 and "MemoryError" not in str(error)
        said = "refused" if well else f"{type(error).__name__}: {error}"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    if time.monotonic() - start > SECONDS:
        return f"took {time.monotonic() - start:.0f} s"
    return said


def main(folder: Path, count: int, names: list[str]):
    warnings.simplefilter("ignore")  # of damaged EXIF, and of what is large
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    faulthandler.enable()
    for name in names:
        here = folder / name
        shutil.rmtree(here, ignore_errors=True)
        here.mkdir()
        path = READERS[name].write(here)
        content, tally = path.read_bytes(), {"read": 0, "refused": 0}
        if (said := outcome(READERS[name], path)) != "read":
            print(f"{name}: the file itself: {said}", flush=True)
        for number in range(count):
            path.write_bytes(mutant(content, np.random.default_rng((zlib.crc32(name.encode()), number))))
            if name == "manifest.json":
                reseal(path)
            faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
            signal.alarm(4 * SECONDS)
            said = outcome(READERS[name], path)
            faulthandler.cancel_dump_traceback_later()
            signal.alarm(0)
            if said in tally:
                tally[said] += 1
            else:
                print(f"{name}: {number}: {said[:500]}", flush=True)
        print(f"ok {name}: {tally['read']} read, {tally['refused']} refused", flush=True)


def reseal(path: Path):
    try:
        content, _ = json.loads(path.read_bytes())
        path.write_text(json.dumps([content, zlib.crc32(json.dumps(content).encode())]))
    except (ValueError, TypeError):
        return


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or list(READERS))
