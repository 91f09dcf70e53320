"""`python -m tests.attack.weight_file_fuzz`: run `tests/weights/test_fuzz.py` with 100,000 mutations and more.

`FUZZ_EXAMPLES` sets how many mutations each test of weight files tries; the test of pickle programs tries ten times
as many. Every file must load completely or be refused in one line, and must not execute anything.
"""

import os
import re
import subprocess
import sys

from .__main__ import ROOT
from .report import Attack, attempts, finish

EXAMPLES = 6000


def main() -> int:
    """Run the tests and count the examples that Hypothesis reports."""
    attack = Attack("mutated weight files and pickle programs: loaded whole or refused, nothing run")
    examples = attempts(EXAMPLES)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "--hypothesis-show-statistics", "tests/weights/test_fuzz.py"],
        cwd=ROOT,
        env=os.environ | {"FUZZ_EXAMPLES": str(examples)},
        stdout=subprocess.PIPE,
        text=True,
    )
    print(done.stdout[-4000:], file=sys.stderr)
    attack.survived = sum(map(int, re.findall(r"- (\d+) passing(?: examples)?, \d+ failing", done.stdout)))
    # Hypothesis prints no statistics for a property defined inside a test, so count such tests by name.
    attack.survived += examples * len(re.findall(r"^PASSED .*::test_a_mutated_file_is", done.stdout, re.MULTILINE))
    for line in re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.MULTILINE):
        attack.count(False, line)
    if done.returncode and not attack.failures:
        attack.count(False, f"pytest ended with {done.returncode}")
    return finish(attack)


if __name__ == "__main__":
    sys.exit(main())
