"""Bytes of a source's files, at any path or fsspec URL: listed, and read in ranges that are retried and checked.

All goes through `sivae.storage.Folder`, which opens its filesystem in the process that reads.
"""

import io
import os
import random
import re
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from sivae.data.shards import too_much
from sivae.errors import UserError, query_start, shown
from sivae.storage import Folder, permanent

MIN_AHEAD_BYTES, MAX_AHEAD_BYTES = 2**16, 2**23  # what one request for a stretch of a long file asks for
MAX_RATIO = 1032  # deflate cannot make more out of one byte
# What a listing says of a file's version, the best first.
STAMPS = ("ETag", "etag", "md5Hash", "content_md5", "checksum", "mtime", "LastModified", "last_modified", "updated")


def split_url(url: str) -> tuple[str, str]:
    """(its folder, its name) of a file's path or URL; a query stays with the name."""
    cut = url.rfind("/", 0, query_start(url))
    folder, name = url[: cut + 1], url[cut + 1 :]
    return (folder if re.search("(^|/)/$", folder) else folder[:-1]) or ".", name


def ask(folder: Folder, question: Callable):
    """question(), asked again as `Folder.read_ranges` does when the network is at fault; raises the last answer."""
    for attempt in range(folder.attempts):
        try:
            return question()
        except Exception as error:  # noqa: BLE001 - each filesystem has its own
            if isinstance(error, UserError) or permanent(error) or attempt + 1 == folder.attempts:
                raise
        time.sleep(folder.backoff_sec * 2**attempt * (1 + random.random()))


@contextmanager
def damage(where: str, hint: str, kind: type[UserError] = UserError):
    """Whatever is raised within becomes one sentence: `where` cannot be read (...); `hint`.

    Parsers raise nearly anything on hostile bytes: struct.error, OverflowError, RecursionError, MemoryError.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001
        what = shown(error) or type(error).__name__
        raise kind(f"{where} cannot be read ({what[:300]}); {hint}") from None


@dataclass
class File:
    """One file in a folder."""

    folder: Folder
    name: str  # its path below the folder
    size: int  # bytes
    stamp: str  # changes with its content, as far as the filesystem tells

    @property
    def where(self) -> str:
        """As errors name it."""
        return shown(self.folder.join(self.name))

    @property
    def identity(self) -> list:
        """What a fingerprint takes of it."""
        name = self.name if self.folder.is_local else self.name.split("?", 1)[0]
        return [name, self.size, self.stamp]

    def read(self, start: int | None = None, stop: int | None = None, missing: type[UserError] = UserError) -> bytes:
        """The bytes [start, stop), all of them without; raises `missing` when there is no such file."""
        return self.read_many([(start, stop)], missing)[0]

    def read_many(self, ranges: list, missing: type[UserError] = UserError) -> list[bytes]:
        """The bytes of each (start, stop), in one go. Raises UserError when they do not come."""

        def check(i: int, data: bytes):
            start, stop = ranges[i]
            if start is None:
                return None
            if len(data) < stop - start:
                return f"{len(data)} bytes came where {stop - start} were asked for"
            return too_much(self.where, len(data), stop - start)

        found, problems = self.folder.read_ranges([(self.name, *r) for r in ranges], check)
        for _, problem in problems:
            if isinstance(problem, FileNotFoundError):
                raise missing(f"{self.where} is missing; put it back, or remove what names it")
            if isinstance(problem, UserError):
                raise problem
            tried = f", {self.folder.attempts} times" if self.folder.attempts > 1 else ""
            what = problem if isinstance(problem, str) else self.folder.reason(problem)
            raise UserError(
                f"{self.where} could not be read{tried} ({what}); "
                "check the disk, the network and the credentials, and start again"
            )
        return found

    def open(self) -> "RangeFile":
        return RangeFile(self)


class RangeFile(io.BufferedIOBase):
    """A file to seek and read in, over ranges. Never reads past its end, however much is asked for."""

    def __init__(self, file: File):
        self.file, self.position = file, 0
        self.start, self.data, self.ahead = 0, b"", MIN_AHEAD_BYTES  # what lies in memory of it

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.file.size}[whence]
        if position < 0:
            raise ValueError(f"it points to byte {position}")
        self.position = position
        return position

    def read(self, size: int | None = -1) -> bytes:
        start = min(self.position, self.file.size)
        stop = self.file.size if size is None or size < 0 else min(self.file.size, start + size)
        if start < self.start or stop > self.start + len(self.data):
            # Whoever reads on gets longer and longer requests, whoever jumps about short ones.
            follows = self.data and start <= self.start + len(self.data) <= stop
            self.ahead = min(2 * self.ahead, MAX_AHEAD_BYTES) if follows else MIN_AHEAD_BYTES
            self.data = self.file.read(start, max(stop, min(self.file.size, start + self.ahead)))
            self.start = start
        self.position = max(self.position, stop)
        return self.data[start - self.start : stop - self.start]

    read1 = read

    def at(self, start: int, size: int) -> bytes:
        """Bytes [start, start + size), fewer at the end of the file."""
        self.seek(start)
        return self.read(size)


def read_exactly(file, size: int, bound: int) -> np.ndarray:
    """uint8 [size]: all that is left in a stream, which must be `size` bytes.

    Raises ValueError when it is more or less, and before reading when size is over `bound`, the most that
    the stream can hold: a header can declare anything.
    """
    if not 0 <= size <= bound:
        raise ValueError(f"it declares {size} bytes where at most {bound} can be")
    data, done = np.empty(size, np.uint8), 0
    while done < size and (part := file.read(min(size - done, MAX_AHEAD_BYTES))):
        data[done : done + len(part)] = np.frombuffer(part, np.uint8)
        done += len(part)
    if done < size:
        raise ValueError(f"it ends after {done} of {size} bytes")
    if file.read(1):  # reads to the end, where zip and gzip compare their checksums
        raise ValueError(f"it goes on after {size} bytes")
    return data


def check_member(info: zipfile.ZipInfo, bound: int):
    """Raises ValueError unless a zip's member may be read: plain or deflated, and of at most `bound` bytes.

    zipfile bounds what deflate makes of a few bytes by what is asked for, but not bzip2 and lzma.
    """
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
        raise ValueError(f"{info.filename!r} is encrypted, or compressed with something else than deflate")
    if info.file_size > min(bound, MAX_RATIO * info.compress_size):
        raise ValueError(f"{info.filename!r} declares {info.file_size:,} bytes")


def stamp(info: dict) -> str:
    return next((str(info[key]) for key in STAMPS if info.get(key)), "") or str(info.get("created", ""))


def find_file(folder: Folder, name: str) -> File:
    """Raises UserError when there is no such file, or nobody says how long it is."""
    path = folder.join(name)
    with damage(shown(path), "check its address and credentials"):
        info = ask(folder, lambda: folder.fs.info(path))
    if info.get("size") is None:
        raise UserError(f"{shown(path)} comes without its length; copy it to a disk, and pack it from there")
    return File(folder, name, int(info["size"]), stamp(info))


def find_files(folder: Folder, under: str = "") -> list[File]:
    """All files in a folder and those below it; hidden ones are left out."""
    root = folder.join(under) if under else folder.path
    with damage(shown(root), "check its address and credentials"):
        found = walk(folder.fs, root) if folder.is_local else ask(folder, lambda: folder.fs.find(root, detail=True))
    top = len(folder.path.rstrip("/")) + 1
    files = [File(folder, path[top:], int(info.get("size") or 0), stamp(info)) for path, info in found.items()]
    # What ends with a slash, or is the folder's own, is the empty object that a web console makes for a folder.
    return [file for file in files if not re.search(r"(^|/)(\.|$)", file.name)]


def walk(fs, root: str) -> dict[str, dict]:
    """path -> what the filesystem says of it, of all files below a local folder, links to folders followed.

    fsspec's own `find` passes over folders that cannot be read, and over links to folders, without a word. Raises
    OSError for the first, and UserError where links go round in a circle. Hidden names are left out, and of a link to
    nothing nothing is said: whoever reads it finds it missing.
    """

    def stop(error: OSError):
        raise error

    found = {}
    for folder, subfolders, names in os.walk(root, onerror=stop, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in subfolders:
            path = os.path.join(folder, name)
            if os.path.islink(path) and any(_holds(os.path.realpath(path), each) for each in _way(root, folder)):
                raise UserError(f"{path} is a link to a folder that holds it; remove the link")
        for name in names:
            if not name.startswith("."):
                path = os.path.join(folder, name)
                try:
                    found[path] = fs.info(path)
                except FileNotFoundError:
                    found[path] = {}
    return found


def _way(root: str, folder: str) -> Iterator[str]:
    """The real paths of a folder and of those above it, up to `root`."""
    while len(folder) > len(root):
        yield os.path.realpath(folder)
        folder = os.path.dirname(folder)
    yield os.path.realpath(root)


def _holds(folder: str, path: str) -> bool:
    return os.path.commonpath([folder, path]) == folder


def base_name(folder: Folder) -> str:
    """The last part of a folder's path, as descriptions name it."""
    return folder.path.rstrip("/").rpartition("/")[2]


def expand_braces(url: str) -> tuple[str, list[str]]:
    """(the folder, names in it) of a pattern such as s3://bucket/set/shards-{000000..000069}.tar."""
    from braceexpand import braceexpand  # comes with webdataset

    folder = split_url(url.split("{", 1)[0])[0]
    with damage(shown(url), "write it like shards-{000000..000069}.tar"):
        names = [found[len(folder) :].lstrip("/") if folder != "." else found for found in braceexpand(url)]
    return folder, names
