"""Guard against forking after JAX is in use: its threads are not copied, so the child would hang when it computes."""

import os

from .errors import RepVGGError

_used_by: int | None = None
"""PID of the process that first loaded weights or made a predictor."""


def check_not_forked() -> None:
    """Record that this process uses JAX.

    Raises:
      RepVGGError: the process was forked from one that already used JAX.
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
