"""Files on any fsspec URL: local folders, s3://, gs://, memory://."""

from __future__ import annotations

import errno
import os
import posixpath
from typing import Any

import fsspec

from sivae.errors import UserError, shown


class Folder:
    """A folder at a path or URL. Failures of the storage become one clear sentence."""

    def __init__(self, url: str, storage_options: dict[str, Any] | None = None):
        self.url = str(url).rstrip("/") or "/"
        try:
            self.fs, self.path = fsspec.core.url_to_fs(self.url, **(storage_options or {}))
        except (ValueError, ImportError, OSError) as error:
            raise UserError(
                f"{shown(self.url)}: cannot be opened ({shown(error)}); the extras sivae[s3] and sivae[gcs] hold the drivers of object stores"
            ) from None
        self.is_local = "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))
        self._options = storage_options

    def join(self, *names: str) -> str:
        return posixpath.join(self.path, *names)

    def folder(self, *names: str) -> Folder:
        return Folder(posixpath.join(self.url, *names), self._options)

    def exists(self, *names: str) -> bool:
        return self._guard("look at", lambda: self.fs.exists(self.join(*names)), *names)

    def names(self, *names: str) -> list[str]:
        """Names of the entries of a subfolder; empty when it is not there."""

        def listing() -> list[str]:
            path = self.join(*names)
            self.fs.invalidate_cache()
            if not self.fs.isdir(path):
                return []
            return sorted(posixpath.basename(entry.rstrip("/")) for entry in self.fs.ls(path, detail=False))

        return [name for name in self._guard("list", listing, *names) if name]

    def read(self, *names: str) -> bytes:
        return self._guard("read", lambda: self.fs.cat_file(self.join(*names)), *names)

    def write(self, data: bytes, *names: str) -> None:
        """Write a file so that it appears whole or not at all: locally under another name first and then moved."""

        def put() -> None:
            path = self.join(*names)
            if not self.is_local:
                self.fs.pipe_file(path, data)
                return
            os.makedirs(os.path.dirname(path), exist_ok=True)
            part = f"{path}.part-{os.getpid()}"
            try:
                with open(part, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, path)
            except BaseException:
                if os.path.exists(part):
                    os.unlink(part)
                raise

        self._guard("write", put, *names)

    def remove(self, *names: str) -> None:
        """Delete a file or a whole subfolder; nothing happens when it is not there."""

        def delete() -> None:
            path = self.join(*names)
            if self.fs.exists(path):
                self.fs.rm(path, recursive=True)

        self._guard("delete", delete, *names)

    def _guard(self, verb: str, work, *names: str):
        try:
            return work()
        except Exception as error:  # noqa: BLE001 (drivers raise their own kinds; all become a sentence)
            where = shown(posixpath.join(self.url, *names))
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise UserError(
                    f"{where}: cannot {verb}, the disk is full ({os.strerror(error.errno)}); free space and run the same command again"
                ) from error
            if isinstance(error, FileNotFoundError):
                raise UserError(f"{where}: cannot {verb}, there is no such file or folder") from error
            raise UserError(
                f"{where}: cannot {verb} ({type(error).__name__}: {shown(' '.join(str(error).split()))})"
            ) from error
