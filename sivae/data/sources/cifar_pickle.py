"""A batch of CIFAR-10's python version without running what is in it: pickles can call anything.

The opcodes are looked at first, and only those that such files are made of may occur; then it is unpickled with
stand-ins that keep what they are given instead of numpy's classes; then the pixels are bytes of a known number.
"""

import io
import pickle
import pickletools

import numpy as np

PIXELS = 3 * 32 * 32
MAX_MEMO = 2**20  # the unpickler allocates as many places as the largest number it is told
# As Python 2 wrote the published files (protocol 2, strings are bytes), and as Python 3 would write them again.
OPCODES = frozenset(
    "PROTO STOP MARK EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "SHORT_BINSTRING BINSTRING BINUNICODE NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 BINPUT LONG_BINPUT BINGET "
    "LONG_BINGET GLOBAL REDUCE BUILD".split()
)


class _Kept:
    """Stands for a numpy array or type: what it was made with and what its state was set to."""

    def __init__(self, *arguments):
        self.arguments, self.state = arguments, None

    def __setstate__(self, state):
        self.state = state


class _Bytes:
    """Stands for _codecs.encode, through which Python 3 writes bytes in protocol 2."""

    def __new__(cls, text, encoding):
        if encoding != "latin1":
            raise ValueError("an encoding that is not latin1")
        return text.encode("latin1")


STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Kept,
    ("numpy._core.multiarray", "_reconstruct"): _Kept,
    ("numpy", "ndarray"): _Kept,
    ("numpy", "dtype"): _Kept,
    ("_codecs", "encode"): _Bytes,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) not in STAND_INS:
            raise ValueError(f"it asks for {module}.{name}")
        return STAND_INS[module, name]


def read_batch(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(pixels uint8 [N, 3072], labels int64 [N]). Raises ValueError, or whatever pickle does, on other content."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in OPCODES:
            raise ValueError(f"the pickle holds {opcode.name}, which this format has no use for")
        if opcode.name == "LONG_BINPUT" and argument > MAX_MEMO:
            raise ValueError("the pickle asks for a memo of absurd size")
    content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    if type(content) is not dict:
        raise ValueError("it is no dictionary")
    content = {key.decode() if type(key) is bytes else key: value for key, value in content.items()}
    array, labels = content.get("data"), content.get("labels")
    # numpy's state of an array: version, shape, type, whether in Fortran's order, bytes
    if type(array) is not _Kept or type(array.state) is not tuple or len(array.state) != 5:
        raise ValueError("its `data` is no array")
    _, shape, kind, fortran, pixels = array.state
    known = type(kind) is _Kept and kind.arguments[:1] in (("u1",), (b"u1",)) and type(pixels) is bytes
    if not known or fortran or type(shape) is not tuple or len(shape) != 2 or shape[1] != PIXELS:
        raise ValueError(f"its `data` is not uint8 of [N, {PIXELS}]")
    if type(shape[0]) is not int or len(pixels) != shape[0] * PIXELS:
        raise ValueError("its `data` is not as long as its shape says")
    whole = type(labels) is list and len(labels) == shape[0] and all(type(v) is int and 0 <= v < 2**31 for v in labels)
    if not whole:
        raise ValueError(f"its `labels` are not {shape[0]} whole numbers")
    return np.frombuffer(pixels, np.uint8).reshape(shape), np.array(labels, np.int64)
