"""Objects in buckets: `gs://BUCKET/KEY` and `s3://BUCKET/KEY`, through fsspec with gcsfs or s3fs.

A bucket has no folders, no renaming and no appending, but every object is written atomically.
"""

import contextlib
import dataclasses
import errno
import fnmatch
import functools
import importlib.util
import logging
import os
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, reason_of, shown
from .extras import install_hint

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

LIBRARIES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
"""For each scheme, the library that implements it and the extra that installs the library."""

MAX_REASON = 300

GCS_SIMPLE_UPLOAD = 5 << 20
"""Bytes from which gcsfs uploads a local file in an upload session."""


@dataclasses.dataclass(frozen=True)
class BucketPath(os.PathLike[str]):
    """An object in a bucket, or a folder: all objects whose keys begin with this key and a slash.

    Methods behave like those of `pathlib.Path` with the same names. Errors of the service are raised as OSError with a
    one-line message.

    Attributes:
      scheme: `gs` or `s3`.
      bucket: name of the bucket.
      key: key of the object, without a trailing slash; empty for the bucket itself.
    """

    scheme: str
    bucket: str
    key: str

    @classmethod
    def parse(cls, url: str) -> "BucketPath":
        """Return the path for a URL, without contacting the service.

        Raises:
          ConfigError: the scheme is neither `gs` nor `s3`, the URL has no bucket, or the library is not installed.
        """
        scheme, _, rest = url.partition("://")
        if scheme.lower() not in LIBRARIES:
            schemes = " and ".join(f"{name}://" for name in LIBRARIES)
            raise ConfigError(
                f"{shown(url)}: only local files and folders, {schemes} can be used; mount it or copy it first"
            )
        bucket, _, key = rest.partition("/")
        if not bucket or not url.isprintable():
            raise ConfigError(f"{shown(url)} names no bucket; expected {scheme}://BUCKET/NAME")
        module, extra = LIBRARIES[scheme.lower()]
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"{shown(url)} needs {module}, which is not installed: {install_hint(extra)}")
        return cls(scheme.lower(), bucket, key.strip("/"))

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}" if self.key else f"{self.scheme}://{self.bucket}"

    def __fspath__(self) -> str:
        return str(self)

    def __truediv__(self, name: str) -> "BucketPath":
        return dataclasses.replace(self, key=posixpath.join(self.key, name))

    @property
    def name(self) -> str:
        """Last part of the key."""
        return posixpath.basename(self.key)

    @property
    def suffix(self) -> str:
        """Suffix of the last part, including the dot."""
        return Path(self.name).suffix

    @property
    def stem(self) -> str:
        """Last part of the key without its suffix."""
        return Path(self.name).stem

    @property
    def parent(self) -> "BucketPath":
        """The containing folder or bucket; the bucket itself for a bucket."""
        return dataclasses.replace(self, key=posixpath.dirname(self.key))

    def with_name(self, name: str) -> "BucketPath":
        """Return the path with the last part replaced by `name`."""
        return self.parent / name

    def is_file(self) -> bool:
        """Return whether this is an object."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Return whether this is a folder that contains objects."""
        return self._kind() == "directory"

    def exists(self) -> bool:
        """Return whether this is an object or a folder that contains objects."""
        return self._kind() is not None

    def iterdir(self) -> Iterator["BucketPath"]:
        """Yield the folder's direct contents, sorted by name; nothing if it does not exist."""
        with self._one_line_errors():
            try:
                names = self._service.ls(self._name, detail=False)
            except (FileNotFoundError, NotADirectoryError):
                return
        beginning = f"{self._name}/"
        for name in sorted(name.rstrip("/") for name in names):
            if name.startswith(beginning) and len(name) > len(beginning):
                yield self / name.removeprefix(beginning)

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """Yield the paths that match a pattern. A wildcard does not match a slash: `*/metrics/metrics`."""
        first, _, rest = pattern.partition("/")
        is_name = not any(letter in first for letter in "*?[")
        for path in [self / first] if is_name else self.iterdir():
            if is_name or fnmatch.fnmatchcase(path.name, first):
                if rest:
                    yield from path.glob(rest)
                elif not is_name or path.exists():
                    yield path

    def files(self) -> dict["BucketPath", int]:
        """Return the objects in the folder, at any depth and sorted by name, with their sizes in bytes."""
        with self._one_line_errors():
            entries: Any = self._service.find(self._name, detail=True)
        beginning = f"{self._name}/"
        return {
            self / name.removeprefix(beginning): int(info["size"])
            for name, info in sorted(entries.items())
            if name.startswith(beginning) and not name.endswith("/")
        }

    def size(self) -> int:
        """Return the object's size in bytes."""
        with self._one_line_errors():
            return int(self._service.info(self._name)["size"])

    def read_bytes(self) -> bytes:
        """Return the object's content."""
        with self._one_line_errors():
            content: Any = self._service.cat_file(self._name)
        return content

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return the object's content as text."""
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, content: bytes, *, only_if_new: bool = False) -> None:
        """Write the object atomically.

        Args:
          content: content of the object.
          only_if_new: raise FileExistsError if the object exists. The service decides: one of several writers wins.
        """
        # gcsfs opens an upload session for content that is not shorter than `chunksize`.
        options: dict[str, Any] = {"chunksize": len(content)} if self._needs_session(content) else {}
        with self._one_line_errors():
            self._service.pipe_file(self._name, content, mode="create" if only_if_new else "overwrite", **options)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder exists once it contains an object."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        try:
            with self._one_line_errors():
                self._service.rm_file(self._name)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def download(self, local: Path) -> None:
        """Copy the object to a local file, or the folder's contents to a local folder."""
        files = self.files() if self.is_dir() else {self: 0}
        for file in files:
            target = local / file.key.removeprefix(self.key).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            with file._one_line_errors():
                self._service.get_file(file._name, str(target))

    def upload(self, local: Path) -> None:
        """Copy a local file to the object, atomically: after an error, the object is unchanged."""
        if local.stat().st_size < GCS_SIMPLE_UPLOAD and self._needs_session(content := local.read_bytes()):
            self.write_bytes(content)
            return
        with self._one_line_errors():
            self._service.put_file(str(local), self._name)

    def upload_folder(self, local: Path, last: Sequence[str] = ()) -> None:
        """Copy a local folder's contents. The files `last` are copied last: they mark the folder as complete."""
        names = sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file())
        for name in sorted(names, key=lambda name: last.index(name) if name in last else -1):
            (self / name).upload(local / name)

    def remove_folder(self, first: Sequence[str] = ()) -> None:
        """Remove the folder's contents. The objects `first` are removed first: they mark the folder as complete."""
        files = {file.key.removeprefix(f"{self.key}/"): file for file in self.files()}
        for name in [name for name in first if name in files] + [name for name in files if name not in first]:
            files[name].unlink(missing_ok=True)

    def move_folder(self, target: "BucketPath", first: Sequence[str] = ()) -> None:
        """Copy the folder's contents to another folder of the bucket, then remove them here as `remove_folder` does."""
        for file in self.files():
            copy = target / file.key.removeprefix(f"{self.key}/")
            with file._one_line_errors():
                self._service.cp_file(file._name, copy._name)
        self.remove_folder(first)

    @property
    def _name(self) -> str:
        """Name of the object in fsspec's file systems."""
        return f"{self.bucket}/{self.key}" if self.key else self.bucket

    @property
    def _service(self) -> "AbstractFileSystem":
        return _service(self.scheme)

    def _needs_session(self, content: bytes) -> bool:
        """Return whether gcsfs could damage this content if it sent it in a single request.

        It puts the content between bare line feeds and a fixed boundary, where the standard has CR LF. A server that
        follows the standard takes a final CR as part of the boundary.
        """
        return self.scheme == "gs" and (content.endswith(b"\r") or b"--==0==" in content)

    def _kind(self) -> str | None:
        with self._one_line_errors():
            try:
                return self._service.info(self._name)["type"]
            except FileNotFoundError:
                return None

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        """Turn all errors of gcsfs, s3fs and the libraries they use into an OSError with a short `strerror`."""
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "there is no such object or bucket", str(self)) from error
        except FileExistsError as error:
            raise FileExistsError(errno.EEXIST, "it exists", str(self)) from error
        except OSError as error:
            if isinstance(error.strerror, str) and error.filename is not None:  # a local error, such as a full disk
                raise
            raise OSError(errno.EIO, _short(error), str(self)) from error
        except Exception as error:
            raise OSError(errno.EIO, _short(error), str(self)) from error


def _short(error: Exception) -> str:
    text = reason_of(error)
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]} …"


@functools.cache
def _service(scheme: str) -> "AbstractFileSystem":
    """Return fsspec's file system for a scheme. Listings are not cached, since other machines write too."""
    import fsspec

    if scheme == "gs":
        logging.getLogger("gcsfs").addFilter(_is_worth_reading)
    return fsspec.filesystem(scheme, use_listings_cache=False)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """Return False for gcsfs's message that it cannot determine a bucket's type, which it logs on every request."""
    return "Could not determine bucket type" not in record.getMessage()
