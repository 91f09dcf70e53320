"""Claim: the attacks count and report what failed; the C++ touches no byte outside its buffers."""

import json
import sys

import pytest

from tests.attack import __main__ as runner
from tests.attack.report import Attack, attempts, finish
from tests.attack.sanitizers import attack, builds, compiled


def test_an_attempt_that_raises_is_counted_and_does_not_stop_the_attack(capsys, monkeypatch):
    monkeypatch.setenv("ATTACK_SCALE", "0.1")
    tried = Attack("division")
    for divisor in range(attempts(25)):
        with tried.attempt(f"divisor {divisor}"):
            print(1 / divisor, file=sys.stderr)
    assert finish(tried) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"attack": "division", "attempts": 3, "survived": 2, "failed": 1}
    assert "division: FAILED: divisor 0: ZeroDivisionError" in printed.err
    assert finish(Attack("nothing was tried")) == 1
    assert finish(Attack("all well", survived=1)) == 0


def test_an_attack_that_crashes_is_a_failed_row(tmp_path, monkeypatch):
    folder = tmp_path / "tests" / "attack"
    folder.mkdir(parents=True)
    row = '{"attack": "well", "attempts": 3, "survived": 3, "failed": 0}'
    (folder / "dies.py").write_text(f"import os\nprint('{row}', flush=True)\nos.abort()\n", encoding="utf-8")
    (folder / "lives.py").write_text(f"print('{row}')\n", encoding="utf-8")
    (folder / "_helper.py").write_text("", encoding="utf-8")
    monkeypatch.setattr(runner, "FOLDER", folder)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    assert runner.names() == ["dies", "lives"]
    survived, died = runner.run("dies")
    assert (survived["attack"], survived["failed"]) == ("well", 0)
    assert (died["attack"], died["failed"]) == ("dies: exit status -6", 1)
    (row,) = runner.run("lives")
    assert "| well | `lives` | 3 | 3 | 0 |  |" in runner.table([row])


def marked_builds() -> list:
    """Return the builds as parameters, all but two marked slow."""
    quick = {"convolutions, AddressSanitizer and UBSan", "resizing, AddressSanitizer and UBSan"}
    return [pytest.param(one, id=one.name, marks=() if one.name in quick else pytest.mark.slow) for one in builds()]


@pytest.mark.parametrize("build", marked_builds())
def test_no_sanitizer_or_guard_page_stops_the_native_code(build, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "sanitized"
    folder.mkdir(exist_ok=True)
    result = attack(build, compiled(build, folder), 50)
    assert result.row | {"failed": result.failures} == {
        "attack": build.name,
        "attempts": 50,
        "survived": 50,
        "failed": [],
    }
