"""One run at a time in a bucket's folder, as far as that is possible there: nobody releases a dead process's claim.

The claim is an object, `.lock`, that says whose it is and changes every `BEAT_SECONDS`. Who finds one waits whether it
still changes: if it does, its run is alive; if not, it is taken over. A run that finds itself replaced stops before its
next checkpoint. Two runs that start in the same moment are told apart by the service, which creates an object once.
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
"""After so long without a change, a claim's run is taken for dead."""


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
        if not self._is_own(now):  # a service that takes the condition for none
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
        """Fail if another run has taken this one for dead.

        Raises:
          RepVGGError: it has.
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
            except OSError:  # of this moment, perhaps; checkpoints say so if it lasts
                continue

    def _is_own(self, claim: Any) -> bool:
        return isinstance(claim, dict) and claim.get("run") == self._holder["run"]

    def _write(self, beat: int, *, only_if_new: bool = False) -> None:
        self._object.write_bytes(json.dumps(self._holder | {"beat": beat}).encode(), only_if_new=only_if_new)

    def _read(self) -> Any:
        """Return the claim that is there; None if there is none."""
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
    """Return who this is: containers on one machine may share its name, and each count their processes themselves."""
    try:
        counted_in = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:  # not Linux
        counted_in = 0
    return {"pid": os.getpid(), "host": socket.gethostname(), "pid_namespace": counted_in}


def _is_dead(holder: Any) -> bool:
    """Whether it was a process of this machine that is no more."""
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
