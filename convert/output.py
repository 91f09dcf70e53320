"""Checks of the output path: the input is never overwritten, and other files only with `--overwrite`."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from repvgg_jax.errors import ConfigError, RepVGGError, system_errors
from repvgg_jax.files import hidden_prefix, scratch_folder
from repvgg_jax.interrupts import signals_wait
from repvgg_jax.paths import exists, in_bucket, place


def check_output(source: str, output: str, *, overwrite: bool, folder: bool = False) -> None:
    """Refuse an output that would destroy one of the user's files.

    Args:
      source: input file, folder or address.
      output: output file or folder.
      overwrite: allow replacing an existing output that is not the source.
      folder: the output is a SavedModel, which may only replace another SavedModel.

    Raises:
      ConfigError: `output` is `source` under the same or another name, or exists already; or as `place`.
      RepVGGError: the output is in a bucket that cannot be reached.
    """
    with system_errors(RepVGGError, f"cannot write {output}"):
        if not exists(output):
            return
    if _same_file(source, output):
        raise ConfigError(f"{output} is the same file as the input, {source}: choose another name")
    if not overwrite:
        raise ConfigError(f"{output} exists already: choose another name, or replace it with --overwrite")
    if folder and not (Path(output) / "saved_model.pb").is_file():
        raise ConfigError(f"{output} is not a SavedModel, and only a SavedModel is replaced by one")


@contextlib.contextmanager
def replacing_folder(output: str) -> Iterator[str]:
    """Yield the name of a folder to write. The folder replaces `output` when the block succeeds.

    Raises:
      RepVGGError: the folder cannot be put in place; the old one stays.
    """
    target = Path(output)
    if not os.path.lexists(target):
        yield output
        return
    try:
        with scratch_folder(hidden_prefix(target), target.parent) as aside:
            yield str(aside / "new")
            with signals_wait():
                target.rename(aside / "old")
                try:
                    (aside / "new").rename(target)
                except OSError:
                    (aside / "old").rename(target)
                    raise
    except OSError as error:
        raise RepVGGError(f"cannot write {output}: {error.strerror or error}") from error


def _same_file(source: str, output: str) -> bool:
    if in_bucket(source) or in_bucket(output):
        return in_bucket(source) and in_bucket(output) and place(source) == place(output)
    try:
        return Path(source).samefile(output)
    except (OSError, ValueError):  # an address, a broken link or a missing file: reported on reading
        return False
