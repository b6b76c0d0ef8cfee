"""Files as users have them, and as nobody should: read rightly, or refused by name."""

import bz2
import gzip
import io
import json
import lzma
import os
import struct
import tarfile
import warnings
import zipfile

import numpy as np
import pytest

from jaxattn.errors import InputError
from jaxattn.train.data import images as image_files
from jaxattn.train.data import load
from jaxattn.train.data.split import Examples, Found, assemble

Image = pytest.importorskip("PIL.Image")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")


def everything(*sources):
    """(image, label) of all, sorted."""
    fetched = [source.fetch(np.arange(len(source))) for source in sources]
    return sorted((x.tobytes(), int(y)) for images, labels in fetched for x, y in zip(images, labels, strict=True))


def pictures(count, shape=(5, 4, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8)


def encoded(array, form="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, form, **options)
    return file.getvalue()


def write_folder(folder, images, names=("cat", "dog"), form="PNG"):
    for i, image in enumerate(images):
        inner = folder / names[i % len(names)]
        inner.mkdir(parents=True, exist_ok=True)
        (inner / f"{i:03}.{form.lower()}").write_bytes(image if isinstance(image, bytes) else encoded(image, form))


# How an image was held


def oriented(array, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(array, "JPEG", exif=exif, quality=100, subsampling=0)


def test_phone_photographs_stand_upright(tmp_path):
    """The eight orientations of EXIF, of one picture 8 high and 16 wide whose left upper corner is white: the file that
    says how it was held holds other pixels, and all are to be the same picture."""
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:4, :8] = 255
    flip, mirror = np.flipud, np.fliplr
    turn = lambda image: image.transpose(1, 0, 2)
    stored = {
        1: upright,
        2: mirror(upright),
        3: flip(mirror(upright)),
        4: flip(upright),
        5: turn(upright),
        6: np.rot90(upright, 1),
        7: turn(flip(mirror(upright))),
        8: np.rot90(upright, -1),
    }
    files = [oriented(np.ascontiguousarray(stored[1 + n % 8]), 1 + n % 8) for n in range(32)]
    write_folder(tmp_path, files, form="JPEG")
    data = load(f"folder:{tmp_path}")
    assert data.image_shape == (8, 16, 3)
    for part in (data.train, data.validation, data.test):
        for image in part.fetch(np.arange(len(part)))[0]:
            assert np.abs(image.astype(int) - upright).max() <= 8
    small = load(f"folder:{tmp_path}?size=2").test.fetch(np.arange(4))[0]
    assert (small[:, 0, 0] > 200).all()
    assert (small[:, 1, 1] < 50).all()


@pytest.mark.parametrize("late", [False, True])
def test_a_png_says_how_it_was_held_before_or_after_its_pixels(tmp_path, late):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:4, :8] = 255
    file = encoded(np.ascontiguousarray(np.rot90(upright)), "PNG", exif=exif)
    start = file.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(file[start : start + 4], "big")
    if late:
        file = file[:start] + file[end:-12] + file[start:end] + file[-12:]  # before the part that ends it
    write_folder(tmp_path, [file] * 12)
    images, _ = load(f"folder:{tmp_path}").train.fetch(np.arange(2))
    assert (images == upright).all()


@pytest.mark.parametrize(
    "damage", [lambda b: b[:12], lambda b: b.replace(b"MM\0*", b"MM\0?"), lambda b: b[:-3] + b"\xff" * 3]
)
def test_a_broken_exif_says_nothing(tmp_path, damage):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = encoded(np.zeros((8, 16, 3), np.uint8), "JPEG", exif=damage(exif.tobytes()))
    write_folder(tmp_path, [image] * 12, form="JPEG")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load(f"folder:{tmp_path}").image_shape in ((8, 16, 3), (16, 8, 3))


def test_a_large_jpeg_is_decoded_at_a_part_of_its_size(tmp_path, monkeypatch):
    ramp = np.broadcast_to(np.linspace(0, 255, 640, dtype=np.uint8)[None, :, None], (480, 640, 3))
    write_folder(tmp_path, [ramp] * 12, form="JPEG")
    seen, fit = [], image_files.fitted
    monkeypatch.setattr(image_files, "fitted", lambda image, *rest: seen.append(image.size) or fit(image, *rest))
    images, _ = load(f"folder:{tmp_path}?size=32").test.fetch(np.arange(2))
    assert set(seen) == {(160, 120)}  # a quarter: at an eighth it would lose detail
    expected = np.asarray(fit(Image.fromarray(np.ascontiguousarray(ramp)), (32, 32)))
    assert np.abs(images.astype(int) - expected).max() <= 6


@pytest.mark.parametrize(("form", "most"), [("WEBP", 0), ("TIFF", 0), ("BMP", 0)])
def test_other_formats(tmp_path, form, most):
    images = pictures(24)
    options = {"lossless": True} if form == "WEBP" else {}
    write_folder(tmp_path, [encoded(image, form, **options) for image in images])
    data = load(f"folder:{tmp_path}")
    assert everything(data.train, data.validation, data.test) == sorted(
        (x.tobytes(), i % 2) for i, x in enumerate(images)
    )
    if form == "TIFF":
        pages = [Image.fromarray(image) for image in images[:2]]
        pages[0].save(tmp_path / "cat" / "pages.tiff", "TIFF", save_all=True, append_images=pages[1:])
        with pytest.raises(ValueError, match=r"pages.tiff: has 2 pages or frames, expected one"):
            load(f"folder:{tmp_path}")


# Labels


def write_parquet(path, columns, names=None):
    table = pyarrow.table(columns)
    if names is not None:
        info = {"info": {"features": {"label": {"names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path)
    return path


IMAGES = [encoded(image) for image in pictures(24)]
BY_CLASS = sorted((x.tobytes(), i % 2) for i, x in enumerate(pictures(24)))
ANIMALS = ["cat", "dog"] * 12


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (ANIMALS, ("cat", "dog")),
        (pyarrow.array(ANIMALS).dictionary_encode(), ("cat", "dog")),
        (pyarrow.array(ANIMALS, pyarrow.large_string()), ("cat", "dog")),
        ([False, True] * 12, ("False", "True")),
        (pyarrow.array([0, 1] * 12, pyarrow.uint64()), ("0", "1")),
    ],
)
def test_every_kind_of_label_in_parquet(tmp_path, labels, names):
    """Beside it a column of whole numbers, as an id is: the label is the column that is called so."""
    columns = {"image": IMAGES, "label": labels, "id": list(range(24))}
    data = load(f"parquet:{write_parquet(tmp_path / 'x.parquet', columns)}")
    assert data.class_names == names
    assert everything(data.train, data.validation, data.test) == BY_CLASS


@pytest.mark.parametrize(
    ("columns", "names", "message"),
    [
        (
            {"label": [0.5] * 24, "id": list(range(24))},
            None,
            r"which column is the label\? It has .*label \(double\), id",
        ),
        ({"kind": [0, 1] * 12, "name": ANIMALS}, None, r"which column is the label\? .*append \?label=NAME"),
        (
            {"label": [0, 1] * 11 + [0, 3_000_000_000]},
            None,
            r"row 23: a label is 3000000000, expected 0 to 23: there are",
        ),
        ({"label": [0, 1] * 11 + [0, 2**27]}, ["cat", "dog"], r"row 23: a label is 134217728, expected 0 to 1"),
        ({"label": [0, None] * 12}, None, "row 1: its label is missing"),
        ({"label": [0, 1] * 12}, {"cat": 0}, "the names of its classes are a dict, expected a list of text"),
        ({"label": [0, 1] * 12}, "cd", "the names of its classes are 'cd', expected a list of text"),
        ({"label": [-1] * 24}, None, "row 0: a label is -1, expected 0 or more"),
        ({"label": [0, 1] * 12}, [], "the names of its classes are none, expected one for each"),
        ({"id": list(range(24))}, None, r"which column is the label\? id, the only one .* another value in every row"),
        ({"label": ["cat"] * 24}, None, "has one class, 'cat': there is nothing to tell apart"),
    ],
)
def test_labels_that_parquet_cannot_have(tmp_path, columns, names, message):
    path = write_parquet(tmp_path / "train.parquet", {"image": IMAGES, **columns}, names)
    with pytest.raises(InputError, match=message) as caught:
        load(f"parquet:{path}")
    assert str(path) in str(caught.value)


def test_a_later_file_of_other_types_is_refused(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", {"image": IMAGES, "label": [0, 1] * 12})
    for other in ([0.5, 1.5] * 12, ANIMALS):
        path = write_parquet(tmp_path / "train-1.parquet", {"image": IMAGES, "label": other})
        with pytest.raises(InputError, match=r"train-1\.parquet: has image \(binary\), label \(.*\), of other types"):
            load(f"parquet:{tmp_path}")
    write_parquet(path, {"image": IMAGES, "label": pyarrow.array([0, 1] * 12, pyarrow.int8())})
    assert len(load(f"parquet:{tmp_path}").train) > 24


def test_a_test_label_that_training_lacks(tmp_path):
    write_parquet(tmp_path / "train.parquet", {"image": IMAGES, "label": ANIMALS})
    write_parquet(tmp_path / "test.parquet", {"image": IMAGES, "label": [*ANIMALS[:-1], "emu"]})
    with pytest.raises(InputError, match=r"test.parquet: row 23: a label is 'emu', which no training image has"):
        load(f"parquet:{tmp_path}")
    assert len(load(f"parquet:{tmp_path}", skip_bad=True).test) == 23


def arrays(count=36, **replace):
    made = {
        "train_images": pictures(count),
        "train_labels": np.arange(count) % 3,
        "test_images": pictures(6),
        "test_labels": np.arange(6) % 3,
    }
    return {name: array for name, array in (made | replace).items() if array is not None}


def write_npz(path, **replace):
    np.savez(path, **arrays(**replace))
    return f"numpy:{path}"


@pytest.mark.parametrize(
    ("dtype", "classes"), [("uint8", 256), ("int8", 128), ("uint64", 3), (">i2", 3), ("uint32", 3)]
)
def test_labels_of_every_integer_type(tmp_path, dtype, classes):
    labels = (np.arange(4 * classes) % classes).astype(dtype)
    name = write_npz(tmp_path / "x.npz", count=4 * classes, train_labels=labels, test_labels=labels[:6])
    data = load(name)
    assert data.class_names == tuple(map(str, range(classes)))
    assert len(np.unique(data.train.fetch(np.arange(len(data.train)))[1])) == classes


@pytest.mark.parametrize("wrong", [2**31, 2**40, 2**63])
@pytest.mark.parametrize("named", [False, True])
def test_one_wrong_label_costs_nothing_but_its_image(tmp_path, wrong, named):
    labels = (np.arange(36) % 3).astype(np.uint64)
    labels[7] = wrong
    names = {"class_names": np.array(["a", "b", "c"])} if named else {}
    name = write_npz(tmp_path / "x.npz", train_labels=labels, **names)
    expected = r"2\Z" if named else "35: there are no more classes than images"
    with pytest.raises(InputError, match=rf"x\.npz: train_labels\[7\]: a label is {wrong}, expected 0 to {expected}"):
        load(name)
    assert len(load(name, skip_bad=True).class_names) == 3


def test_a_class_that_is_left_out_has_no_output(tmp_path):
    """Class b has no image that can be read: what was c is class 1 then, and b's test image is left out as well."""
    labels = np.array([0, 2] * 18)
    name = write_npz(tmp_path / "x.npz", train_labels=labels, class_names=np.array(["a", "b", "c"]))
    with pytest.raises(InputError, match="class 'b' has no training image"):
        load(name)
    data = load(name, skip_bad=True)
    assert data.class_names == ("a", "c")
    test_images, test_labels = data.test.fetch(np.arange(len(data.test)))
    np.testing.assert_array_equal(test_labels, [0, 1, 0, 1])
    np.testing.assert_array_equal(test_images, pictures(6)[[0, 2, 3, 5]])
    assert len(data.skipped) == 3
    assert "test_labels[4]: of class 'b', which has no training image" in data.skipped[-1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_drawn_part_leaves_every_class_its_last_image(seed):
    for counts in ([7, 1, 13], [1, 1, 30], [2, 2, 2, 2, 9], [40, 1, 1, 1, 1, 1]):
        labels = np.repeat(np.arange(len(counts)), counts)
        images = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
        found = Found("x", None, Examples(images, labels, "x[{}]".format))
        data = assemble("x", found, seed, skip_bad=False)
        assert set(data.train.fetch(np.arange(len(data.train)))[1]) == set(range(len(counts)))
        parts = [part.fetch(np.arange(len(part)))[0].ravel() for part in (data.train, data.validation, data.test)]
        assert sorted(np.concatenate(parts)) == list(range(len(labels)))
        assert min(map(len, parts)) >= 1


# Names and places of files


def test_the_words_for_a_part(tmp_path):
    for train, validation, test in (
        ("Train", "dev", "TEST"),
        ("training", "Val", "testing"),
        ("train", "eval", "test"),
    ):
        folder = tmp_path / train / "folder"
        for seed, (name, count) in enumerate(((train, 24), (validation, 8), (test, 6))):
            write_folder(folder / name, pictures(count, seed=seed))
            (folder / name / "cat" / "Thumbs.db").write_bytes(b"x")
            (folder / name / "dog" / "desktop.ini").write_bytes(b"x")
            (folder / name / "__MACOSX").mkdir()
            file = tmp_path / train.lower() / "parquet" / "data" / f"{name}-0.parquet"
            columns = {
                "image": [encoded(image) for image in pictures(count, seed=seed)],
                "label": [0, 1] * (count // 2),
            }
            write_parquet(tmp_path / f"{train}-parquet" / "data" / file.name, columns)
        for name in (f"folder:{folder}", f"parquet:{tmp_path / f'{train}-parquet' / 'data'}"):
            data = load(name)
            assert [len(part) for part in (data.train, data.validation, data.test)] == [24, 8, 6]


def test_names_that_are_not_understood(tmp_path):
    write_folder(tmp_path / "train", pictures(24))
    write_folder(tmp_path / "Training", pictures(24))
    with pytest.raises(InputError, match="are both of the train part: expected one"):
        load(f"folder:{tmp_path}")
    write_folder(tmp_path / "deep" / "data", pictures(24))
    inner = tmp_path / "deep" / "data"
    with pytest.raises(InputError, match=rf"is a folder among the images of a class.*the data: folder:{inner}$"):
        load(f"folder:{tmp_path / 'deep'}")
    write_parquet(tmp_path / "p" / "train.parquet", {"image": IMAGES, "label": ANIMALS})
    write_parquet(tmp_path / "p" / "extra-0.parquet", {"image": IMAGES, "label": ANIMALS})  # as SVHN has
    load(f"parquet:{tmp_path / 'p'}")
    write_parquet(tmp_path / "p" / "more.parquet", {"image": IMAGES, "label": ANIMALS})
    with pytest.raises(InputError, match=r"more\.parquet: of which part is it\?"):
        load(f"parquet:{tmp_path / 'p'}")


def test_parts_that_are_grey_and_coloured_or_of_other_sizes(tmp_path):
    grey = pictures(24, (5, 4))
    write_folder(tmp_path / "train", grey)
    write_folder(tmp_path / "test", pictures(6, seed=1))
    data = load(f"folder:{tmp_path}")
    assert data.image_shape == (5, 4, 3)
    train = sorted((np.repeat(x[..., None], 3, -1).tobytes(), i % 2) for i, x in enumerate(grey))
    assert everything(data.train, data.validation) == train
    write_folder(tmp_path / "test", pictures(6, (9, 9, 3)))
    with pytest.raises(InputError, match=r"is 9×9 .*, where most are 5×4; append \?size=N"):
        load(f"folder:{tmp_path}")
    assert load(f"folder:{tmp_path}?size=4").image_shape == (4, 4, 3)


def test_a_path_with_a_question_mark(tmp_path):
    write_folder(tmp_path / "what?", pictures(24))
    assert load(f"folder:{tmp_path / 'what?'}").image_shape == (5, 4, 3)
    assert load(f"folder:{tmp_path / 'what?'}?size=2").image_shape == (2, 2, 3)
    write_folder(tmp_path / "x?size=3", pictures(24))
    assert load(f"folder:{tmp_path / 'x?size=3'}").image_shape == (5, 4, 3)


def test_a_class_whose_name_is_no_utf8(tmp_path):
    write_folder(tmp_path, pictures(24), names=(os.fsdecode(b"caf\xe9"), "dog"))
    names = load(f"folder:{tmp_path}").class_names
    assert names == ("caf\\xe9", "dog")
    "".join(names).encode()


@pytest.mark.parametrize("bad", ["~nouser/x", "a\0b", "x" * 5000])
@pytest.mark.parametrize("kind", ["folder", "numpy", "cifar10", "mnist", "parquet"])
def test_paths_that_no_file_can_have(kind, bad):
    with pytest.raises(InputError, match=r"cannot be read: |must be") as caught:
        load(f"{kind}:{bad}")
    assert len(str(caught.value)) < 600


def idx(array):
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


def test_mnist_by_its_own_name_and_kaggles(tmp_path):
    for dotted, nested in ((False, False), (True, False), (False, True)):
        folder = tmp_path / f"{dotted}{nested}"
        folder.mkdir()
        for part, count in (("train", 240), ("t10k", 50)):
            for what, content in (("images-idx3", pictures(count, (6, 5))), ("labels-idx1", np.arange(count) % 10)):
                name = f"{part}-{what}-ubyte".replace("-idx", ".idx" if dotted else "-idx")
                path = folder / name / name if nested else folder / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(idx(content))
        data = load(f"mnist:{folder}")
        assert data.class_names == tuple("0123456789")
        assert len(data.test) == 50
    assert load(f"fashion-mnist:{folder}").class_names[7] == "sneaker"


def test_the_names_of_medmnist_and_keras(tmp_path):
    made = arrays(
        train_labels=(np.arange(36) % 3)[:, None].astype(np.uint8),
        val_images=pictures(9),
        val_labels=np.arange(9)[:, None] % 3,
    )
    np.savez(tmp_path / "medmnist.npz", **made)
    data = load(f"numpy:{tmp_path / 'medmnist.npz'}")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [36, 9, 6]
    keras = {
        f"{x}_{part}": made[f"{part}_{name}"]
        for part in ("train", "test")
        for x, name in (("x", "images"), ("y", "labels"))
    }
    np.savez(tmp_path / "mnist.npz", **keras)
    assert len(load(f"numpy:{tmp_path / 'mnist.npz'}").test) == 6
    np.savez(tmp_path / "both.npz", **keras, **made)
    with pytest.raises(InputError, match="has both train_images and x_train"):
        load(f"numpy:{tmp_path / 'both.npz'}")


def test_channels_first_is_noticed(tmp_path):
    name = write_npz(tmp_path / "x.npz", train_images=pictures(36, (3, 8, 8)), test_images=pictures(6, (3, 8, 8)))
    with pytest.raises(InputError, match=r"\[n, channels, height, width\], of which np.moveaxis\(images, 1, -1\)"):
        load(name)


# What no file should do


def npz_of(path, members, compress=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return f"numpy:{path}"


def npy(header, content=b"", version=(1, 0)):
    said = repr(header).encode() if isinstance(header, dict) else header
    length = struct.pack("<H" if version == (1, 0) else "<I", len(said))
    return b"\x93NUMPY" + bytes(version) + length + said + content


HEADER = {"descr": "|u1", "fortran_order": False, "shape": (36, 5, 4, 3)}
NPY = {
    "other header": (npy(b"{]"), "cannot be read"),
    "no dictionary": (npy(b"3"), "cannot be read"),
    "other version": (npy(HEADER, version=(9, 0)), r"of npy's version \(9, 0\)"),
    "unicode names": (npy(HEADER, version=(3, 0)), r"of npy's version \(3, 0\)"),
    "huge": (npy(HEADER | {"shape": (2**62, 2**62)}), "of shape .* in .* bytes"),
    "negative": (npy(HEADER | {"shape": (-36, 5)}), "of shape .* in .* bytes"),
    "no size": (npy(HEADER | {"descr": "|S0"}), "of shape .* in .* bytes"),
    "deep": (npy(b"(" * 5000), "cannot be read"),
    "short": (npy(HEADER, bytes(99)), "of shape .* in .* bytes"),
    "long": (npy(HEADER, bytes(2161)), "of shape .* in .* bytes"),
    "object": (npy(HEADER | {"descr": "|O"}, bytes(2160)), "Object arrays cannot be loaded"),
    "text": (b"hello", "cannot be read"),
    "nothing": (b"", "cannot be read"),
}


@pytest.mark.parametrize("kind", NPY)
def test_an_array_that_is_not_what_it_says(tmp_path, kind):
    content, message = NPY[kind]
    members = {name: npy_bytes(array) for name, array in arrays().items()} | {"train_images": content}
    with pytest.raises(InputError, match=f"x.npz: .*{message}"):
        load(npz_of(tmp_path / "x.npz", members))


def npy_bytes(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_names_of_classes_that_numpy_has_as_bytes(tmp_path):
    name = write_npz(tmp_path / "x.npz", class_names=np.array(["café".encode(), b"dog", b"emu"]))
    assert load(name).class_names == ("café", "dog", "emu")
    for wrong, message in (
        (np.array([b"caf\xe9"] * 3), "can't decode byte"),
        (np.array([], "U1"), "names .* are none"),
    ):
        with pytest.raises(InputError, match=rf"x\.npz: .*{message}"):
            load(write_npz(tmp_path / "x.npz", class_names=wrong))


def test_text_that_is_no_unicode(tmp_path):
    members = {name: npy_bytes(array) for name, array in arrays().items()}
    header = {"descr": "<U1", "fortran_order": False, "shape": (3,)}
    for code in (0x7FFFFFFF, 0xD800):
        members["class_names"] = npy(header, struct.pack("<3I", 65, code, 66))
        with pytest.raises(InputError, match=r"x.npz: cannot be read: [^(]*$"):
            load(npz_of(tmp_path / "x.npz", members))


MUCH = 8 << 20  # of zeros, in some ten thousand bytes


def test_what_unfolds_too_far_is_refused_before_it_is_there(tmp_path):
    """Of each kind, a small file that would become a large one, under a limit of 1 MB."""
    limit = 1 << 20
    zeros = npy(HEADER | {"shape": (MUCH,)}, bytes(MUCH))
    members = {name: npy_bytes(array) for name, array in arrays().items()} | {"train_images": zeros}
    names = [npz_of(tmp_path / "x.npz", members)]
    folder = tmp_path / "idx"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros((8, 1024, 1024), np.uint8))))
    names.append(f"mnist:{folder}")
    for module in (gzip, bz2, lzma):
        path = tmp_path / f"x.tar.{module.__name__}"
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w") as archive:
            info = tarfile.TarInfo("x/data_batch_1.bin")
            info.size = MUCH
            archive.addfile(info, io.BytesIO(bytes(MUCH)))
        path.write_bytes(module.compress(made.getvalue()))
        names.append(f"cifar10:{path}")
    repeated = pyarrow.array([0] * 3000).cast(pyarrow.int32())
    value = pyarrow.DictionaryArray.from_arrays(repeated, pyarrow.array([bytes(1 << 16)], pyarrow.binary()))
    columns = {"image": value.cast(pyarrow.binary()), "label": [0, 1] * 1500}
    names.append(f"parquet:{write_parquet(tmp_path / 'x.parquet', columns)}")
    for name in names:
        with pytest.raises(InputError, match=r"would unfold a file of .* bytes to .* bytes; allowed: 1,048,576"):
            load(name, limit=limit)


def test_a_file_with_holes_in_an_archive(tmp_path):
    header = tarfile.TarInfo("x/data_batch_1.bin")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 512
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"00000000000\0" + b"00000001000\0"  # one piece of 512 bytes
    block[483:495] = b"77777777777\0"  # of 8 GB
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    (tmp_path / "x.tar").write_bytes(bytes(block) + bytes(512 * 3))
    with pytest.raises(InputError, match=r"x\.tar: data_batch_1.bin is a file with holes"):
        load(f"cifar10:{tmp_path / 'x.tar'}")


def test_a_file_with_holes_as_posix_writes_it(tmp_path):
    sparse = {"major": "1", "minor": "0", "realsize": str(8 << 30), "name": "data_batch_1"}
    info = tarfile.TarInfo("data_batch_1")
    info.pax_headers = {f"GNU.sparse.{name}": value for name, value in sparse.items()}
    info.size = 1024
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(b"1\n0\n512\n".ljust(1024, b"\0")))
    with pytest.raises(InputError, match=r"x\.tar: data_batch_1 is a file with holes"):
        load(f"cifar10:{tmp_path / 'x.tar'}")


def test_links_in_an_archive_are_not_followed(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, target in (("test_batch", "nowhere"), ("a", "b"), ("b", "a"), ("data_batch_1", "/dev/zero")):
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, target
                archive.addfile(info)
    with pytest.raises(InputError, match=r"x\.tar: lacks .*; it has no file of the data set"):
        load(f"cifar10:{path}")


@pytest.mark.parametrize("module", [gzip, bz2, lzma])
def test_damaged_archives(tmp_path, module):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        info = tarfile.TarInfo("data_batch_1.bin")
        info.size = 9999
        archive.addfile(info, io.BytesIO(np.random.default_rng(0).bytes(9999)))
    whole = module.compress(made.getvalue())
    path = tmp_path / "x.tar"
    for damaged in (whole[: len(whole) // 2], whole[:200] + b"\xff" * 99 + whole[299:], whole[:20], whole[:6]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"x\.tar: (cannot be read|lacks)"):
            load(f"cifar10:{path}")


def test_damaged_archives_of_arrays(tmp_path):
    """Deflated bytes that are none, a way of packing that zipfile lacks, and a password."""
    path = tmp_path / "x.npz"
    np.savez_compressed(path, **arrays())
    whole = path.read_bytes()
    entry = whole.index(b"PK\x01\x02")
    start = 30 + len("train_images.npy") + int.from_bytes(whole[28:30], "little")  # behind the header of the first

    def changed(*places):
        content = bytearray(whole)
        for place, new in places:
            content[place : place + len(new)] = new
        return bytes(content)

    for content, message in (
        (changed((start, b"\xff" * 40)), "Error -3 while decompressing data"),
        (changed((8, b"\x63"), (entry + 10, b"\x63")), "That compression method is not supported"),
        (changed((6, b"\x01"), (entry + 8, b"\x01")), "is encrypted, password required"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"x\.npz: cannot be read: .*{message}"):
            load(f"numpy:{path}")


def test_special_files_are_not_read(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    write_folder(tmp_path / "images", pictures(24))
    os.mkfifo(tmp_path / "images" / "cat" / "pipe.png")
    os.symlink("/dev/zero", tmp_path / "zero")
    for name in (
        f"folder:{tmp_path / 'images'}",
        *(f"{kind}:{tmp_path / file}" for kind in ("numpy", "cifar10", "parquet") for file in ("pipe", "zero")),
    ):
        with pytest.raises(InputError, match="is a pipe, a socket or a device, not a regular file"):
            load(name)
    folder = tmp_path / "idx"
    folder.mkdir()
    os.mkfifo(folder / "train-images-idx3-ubyte")
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte: cannot be read: .*is a pipe"):
        load(f"fashion-mnist:{folder}")


@pytest.mark.parametrize("shape", [(0, 0, 0), (240, 0, 0), (2**32 - 1, 0, 1), (2**32 - 1,) * 3])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_of_nothing_and_of_everything(tmp_path, shape, packed):
    content = bytes([0, 0, 8, 3]) + struct.pack(">3I", *shape)
    path = tmp_path / f"train-images-idx3-ubyte{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(InputError, match=rf"{path.name}: .*in its header"):
        load(f"mnist:{tmp_path}")
