"""Counts of attempts and survivals, printed as one JSON object per line of stdout for `python -m tests.attack`."""

import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

SCALE = "ATTACK_SCALE"


def attempts(count: int) -> int:
    """Return how many attempts to make: `count` times the environment's `ATTACK_SCALE`, at least one."""
    return max(1, math.ceil(count * float(os.environ.get(SCALE, "1"))))


@dataclasses.dataclass
class Attack:
    """One row of the table.

    Args:
      name: what is done, in words that make sense to a reader of the table.
    """

    name: str
    survived: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    note: str = ""

    @contextlib.contextmanager
    def attempt(self, what: object = "") -> Iterator[None]:
        """Count one attempt: survived if the block ends, failed if it raises, which does not stop the attack.

        Args:
          what: what is needed to repeat this attempt: a seed, a shape, a file.
        """
        try:
            yield
        except Exception as error:
            self.count(False, f"{what}: {type(error).__name__}: {error}")
        else:
            self.count(True)

    def count(self, survived: bool, what: object = "") -> None:
        """Count one attempt whose outcome is known; `what` describes a failure."""
        if survived:
            self.survived += 1
        else:
            self.failures.append(str(what))
            print(f"{self.name}: FAILED: {what}", file=sys.stderr, flush=True)

    @property
    def row(self) -> dict[str, Any]:
        """The printed fields: `attack`, `attempts`, `survived`, `failed`, and a `note` with measured numbers if any."""
        failed = len(self.failures)
        row = {"attack": self.name, "attempts": self.survived + failed, "survived": self.survived, "failed": failed}
        return row | ({"note": self.note} if self.note else {})


def finish(*attacks: Attack) -> int:
    """Print the rows and return the exit status: 1 if anything failed, or if nothing was tried."""
    for attack in attacks:
        print(json.dumps(attack.row), flush=True)
    return int(any(attack.failures or not attack.survived for attack in attacks))
