"""Pickles from outside, walked before anything is built.

An unpickler obeys: it hashes what it is told to use as a key (a tuple a million deep ends the process, one that holds
itself twice at each of forty levels never ends), makes room for an index that is named (nine bytes ask for 4 GB), and
calls what it finds. So the instructions are walked first, on a stack of what each would make: its kind, its depth and
its length. Only what a dictionary of tensors, arrays, text and numbers needs is let through.
"""

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import IO, Any

from jaxattn.files import Clipped, shown

INSTRUCTIONS = 1_000_000  # a large network's pickle has a tenth of that; each makes some hundred bytes at most
DEPTH = 64  # of things in things
BITS = 128  # of an integer: products of longer ones take long
SMALL_KEY = 2**60  # an integer below is its own hash, so not all of a dictionary's keys can fall on one place

TEXT = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"}
BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
INTEGERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"}
OTHERS = {"NONE", "NEWTRUE", "NEWFALSE", "FLOAT", "BINFLOAT"}
EMPTY = {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE"}
MADE_OF_ALL = {"TUPLE", "LIST", "DICT"}  # of all since the mark
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
PUTS, GETS = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}


class _Thing:
    """What an instruction would make.

    `key`: it may be a dictionary's key. `text`: what it says, of text. `encodes`: a call of it makes bytes.
    """

    __slots__ = ("depth", "encodes", "key", "length", "text")

    def __init__(self, key: bool = False, text: str | None = None, encodes: bool = False):
        self.key, self.text, self.encodes, self.depth, self.length = key, text, encodes, 0, 0

    def hold(self, parts: list["_Thing"]) -> "_Thing":
        """Takes parts in."""
        self.length += len(parts)
        self.depth = max([self.depth, *(part.depth + 1 for part in parts)])
        if self.depth > DEPTH:
            raise pickle.UnpicklingError(f"things in things, more than {DEPTH} deep")
        return self


def load(
    content: bytes,
    make: Callable[[IO[bytes]], pickle.Unpickler],
    admit: Callable[[str, str], Any],
    objects: bool = False,
) -> Any:
    """What a pickle holds, built by an unpickler after the pickle was walked.

    Args:
      content: the pickle.
      make: the unpickler of a stream.
      admit: raises `pickle.UnpicklingError` for a module and name that the pickle must not name.
      objects: whether it may make objects of what it names.

    Raises:
      ValueError: the pickle is damaged, or does what none of these does, in words.
    """
    with_words(lambda: walk(io.BytesIO(content), admit, objects))
    return with_words(make(io.BytesIO(content)).load)


def with_words(act: Callable[[], Any]) -> Any:
    """What `act` returns; whatever it raises is a ValueError that says what is wrong with the pickle."""
    try:
        return act()
    except pickle.UnpicklingError as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # what a damaged or a hostile pickle makes of the unpickler's own stack
        raise ValueError(f"damaged: {type(error).__name__}: {str(error)[:200]}") from error


def _instructions(stream: Any) -> Iterator[tuple[str, Any]]:
    for opcode, argument, _ in pickletools.genops(stream):
        yield opcode.name, argument


def walk(stream: IO[bytes] | Clipped, admit: Callable[[str, str], Any], objects: bool = False):
    """Reads one pickle's instructions, after which the stream stands behind them.

    Raises:
      pickle.UnpicklingError: an instruction, or what it would make, is not let through; in words.
    """
    machine = _Machine(admit, objects)
    for name, argument in _instructions(stream):
        machine.obey(name, argument)
        if machine.work > INSTRUCTIONS:
            raise pickle.UnpicklingError(f"more than {INSTRUCTIONS:,} instructions")
    if len(machine.stack) != 1 or machine.below:
        raise pickle.UnpicklingError("damaged: it ends with other than one thing on its stack")


class _Machine:
    """An unpickler that builds nothing: its stack and its memo hold what each instruction would make."""

    def __init__(self, admit: Callable[[str, str], Any], objects: bool):
        self.admit, self.objects = admit, objects
        self.stack: list[_Thing] = []
        self.below: list[list[_Thing]] = []  # the stacks under each mark
        self.memo: dict[int, _Thing] = {}
        self.work = 0  # what a call copies of its arguments counts too: one list may be given to a call again and again

    def obey(self, name: str, argument: Any):
        """Does one instruction, by the first of these that knows it."""
        self.work += 1
        if (thing := _alone(name, argument)) is not None:
            self.stack.append(thing)
            return
        known = self._moves(name, argument) or self._holds(name) or self._names_or_calls(name, argument)
        if not known and name not in ("PROTO", "FRAME", "STOP"):
            raise pickle.UnpicklingError(f"has the instruction {name}; allowed: those of dictionaries, lists and text")

    def _since_mark(self) -> list[_Thing]:
        """All since the last mark, which is taken away with them."""
        parts, self.stack = self.stack, self.below.pop()
        return parts

    def _moves(self, name: str, argument: Any) -> bool:
        """Marks, takes away, remembers, and fetches what was remembered."""
        if name == "MARK":
            self.below.append(self.stack)
            self.stack = []
        elif name == "POP_MARK" or (name == "POP" and not self.stack):
            self._since_mark()
        elif name == "POP":
            self.stack.pop()
        elif name in PUTS or name == "MEMOIZE":
            index = len(self.memo) if name == "MEMOIZE" else argument
            if not 0 <= index < INSTRUCTIONS:
                raise pickle.UnpicklingError(f"remembers under the number {index}; allowed: up to {INSTRUCTIONS:,}")
            self.memo[index] = self.stack[-1]
        elif name in GETS:
            if argument not in self.memo:
                raise pickle.UnpicklingError(f"refers to number {argument}, which is not there")
            self.stack.append(self.memo[argument])
        else:
            return False
        return True

    def _holds(self, name: str) -> bool:
        """Makes tuples, lists and dictionaries of what is on the stack, or puts it into one that is there."""
        stack = self.stack
        if name in MADE_OF_ALL:
            parts = self._since_mark()
            if name == "DICT":
                _check_keys(parts)
            self.stack.append(_Thing().hold(parts))
        elif name in TUPLES:
            parts = stack[-TUPLES[name] :]
            if len(parts) < TUPLES[name]:
                raise pickle.UnpicklingError("a tuple of more than there is")
            del stack[-TUPLES[name] :]
            stack.append(_Thing().hold(parts))
        elif name == "APPEND":
            part = stack.pop()
            stack[-1].hold([part])
        elif name == "SETITEM":
            parts = [stack.pop(-2), stack.pop()]
            _check_keys(parts)
            stack[-1].hold(parts)
        elif name in ("APPENDS", "SETITEMS"):
            parts = self._since_mark()
            if name == "SETITEMS":
                _check_keys(parts)
            self.stack[-1].hold(parts)
        else:
            return False
        return True

    def _names_or_calls(self, name: str, argument: Any) -> bool:
        """What a pickle names must be let in; what it calls holds what it is called with."""
        stack = self.stack
        if name == "GLOBAL":
            self.admit(*argument.split(" ", 1))
            stack.append(_Thing(encodes=argument == "_codecs encode"))
        elif name == "STACK_GLOBAL":
            what, module = stack.pop().text, stack.pop().text
            if module is None or what is None:
                raise pickle.UnpicklingError("names something by what is no name")
            self.admit(module, what)
            stack.append(_Thing(encodes=(module, what) == ("_codecs", "encode")))
        elif name == "REDUCE" or (name == "NEWOBJ" and self.objects):
            given, called = stack.pop(), stack.pop()
            self.work += given.length
            stack.append(_Thing(called.encodes).hold([given, called]))  # so Python 3 writes bytes for Python 2
        elif name == "BUILD":
            state = stack.pop()
            self.work += state.length
            stack[-1].hold([state])
        elif name == "BINPERSID":
            stack.append(_Thing().hold([stack.pop()]))
        else:
            return False
        return True


def _alone(name: str, argument: Any) -> _Thing | None:
    """What an instruction makes of its argument alone; None if it makes nothing so."""
    if name in TEXT:
        return _Thing(True, argument if len(argument) < 200 else None)
    if name in BYTES:
        return _Thing(True)
    if name in INTEGERS:
        if argument.bit_length() > BITS:
            raise pickle.UnpicklingError(f"an integer of {argument.bit_length()} bits; allowed: {BITS}")
        return _Thing(not isinstance(argument, bool) and abs(argument) < SMALL_KEY)
    return _Thing() if name in OTHERS or name in EMPTY else None


def _check_keys(parts: list[_Thing]):
    if len(parts) % 2:
        raise pickle.UnpicklingError("damaged: a key without a value")
    if not all(key.key for key in parts[::2]):
        raise pickle.UnpicklingError("a key that is neither text, bytes nor a small integer")


class Ordered:
    """As `collections.OrderedDict`, whose keys are checked where they come as pairs: so Python 2 wrote them."""

    def __init__(self):
        self._left = INSTRUCTIONS  # pairs: one list of them may be given again and again

    def __setstate__(self, state: Any):
        """A pickle may set the attributes of what it is given."""
        raise pickle.UnpicklingError("changes what it was given")

    def __call__(self, pairs: Any = ()) -> dict[Any, Any]:
        self._left -= len(pairs)
        for pair in pairs:
            if not isinstance(pair, list | tuple) or len(pair) != 2 or type(pair[0]) not in (str, bytes, int):
                raise pickle.UnpicklingError(f"an ordered dictionary of {shown(pair)}; allowed: pairs of key and value")
        if self._left < 0:
            raise pickle.UnpicklingError(f"more than {INSTRUCTIONS:,} keys")
        return OrderedDict(pairs)
