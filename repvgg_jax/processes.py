"""Guard against a fork after JAX was used: its threads are not copied, and the child hangs at its first computation."""

import os

from .errors import RepVGGError

_used_by: int | None = None
"""The process that first loaded weights or made a predictor."""


def check_not_forked() -> None:
    """Note that this process uses JAX, or refuse to where it was forked from one that had.

    Raises:
      RepVGGError: it was.
    """
    global _used_by
    if _used_by is None:
        _used_by = os.getpid()
    elif _used_by != os.getpid():
        raise RepVGGError(
            "this process was forked from one that had loaded weights or made a predictor, and would hang: JAX's "
            "threads are not copied. Do both after the fork, in each worker (gunicorn without --preload), or start "
            'workers with multiprocessing.get_context("spawn")'
        )
