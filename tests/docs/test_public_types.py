"""Claim: type checkers and editors see every public name, though `repvgg_jax` loads each one on first use."""

import json
import subprocess
import sys

import repvgg_jax as rv
from tests.helpers.repository import ROOT


def test_pyright_sees_every_public_name_and_no_other(tmp_path):
    lines = ["import repvgg_jax as rv", *(f"reveal_type(rv.{name})" for name in rv.__all__), "rv.crate_model"]
    program = tmp_path / "program.py"
    program.write_text("\n".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", str(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout, done.stderr
    diagnostics = {d["range"]["start"]["line"]: d for d in json.loads(done.stdout)["generalDiagnostics"]}
    for line, name in enumerate(rv.__all__, start=1):
        revealed = diagnostics[line]["message"].removeprefix(f'Type of "rv.{name}" is ')
        assert diagnostics[line]["severity"] == "information", diagnostics[line]["message"]
        assert revealed not in ('"Any"', '"Unknown"'), name
    errors = [d["message"] for d in diagnostics.values() if d["severity"] == "error"]
    assert len(errors) == 1
    assert "crate_model" in errors[0]
