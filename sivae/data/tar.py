"""Where the members of a tar lie, from its headers alone, over byte ranges of any URL.

tarfile takes a damaged header in the middle of a tar for its end, and so it does one that became zeros; here that is an
error with its place.
Long names (GNU's and PAX) are understood, files with holes are refused. Format: POSIX.1-2017, pax; GNU tar manual.
"""

import re
import tarfile
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from sivae.data.shards import too_much
from sivae.errors import UserError, shown
from sivae.storage import Folder

BLOCK = tarfile.BLOCKSIZE
MAX_NAME_BYTES = 2**20  # of a long name or a PAX header
END_BYTES = 2**16  # of the zeros at the end, read at once: they are 10 KiB as a rule
LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL, SPARSE = b"L", b"K", b"x", b"g", b"S"


class Damaged(ValueError):
    """A tar is no tar from some byte on; the message says where and why, as the end of a sentence."""


class Member(NamedTuple):
    name: str
    start: int  # of its bytes in the tar
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size

    @property
    def key(self) -> str:
        """Path and name up to the first point of the name: what webdataset groups members by."""
        return _parted(self.name)[0]

    @property
    def suffix(self) -> str:
        """What follows that point, in small letters."""
        return _parted(self.name)[1]


class RangeFile:
    """One file of a folder, read at any place, in blocks of `ahead` bytes, of which one is kept."""

    def __init__(self, folder: Folder, name: str, size_bytes: int, ahead: int = 2**16):
        self.folder, self.name, self.size_bytes, self.ahead = folder, name, size_bytes, ahead
        self.start, self.data = 0, b""

    def at(self, start: int, size: int) -> bytes:
        """Bytes [start, start + size), fewer at the end of the file. Raises UserError when they do not come."""
        stop = min(start + size, self.size_bytes)
        if not self.start <= start or stop > self.start + len(self.data):
            kept = b""
            if self.start <= start < self.start + len(self.data):
                kept = self.data[start - self.start :]
            self.data = kept + self._fetch(start + len(kept), min(max(stop, start + self.ahead), self.size_bytes))
            self.start = start
        return self.data[start - self.start : max(start, stop) - self.start]

    def _fetch(self, start: int, stop: int) -> bytes:
        if start >= stop:
            return b""

        def check(_, data: bytes) -> str | UserError | None:
            if len(data) < stop - start:
                return f"{len(data)} of {stop - start} bytes came from {start} on"
            return too_much(f"{shown(self.folder.url)}/{self.name}", len(data), stop - start)

        [data], problems = self.folder.read_ranges([(self.name, start, stop)], check)
        for _, problem in problems:
            if isinstance(problem, UserError):
                raise problem
            what = self.folder.reason(problem) if isinstance(problem, Exception) else problem
            raise UserError(
                f"cannot read {shown(self.folder.url)}/{self.name}: {what}; see whether it can be read, and try again"
            )
        return data


class Members:
    """The files in a tar, in order. `stop` is then where its end mark begins, and `links` the members that have no bytes of
    their own but name another: of two hard links tar writes the second so.

    read(start, size): bytes of the tar, fewer at its end. Raises Damaged where it is no tar, or is cut short.
    """

    def __init__(self, read: Callable[[int, int], bytes], size_bytes: int):
        self.read, self.size_bytes, self.stop = read, size_bytes, 0
        self.links: list[Member] = []

    def __iter__(self) -> Iterator[Member]:
        at, changed = 0, {}
        while True:
            header = self.read(at, BLOCK)
            self.stop = at
            if header == bytes(BLOCK):
                return self._check_end(at)
            info = self._parse(header, at)
            start, stop = at + BLOCK, at + BLOCK + info.size
            kind = info.type
            if kind in (LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL):
                if stop > self.size_bytes or info.size > MAX_NAME_BYTES:
                    raise Damaged(f"it is cut short or damaged at byte {at}")
                text = self.read(start, info.size)
                if kind == LONG_NAME:
                    changed["path"] = text.rstrip(b"\0").decode("utf-8", "surrogateescape")
                elif kind == PAX:
                    changed |= _pax(text, start)
                at = _padded(stop)
                continue
            if kind == SPARSE or any(name.startswith("GNU.sparse") for name in changed):
                raise Damaged(f"it has a file with holes at byte {at}; make it again without --sparse")
            size = info.size
            if "size" in changed:
                if not re.fullmatch(r"\d{1,18}", changed["size"], re.ASCII):
                    raise Damaged(f"its header at byte {at} is damaged")
                size = int(changed["size"])
            name, changed = changed.get("path", info.name), {}
            has_bytes = info.isreg() or kind not in tarfile.SUPPORTED_TYPES  # links and folders have none
            stop = start + size if has_bytes else start
            if size < 0 or _padded(stop) > self.size_bytes:
                raise Damaged(f"it is cut short: {name!r} ends at byte {stop}, and there are {self.size_bytes}")
            if has_bytes:
                yield Member(name, start, size)
            elif kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
                self.links.append(Member(name, start, 0))
            at = _padded(stop)

    def _check_end(self, at: int):
        for start in range(at, self.size_bytes, END_BYTES):
            if self.read(start, min(END_BYTES, self.size_bytes - start)).strip(b"\0"):
                raise Damaged(
                    f"more than zeros follows its end mark at byte {at}, so it is damaged there or several tars in one"
                )

    def _parse(self, header: bytes, at: int) -> tarfile.TarInfo:
        if len(header) < BLOCK:
            raise Damaged(f"it is cut short: it has no end mark, and {self.size_bytes} bytes")
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError, OverflowError):
            raise Damaged(
                "it is no tar (compressed ones must be unpacked)" if at == 0 else f"its header at byte {at} is damaged"
            ) from None
        # Readers skip what follows the digits of the checksum, which makes its bytes the only ones not summed.
        if not re.fullmatch(rb" *[0-7]{1,7}(\0 | \0|\0| )", header[148:156]):
            raise Damaged(f"its header at byte {at} is damaged")
        if info.size < 0:
            raise Damaged(f"its header at byte {at} is damaged")
        return info


def refuse_links(members: Members, suffixes: Collection[str], where: str):
    """Raises UserError where a member that would be an image is a link: left out, it would be missing without a word."""
    link = next((link for link in members.links if link.suffix in suffixes), None)
    if link is not None:
        raise UserError(
            f"{link.name!r} in {where} is a link to another file; make the tar again with --dereference --hard-dereference"
        )


def _padded(stop: int) -> int:
    return -(-stop // BLOCK) * BLOCK


def _parted(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    return folder + slash + key, suffix.lower()


def _pax(text: bytes, start: int) -> dict[str, str]:
    """The records "LENGTH KEY=VALUE\\n" of a PAX header."""
    found, at = {}, 0
    while at < len(text):
        match = re.match(rb"(\d{1,7}) ([^=]+)=", text[at:])
        stop = at + int(match[1]) if match else 0
        if not match or not at + match.end() < stop <= len(text) or text[stop - 1 : stop] != b"\n":
            raise Damaged(f"its header at byte {start} is damaged")
        value = text[at + match.end() : stop - 1]
        found[match[2].decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at = stop
    return found
