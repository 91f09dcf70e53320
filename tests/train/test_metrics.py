"""Claim: curves are drawn from complete rows, into a picture of the requested format, or one line says why not."""

import json
from pathlib import Path

import pytest
from PIL import Image

import repvgg_jax as rv
from tests.helpers.commands import command
from train.metrics import MetricsLog, read_rows

ROWS = [
    {"step": 11, "epoch": 0.5, "loss": 2.0, "top1": 0.2, "learning_rate": 0.1},
    {"step": 22, "epoch": 1.0, "loss": 1.5, "top1": 0.4, "learning_rate": 0.05},
    {"step": 22, "epoch": 1.0, "form": "train", "top1": 0.5, "top5": 0.9, "loss": 1.4, "images": 360},
    {"step": 33, "epoch": 1.5, "loss": 1.0, "top1": 0.6, "learning_rate": 0.0},
]


@pytest.fixture
def workdir(tmp_path) -> Path:
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    write(folder, ROWS)
    return folder


def write(folder: Path, rows: list, end: str = "") -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end, encoding="utf-8")


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("out", "written", "kind"), [("curves", "curves.png", "PNG"), ("a.b.JPG", "a.b.JPG", "JPEG")])
def test_the_suffix_chooses_the_format(out, written, kind, workdir, tmp_path):
    done = command("train.plot", workdir, "--out", tmp_path / out)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / written}\n"
    assert contents(tmp_path) == sorted(["runs", written])
    with Image.open(tmp_path / written) as picture:
        assert picture.format == kind
        assert picture.width > 1000


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("x.txt", "x.txt: no picture format is called .txt; choose one of "),
        ("none/x.png", "there is no folder"),
        ("ftp://bucket/x.png", "--out ftp://bucket/x.png: only local files and folders"),
    ],
)
def test_an_unwritable_picture_is_one_line(out, says, workdir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = command("train.plot", workdir, "--out", out)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert contents(tmp_path) == ["runs"]


def test_tildes_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("train.plot.plot_curves", lambda runs, out: [*runs, out])
    done = command("train.plot", "~/runs/first", "--out=~/c.png")
    assert done.stdout == f"{[tmp_path / 'runs' / 'first', tmp_path / 'c.png']}\n"


def test_a_url_is_not_a_run():
    assert "RUN ftp://b/r: only" in command("train.plot", "ftp://b/r").stderr


def test_skipped_folders_and_lines_are_reported(workdir, tmp_path):
    """Folders that are not runs, as matched by `runs/*`, and a truncated last line."""
    (tmp_path / "runs" / "data").mkdir()
    write(workdir, ROWS, end='{"step": 44, "epo')
    done = command("train.plot", tmp_path / "runs" / "data", workdir, "--out", tmp_path / "c.png")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        f"warning: {tmp_path / 'runs' / 'data'} holds no metrics.jsonl and is skipped",
        f"warning: {workdir / 'metrics.jsonl'}: the last line was cut short and is skipped",
    ]
    assert (tmp_path / "c.png").exists()


def test_a_run_continues_after_a_truncated_last_line(workdir):
    write(workdir, ROWS, end='{"step": 44, "epo')
    notes = []
    log = MetricsLog(workdir, 33, note=notes.append)
    log.write({"step": 44, "epoch": 2.0, "loss": 0.5}, "train")
    log.close()
    assert [row["step"] for row in read_rows(workdir / "metrics.jsonl")] == [11, 22, 22, 33, 44]
    assert notes == [f"{workdir / 'metrics.jsonl'}: the last line was cut short and is skipped"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"step": 12, "lo\n', "line 2 is damaged"),
        (b"[1, 2]\n", "line 2 is damaged (it is not an object with a step)"),
        (b'{"step": "x"}\n', "line 2 is damaged (it is not an object with a step)"),
        (b"\xff\xfe\x00\n", "line 2 is damaged"),
        (b'{"step": 12, "epoch": 0.6, "form": "train", "loss": null, "top1": 1}\n', "step 12 has no number 'loss'"),
        (b'{"step": 12}\n', "step 12 has no number 'epoch'"),
    ],
)
def test_a_damaged_line_is_one_clear_error(line, says, workdir, tmp_path):
    lines = (workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_bytes(b"".join([lines[0], line, *lines[1:]]))
    done = command("train.plot", workdir, "--out", tmp_path / "c.png")
    assert done.returncode == 2
    assert says in done.stderr
    assert str(workdir / "metrics.jsonl") in done.stderr
    assert done.stderr.count("\n") == 1
    assert contents(tmp_path) == ["runs"]


def test_a_run_with_a_damaged_line_does_not_overwrite_it(workdir):
    write(workdir, ROWS[:1], end='{"step\n' + json.dumps(ROWS[1]) + "\n")
    before = (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(rv.RepVGGError, match=r"line 2 is damaged .*; fix or remove that line"):
        MetricsLog(workdir, 33)
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_rows_go_to_a_new_file_if_the_old_one_was_removed(workdir):
    log = MetricsLog(workdir, 33)
    (workdir / "metrics.jsonl").unlink()
    log.write({"step": 44, "epoch": 2.0, "loss": 0.5}, "train")
    log.write({"step": 55, "epoch": 2.5, "loss": 0.4}, "train")
    log.close()
    assert [row["step"] for row in read_rows(workdir / "metrics.jsonl")] == [44, 55]
