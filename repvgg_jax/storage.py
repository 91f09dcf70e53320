"""Objects in buckets: `gs://BUCKET/KEY` and `s3://BUCKET/KEY`, by fsspec with gcsfs or s3fs.

A bucket has no folders, no renaming and no appending. What it has is that an object appears whole or not at all.
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
"""By scheme: the library that speaks it, and the extra that brings the library."""

MAX_REASON = 300


@dataclasses.dataclass(frozen=True)
class BucketPath(os.PathLike[str]):
    """An object in a bucket, or all those whose names begin with its own and a slash, as a folder.

    Its methods are `pathlib.Path`'s of those names, and whatever the service says is an OSError of one line.

    Attributes:
      scheme: `gs` or `s3`.
      bucket: its name.
      key: of the object, without a slash at its end; empty for the bucket itself.
    """

    scheme: str
    bucket: str
    key: str

    @classmethod
    def parse(cls, url: str) -> "BucketPath":
        """Return the place that a URL names. Nothing is asked of the service.

        Raises:
          ConfigError: another scheme than `gs` and `s3`, no bucket, or the library for it is not installed.
        """
        scheme, _, rest = url.partition("://")
        if scheme.lower() not in LIBRARIES:
            known = " and ".join(f"{name}://" for name in LIBRARIES)
            raise ConfigError(
                f"{shown(url)}: only folders and files of this machine and {known} can be used; mount it there, "
                "or copy it"
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
        """The last part."""
        return posixpath.basename(self.key)

    @property
    def suffix(self) -> str:
        """The last part's, from its last dot on."""
        return Path(self.name).suffix

    @property
    def stem(self) -> str:
        """The last part, without its suffix."""
        return Path(self.name).stem

    @property
    def parent(self) -> "BucketPath":
        """What it is in; the bucket is in itself."""
        return dataclasses.replace(self, key=posixpath.dirname(self.key))

    def with_name(self, name: str) -> "BucketPath":
        """Return the place beside this one that is called `name`."""
        return self.parent / name

    def is_file(self) -> bool:
        """Whether there is such an object."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Whether there are objects in it."""
        return self._kind() == "directory"

    def exists(self) -> bool:
        """Whether there is such an object, or one in it."""
        return self._kind() is not None

    def iterdir(self) -> Iterator["BucketPath"]:
        """Yield what is in it, in order of name; nothing if there is no such folder."""
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
        """Yield what matches a pattern, each part of which is one name's: `*/metrics/metrics`."""
        first, _, rest = pattern.partition("/")
        is_name = not any(letter in first for letter in "*?[")
        for path in [self / first] if is_name else self.iterdir():
            if is_name or fnmatch.fnmatchcase(path.name, first):
                if rest:
                    yield from path.glob(rest)
                elif not is_name or path.exists():
                    yield path

    def files(self) -> dict["BucketPath", int]:
        """Return the objects in it, however deep, in order of name, and their sizes."""
        with self._one_line_errors():
            found: Any = self._service.find(self._name, detail=True)
        beginning = f"{self._name}/"
        return {
            self / name.removeprefix(beginning): int(info["size"])
            for name, info in sorted(found.items())
            if name.startswith(beginning) and not name.endswith("/")
        }

    def size(self) -> int:
        """Return the number of bytes of an object."""
        with self._one_line_errors():
            return int(self._service.info(self._name)["size"])

    def read_bytes(self) -> bytes:
        """Return an object's content."""
        with self._one_line_errors():
            content: Any = self._service.cat_file(self._name)
        return content

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """Return an object's content as text."""
        return self.read_bytes().decode(encoding, errors)

    def write_bytes(self, content: bytes, *, only_if_new: bool = False) -> None:
        """Write an object, whole.

        Args:
          content: of the object.
          only_if_new: raise FileExistsError if there is one, which the service judges: one of several writers wins.
        """
        with self._one_line_errors():
            self._service.pipe_file(self._name, content, mode="create" if only_if_new else "overwrite")

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder is there once something is in it."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove an object."""
        try:
            with self._one_line_errors():
                self._service.rm_file(self._name)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def download(self, local: Path) -> None:
        """Copy an object into a file of this machine, or what is in a folder into a folder."""
        files = self.files() if self.is_dir() else {self: 0}
        for file in files:
            target = local / file.key.removeprefix(self.key).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            with file._one_line_errors():
                self._service.get_file(file._name, str(target))

    def upload(self, local: Path) -> None:
        """Copy a file of this machine into an object, which is there whole or, after an error, as it was."""
        with self._one_line_errors():
            self._service.put_file(str(local), self._name)

    def upload_folder(self, local: Path, last: Sequence[str] = ()) -> None:
        """Copy what is in a folder of this machine; the files `last` follow all others, and say that it is whole."""
        names = sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file())
        for name in sorted(names, key=lambda name: last.index(name) if name in last else -1):
            (self / name).upload(local / name)

    def remove_folder(self, first: Sequence[str] = ()) -> None:
        """Remove what is in it, the objects `first` before all the others: they said that it was whole."""
        files = {file.key.removeprefix(f"{self.key}/"): file for file in self.files()}
        for name in [name for name in first if name in files] + [name for name in files if name not in first]:
            files[name].unlink(missing_ok=True)

    def move_folder(self, target: "BucketPath", first: Sequence[str] = ()) -> None:
        """Copy what is in it to another place in the same bucket, and then remove it here as `remove_folder` does."""
        for file in self.files():
            copy = target / file.key.removeprefix(f"{self.key}/")
            with file._one_line_errors():
                self._service.cp_file(file._name, copy._name)
        self.remove_folder(first)

    @property
    def _name(self) -> str:
        """As fsspec's file systems call it."""
        return f"{self.bucket}/{self.key}" if self.key else self.bucket

    @property
    def _service(self) -> "AbstractFileSystem":
        return _service(self.scheme)

    def _kind(self) -> str | None:
        with self._one_line_errors():
            try:
                return self._service.info(self._name)["type"]
            except FileNotFoundError:
                return None

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        """Turn whatever gcsfs, s3fs and the libraries below them raise into an OSError with a short `strerror`."""
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "there is no such object or bucket", str(self)) from error
        except FileExistsError as error:
            raise FileExistsError(errno.EEXIST, "it exists", str(self)) from error
        except OSError as error:
            if isinstance(error.strerror, str) and error.filename is not None:  # of this machine: a full disk
                raise
            raise OSError(errno.EIO, _short(error), str(self)) from error
        except Exception as error:
            raise OSError(errno.EIO, _short(error), str(self)) from error


def _short(error: Exception) -> str:
    text = reason_of(error)
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]} …"


@functools.cache
def _service(scheme: str) -> "AbstractFileSystem":
    """Return fsspec's file system of a scheme. Nothing is remembered of what it lists: other machines write too."""
    import fsspec

    if scheme == "gs":
        logging.getLogger("gcsfs").addFilter(_is_worth_reading)
    return fsspec.filesystem(scheme, use_listings_cache=False)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """Whether to print one of gcsfs's lines: not that an ordinary bucket's type is hidden, with every request."""
    return "Could not determine bucket type" not in record.getMessage()
