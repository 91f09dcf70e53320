"""Exclusive use of a bucket's folder by one run, although nothing there releases the claim of a dead process.

The claim is an object, `.lock`, that names its holder and changes every `BEAT_SECONDS`. A new run that finds a claim
waits for a change: if there is one, the holder is alive; if not, the new run takes the claim over. A run whose claim
was taken over stops before its next checkpoint. If two runs start at the same moment, only one of them can create the
object.
"""

import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from repvgg_jax.errors import ConfigError, RepVGGError
from repvgg_jax.storage import BucketPath

BEAT_SECONDS = 10
PATIENCE_SECONDS = 35
"""The holder of a claim that has not changed for this long counts as dead."""


class BucketClaim:
    """A context manager that claims `workdir`.

    Raises:
      ConfigError: another process trains there.
      OSError: the bucket cannot be read or written.
    """

    def __init__(self, workdir: BucketPath, lock: str):
        self._workdir, self._object = workdir, workdir / lock
        self._holder = _this_process() | {"run": uuid.uuid4().hex}
        self._stop, self._taken_by = threading.Event(), ""
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)

    def __enter__(self) -> "BucketClaim":
        before = self._read()
        if before is not None and not _is_dead(before):
            deadline = time.monotonic() + PATIENCE_SECONDS
            while self._read() == before and time.monotonic() < deadline:
                time.sleep(0.5)
            now = self._read()
            if now not in (None, before):
                raise self._in_use(now)
        if before is not None:
            self._object.unlink(missing_ok=True)
        try:
            self._write(0, only_if_new=True)
        except FileExistsError as error:
            raise self._in_use(self._read()) from error
        now = self._read()
        if not self._is_own(now):  # a service that ignores the condition
            raise self._in_use(now)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(BEAT_SECONDS)
        try:
            if self._is_own(self._read()):
                self._object.unlink(missing_ok=True)
        except OSError:  # the next run waits a little
            pass

    def check(self) -> None:
        """Check that no other run has taken the claim over.

        Raises:
          RepVGGError: another run has taken the claim over.
        """
        if self._taken_by:
            raise RepVGGError(f"{self._workdir} has been taken over by {self._taken_by}: this run stops")

    def _beat(self) -> None:
        number = 0
        while not self._stop.wait(BEAT_SECONDS):
            try:
                now = self._read()
                if now is not None and not self._is_own(now):
                    self._taken_by = _name(now)
                    return
                number += 1
                self._write(number)
            except OSError:  # perhaps a short failure; if it lasts, a checkpoint will raise it
                continue

    def _is_own(self, claim: Any) -> bool:
        return isinstance(claim, dict) and claim.get("run") == self._holder["run"]

    def _write(self, beat: int, *, only_if_new: bool = False) -> None:
        self._object.write_bytes(json.dumps(self._holder | {"beat": beat}).encode(), only_if_new=only_if_new)

    def _read(self) -> Any:
        """Return the present claim; None if there is none."""
        try:
            return json.loads(self._object.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            return "damaged"

    def _in_use(self, holder: Any) -> ConfigError:
        return ConfigError(
            f"--workdir {self._workdir} is in use by {_name(holder)}: wait for it, stop it, or choose another folder"
        )


def _name(holder: Any) -> str:
    try:
        return f"process {holder['pid']} on {holder['host']}"
    except (KeyError, TypeError):
        return "another process"


def _this_process() -> dict[str, Any]:
    """Return this process's identity; containers on one machine may share its host name, but number processes apart."""
    try:
        counted_in = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:  # not Linux
        counted_in = 0
    return {"pid": os.getpid(), "host": socket.gethostname(), "pid_namespace": counted_in}


def _is_dead(holder: Any) -> bool:
    """Return whether the holder was a process on this machine that no longer exists."""
    if not isinstance(holder, dict) or not isinstance(holder.get("pid"), int):
        return False
    if any(holder.get(name) != value for name, value in _this_process().items() if name != "pid"):
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
