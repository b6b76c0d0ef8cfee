"""What a few hundred bytes of pickle would do to an unpickler: hang, crash, or take all memory. Here it is refused."""

import pickle
import struct
import time
import zipfile

import pytest

from jaxattn import pickles
from jaxattn.torch_file import read_torch
from jaxattn.train.data.safe_pickle import read_pickle

MERSENNE = 2**61 - 1  # an integer's hash is its remainder by this
DEEP = b"\x80\x02}(" + b"K\x01" + b"\x85" * 300_000 + b"K\x01u."  # {((((1,),),),): 1}
TWICE = b"\x80\x04K\x01" + b"2\x86" * 40 + b"."  # (x, x) of (x, x), forty times
GLOBALS = b"ccollections\nOrderedDict\n"


def collisions(count):
    keys = b"".join(b"\x8a\x0b" + (MERSENNE * n).to_bytes(11, "little", signed=True) + b"N" for n in range(1, count))
    return b"\x80\x02}(" + keys + b"u."


def repeated(count):
    """A list of pairs, from which an ordered dictionary is made again and again."""
    pairs = b"](" + b"".join(b"(X\x08\x00\x00\x00%08dNt" % n for n in range(1000)) + b"e\x85q\x01"
    return b"\x80\x02]" + pairs + b"0" + GLOBALS + b"q\x020(" + b"h\x02h\x01R" * count + b"e."


HOSTILE = {
    "a key that is a tuple": (
        b"\x80\x02}K\x01K\x02\x86K\x01s.",
        "a key that is neither text, bytes nor a small integer",
    ),
    "a key that is deep": (DEEP, "more than 64 deep"),
    "a value that is deep": (b"\x80\x02}X\x01\x00\x00\x00a" + b"]" * 99 + b"a" * 98 + b"s.", "more than 64 deep"),
    "a key that holds itself twice": (b"\x80\x04}K\x01" + b"2\x86" * 40 + b"K\x01s.", "the instruction DUP"),
    "the same by its memo": (
        b"\x80\x04}K\x01\x94" + b"".join(b"h%ch%c\x86\x94" % (n, n) for n in range(40)) + b"K\x01s.",
        "a key that is neither|other than one thing",
    ),
    "a memo of 4 GB": (
        b"\x80\x02}r" + struct.pack("<I", 2**28) + b".",
        r"under the number 268435456; allowed: up to 50,000",
    ),
    "keys that collide": (collisions(20_000), "a key that is neither text, bytes nor a small integer"),
    "a long integer": (b"\x80\x02}X\x01\x00\x00\x00a\x8b" + struct.pack("<I", 99) + b"\x7f" * 99 + b"s.", "791 bits"),
    "more than can be": (b"\x80\x02](" + b"}" * 50_001 + b"e.", "more than 50,000 instructions"),
    "text longer than the file": (b"\x80\x02X\xff\xff\xff\x7fabc.", "damaged: ValueError: expected 2147483647 bytes"),
    "a set": (b"\x80\x04\x8f.", "the instruction EMPTY_SET"),
    "an object made anew": (b"\x80\x02" + GLOBALS + b")\x81.", "the instruction NEWOBJ|names collections"),
    "an underflow": (b"\x80\x02}ss.", "damaged: IndexError"),
    "a mark that is not there": (b"\x80\x02}u.", "damaged: IndexError"),
    "what is not remembered": (b"\x80\x02h\x05.", "refers to number 5, which is not there"),
    "two things": (b"\x80\x02}}.", "other than one thing"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle_is_refused_at_once(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(pickles, "INSTRUCTIONS", 50_000)  # to be quick
    content, message = HOSTILE[kind]
    path = tmp_path / "weights.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", content)
    legacy = tmp_path / "legacy.pth"
    legacy.write_bytes(content)
    start = time.monotonic()
    for read in (lambda: read_pickle(content), lambda: read_torch(path), lambda: read_torch(legacy)):
        with pytest.raises(ValueError, match=message) as caught:
            read()
        assert len(str(caught.value)) < 1000
    assert time.monotonic() - start < 60


def test_one_list_is_not_copied_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles, "INSTRUCTIONS", 50_000)
    path = tmp_path / "weights.pth"
    path.write_bytes(repeated(2_000))
    with pytest.raises(ValueError, match="more than 50,000 keys"):
        read_torch(path)


def test_values_in_messages_are_cut(tmp_path):
    deep = b"K\x01" + b"\x85" * 60
    for found in (b"X\x40\x42\x0f\x00" + b"x" * 1_000_000, deep, b"(" + b"K\x01" * 100_000 + b"t"):
        with zipfile.ZipFile(tmp_path / "weights.pth", "w") as archive:
            archive.writestr("w/data.pkl", b"\x80\x02" + found + b"Q.")
        with pytest.raises(ValueError, match=r"refers to .*; allowed: a storage") as caught:
            read_torch(tmp_path / "weights.pth")
        assert len(str(caught.value)) < 500


def test_nothing_that_a_reader_gives_can_be_changed():
    """The BUILD instruction sets attributes, slots too: of the counters that stop it, for instance."""
    path = b"\x80\x02" + GLOBALS + b"N}X\x05\x00\x00\x00_leftK\x7fs\x86b."
    with pytest.raises(ValueError, match="names collections"):
        read_pickle(path)
    encode = b"\x80\x02c_codecs\nencode\nN}X\x05\x00\x00\x00_madeK\x7fs\x86b."
    with pytest.raises(ValueError, match="changes what it was given"):
        read_pickle(encode)


def test_what_python_2_and_3_write_is_read():
    content = {b"a": [1, 2.5, None, True, (1,), {"b": b"c"}], "text": "é" * 300, "nested": [[[]]]}
    for protocol in range(6):
        found = read_pickle(pickle.dumps(content, protocol=protocol))
        assert found == {"a": content[b"a"], "text": content["text"], "nested": [[[]]]}
