"""Image files in folders and in parquet files: decoded as Pillow decodes them, and a bad one named or left out."""

import io
import json

import numpy as np
import pytest

from jaxattn.train.data import load

Image = pytest.importorskip("PIL.Image")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")  # pyarrow does not import it

CLASSES = ("cat", "dog")


def encoded(array, form="PNG"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, form)
    return file.getvalue()


def pictures(count, shape=(5, 4, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape)).astype(np.uint8)


def everything(*sources):
    """(image, label) of all, sorted."""
    fetched = [source.fetch(np.arange(len(source))) for source in sources]
    return sorted((x.tobytes(), int(y)) for images, labels in fetched for x, y in zip(images, labels, strict=True))


def expected(images):
    return sorted((x.tobytes(), i % 2) for i, x in enumerate(images))


def write_folder(folder, images):
    """Image i is of class i mod 2."""
    for i, image in enumerate(images):
        inner = folder / CLASSES[i % 2]
        inner.mkdir(parents=True, exist_ok=True)
        (inner / f"{i:03}.png").write_bytes(encoded(image))


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path / "train", pictures(24))
    write_folder(tmp_path / "test", pictures(6, seed=1))
    return tmp_path


def test_folder(folder):
    (folder / "train" / "cat" / ".DS_Store").write_bytes(b"")
    data = load(f"folder:{folder}")
    assert data.class_names == CLASSES
    assert data.image_shape == (5, 4, 3)
    assert everything(data.train, data.validation) == expected(pictures(24))
    assert everything(data.test) == expected(pictures(6, seed=1))
    assert len(data.validation) == 2


def test_folder_without_parts_keeps_the_same_test_images_for_every_seed(tmp_path):
    write_folder(tmp_path, pictures(40))
    one, two = load(f"folder:{tmp_path}", seed=1), load(f"folder:{tmp_path}", seed=2)
    assert everything(one.train, one.validation, one.test) == expected(pictures(40))
    assert everything(one.test) == everything(two.test)
    assert everything(one.validation) != everything(two.validation)
    assert [len(part) for part in (one.train, one.validation, one.test)] == [30, 2, 8]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_folder_is_the_test_where_there_is_no_other(folder, name):
    write_folder(folder / name, pictures(8, seed=2))
    data = load(f"folder:{folder}")
    assert everything(data.validation) == expected(pictures(8, seed=2))
    assert everything(data.train) == expected(pictures(24))
    for path in (folder / "test").rglob("*.png"):
        path.unlink()
    for path in (*(folder / "test").iterdir(), folder / "test"):
        path.rmdir()
    data = load(f"folder:{folder}")
    assert everything(data.test) == expected(pictures(8, seed=2))
    assert everything(data.train, data.validation) == expected(pictures(24))


def test_grey_images_have_one_channel_and_a_coloured_one_makes_all_three(tmp_path):
    grey = pictures(24, (5, 4))
    write_folder(tmp_path, grey)
    data = load(f"folder:{tmp_path}")
    assert data.image_shape == (5, 4, 1)
    assert everything(data.train, data.validation, data.test) == expected(grey[..., None])
    (tmp_path / "cat" / "000.png").write_bytes(encoded(pictures(1)[0]))
    assert load(f"folder:{tmp_path}").image_shape == (5, 4, 3)


def test_jpeg(folder):
    smooth = np.broadcast_to(np.arange(0, 240, 30, dtype=np.uint8)[:, None, None], (8, 8, 3)).copy()
    for path in folder.rglob("*.png"):
        path.with_suffix(".JPEG").write_bytes(encoded(smooth, "JPEG"))
        path.unlink()
    images, _ = load(f"folder:{folder}").test.fetch(np.arange(6))
    assert np.abs(images.astype(int) - smooth).max() < 12


def test_size_makes_all_of_one_size_from_their_middle(tmp_path):
    flat = [np.full((6, 16, 3), 9 * i, np.uint8) for i in range(12)]
    for i in range(12):
        flat[i][:, :1] = flat[i][:, 15:] = 255 - 9 * i  # far off the middle
        flat[i] = flat[i] if i % 3 else flat[i].transpose(1, 0, 2)
    write_folder(tmp_path, flat)
    data = load(f"folder:{tmp_path}?size=3")
    assert data.image_shape == (3, 3, 3)
    wanted = [np.full((3, 3, 3), 9 * i, np.uint8) for i in range(12)]
    assert everything(data.train, data.validation, data.test) == expected(wanted)
    with pytest.raises(ValueError, match=r"is 16×6 \(height×width\), where most are 6×16; append \?size=N"):
        load(f"folder:{tmp_path}")


BAD = {
    "text": (b"hello", "no image of JPEG, PNG, WEBP, TIFF or BMP"),
    "empty": (b"", "no image of JPEG, PNG, WEBP, TIFF or BMP"),
    "a gif": (encoded(pictures(1)[0], "GIF"), "no image of JPEG, PNG, WEBP, TIFF or BMP"),
    "truncated png": (encoded(pictures(1, (50, 40, 3))[0])[:-600], "cannot be decoded: .*truncated"),
    "truncated jpeg": (encoded(pictures(1, (50, 40, 3))[0], "JPEG")[:-300], "cannot be decoded: .*truncated"),
    "damaged": (encoded(pictures(1, (50, 40, 3))[0]).replace(b"IDAT", b"IDAT\xff\xff"), "cannot be decoded: "),
    "16 bits": (encoded(np.full((50, 40), 999, np.uint16)), "has pixels of mode I;16, expected 8 bits a channel"),
    "another size": (encoded(pictures(1, (40, 50, 3))[0]), "is 40×50 .*, where most are 50×40"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_image_is_named_or_left_out(tmp_path, kind):
    content, message = BAD[kind]
    images = pictures(24, (50, 40, 3))
    write_folder(tmp_path, images)
    bad = tmp_path / "dog" / "bad.png"
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=f"bad.png: {message}") as caught:
        load(f"folder:{tmp_path}")
    assert str(bad) in str(caught.value)
    data = load(f"folder:{tmp_path}", skip_bad=True)
    assert len(data.skipped) == 1
    assert data.skipped[0].startswith(f"{bad}: ")
    assert everything(data.train, data.validation, data.test) == expected(images)


def test_a_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(load(f"folder:~/{folder.name}").test) == 6


def test_a_folder_among_the_images(folder):
    (folder / "train" / "dog" / "inner").mkdir()
    with pytest.raises(ValueError, match=r"dog/inner: is a folder among the images of a class, expected image files$"):
        load(f"folder:{folder}")


def test_an_empty_class(folder):
    (folder / "train" / "emu").mkdir()
    with pytest.raises(ValueError, match=r"train: class 'emu' has no training image"):
        load(f"folder:{folder}")
    data = load(f"folder:{folder}", skip_bad=True)
    assert data.class_names == ("cat", "dog")  # an output that was never trained would be a guess
    assert data.skipped == (f"{folder / 'train'}: class 'emu' has no training image",)


def test_folders_that_cannot_be(folder, tmp_path):
    (folder / "test" / "emu").mkdir()
    with pytest.raises(ValueError, match=r"test/emu: no class of the training images: cat, dog"):
        load(f"folder:{folder}")
    with pytest.raises(ValueError, match=r"dog: has no folders: expected one for each class"):
        load(f"folder:{folder / 'train' / 'dog'}")
    with pytest.raises(ValueError, match=r"nowhere: cannot be read"):
        load(f"folder:{tmp_path / 'nowhere'}")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"empty: has no images"):
        load(f"folder:{tmp_path / 'empty'}")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("size=0", r"option size \(='0'\) must be a whole number of at least 1"),
        ("size=x", r"option size \(='x'\) must be a whole number"),
        ("side=3", r"option \(='side'\) must be one of size"),
        ("size", "must be NAME=VALUE"),
        ("size=3&size=4", "must name each option once"),
    ],
)
def test_options_that_cannot_be(folder, option, message):
    with pytest.raises(ValueError, match=message):
        load(f"folder:{folder}?{option}")


def test_images_that_do_not_fit_into_memory(folder):
    with pytest.raises(ValueError, match=r"the images decoded are .* GiB, and this machine has .*append \?size=N"):
        load(f"folder:{folder}?size=1000000")


# parquet


def write_parquet(path, images, labels=None, struct=True, names=("cat", "dog"), columns=("image", "label"), extra=()):
    files = [image if isinstance(image, bytes | None) else encoded(image) for image in images]
    column = [{"bytes": file, "path": None} for file in files] if struct else files
    table = pyarrow.table(
        {columns[0]: column, columns[1]: labels or [i % 2 for i in range(len(images))], **dict(extra)}
    )
    if names:
        features = {columns[1]: {"names": list(names), "_type": "ClassLabel"}, columns[0]: {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path)


@pytest.fixture
def parquet(tmp_path):
    images = pictures(24)
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", images[:10])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", images[10:])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", pictures(6, seed=1))
    return tmp_path


def test_parquet(parquet):
    data = load(f"parquet:{parquet}")
    assert data.class_names == CLASSES
    assert everything(data.train, data.validation) == expected(pictures(24))
    assert everything(data.test) == expected(pictures(6, seed=1))
    assert load(f"parquet:{parquet}?size=2").image_shape == (2, 2, 3)


@pytest.mark.parametrize("columns", [("image", "label"), ("img", "fine_label"), ("picture", "kind")])
@pytest.mark.parametrize("struct", [True, False])
def test_parquet_by_other_names_and_without_metadata(tmp_path, columns, struct):
    write_parquet(tmp_path / "default" / "train" / "0000.parquet", pictures(24), None, struct, None, columns)
    data = load(f"parquet:{tmp_path}")
    assert data.class_names == ("0", "1")
    assert everything(data.train, data.validation, data.test) == expected(pictures(24))


def test_parquet_columns_that_are_asked_for(tmp_path):
    extra = {"coarse": [0] * 24, "thumb": [b""] * 24}
    write_parquet(tmp_path / "train.parquet", pictures(24), columns=("picture", "kind"), extra=extra)
    with pytest.raises(ValueError, match=r"which column is the image\? It has picture \(struct.*append \?image=NAME"):
        load(f"parquet:{tmp_path}")
    with pytest.raises(ValueError, match=r"which column is the label\? It has .*coarse \(int64\)"):
        load(f"parquet:{tmp_path}?image=picture")
    data = load(f"parquet:{tmp_path}?image=picture&label=kind")
    assert data.class_names == CLASSES
    assert everything(data.train, data.validation, data.test) == expected(pictures(24))
    with pytest.raises(ValueError, match=r"which column is the label"):
        load(f"parquet:{tmp_path}?image=picture&label=picture")


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (b"hello", 0, "row 5: no image of JPEG, PNG, WEBP, TIFF or BMP"),
        (None, 0, "row 5: cannot be decoded: the row holds no bytes"),
        (encoded(pictures(1)[0])[:-40], 0, "row 5: cannot be decoded: "),
        (encoded(pictures(1, (4, 4, 3))[0]), 0, "row 5: is 4×4"),
        (encoded(pictures(1)[0]), 2, "row 5: a label is 2, expected 0 to 1"),
        (encoded(pictures(1)[0]), -1, "row 5: a label is -1, expected 0 to 1"),
        (encoded(pictures(1)[0]), None, "row 5: its label is missing"),
    ],
)
def test_a_bad_row_is_named_or_left_out(parquet, image, label, message):
    images, labels = list(pictures(14, seed=3)), [i % 2 for i in range(14)]
    good = [(x.tobytes(), y) for i, (x, y) in enumerate(zip(images, labels, strict=True)) if i != 5]
    images[5], labels[5] = image, label
    path = parquet / "data" / "train-00001-of-00002.parquet"
    write_parquet(path, images, labels)
    with pytest.raises(ValueError, match=message) as caught:
        load(f"parquet:{parquet}")
    assert str(path) in str(caught.value)
    data = load(f"parquet:{parquet}", skip_bad=True)
    assert len(data.skipped) == 1
    assert everything(data.train, data.validation) == sorted([*expected(pictures(24)[:10]), *good])


def test_parquet_files_that_cannot_be(parquet, tmp_path):
    path = parquet / "data" / "train-00001-of-00002.parquet"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"hello" * 99):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"train-00001-of-00002\.parquet: cannot be read"):
            load(f"parquet:{parquet}")
    write_parquet(path, pictures(4), columns=("image", "kind"))
    with pytest.raises(ValueError, match=r"00001-of-00002\.parquet: lacks the column label; it has image, kind"):
        load(f"parquet:{parquet}")
    write_parquet(parquet / "test" / "train.parquet", pictures(4))
    with pytest.raises(ValueError, match=r"test/train\.parquet: is it of test or of train\? Its path in"):
        load(f"parquet:{parquet}")
    with pytest.raises(ValueError, match=r"nowhere: has no \*\.parquet file with the word train"):
        load(f"parquet:{tmp_path / 'nowhere'}")
