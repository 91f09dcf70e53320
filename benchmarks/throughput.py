"""Plot the throughput of all variants against their published accuracy: `python -m benchmarks.throughput OUT.png`.

The predictor is compared with ONNX Runtime (on a GPU, with `torch.compile`) with random weights at each variant's image
size; each runs in a separate process, in turn. Accuracies are the published ones (paper tables 4 and 5, and the
authors' repository), because speed does not depend on the weights' values.
"""

import tempfile
from pathlib import Path
from typing import Any

import repvgg_jax as rv
from repvgg_jax.cli import run_command
from repvgg_jax.files import atomic_path
from repvgg_jax.net.variants import get_variant

from .arguments import Parser, positive_int
from .inference import Case, contest, seconds, write_files


def measure(name: str, batch_size: int, rounds: int, peer: str) -> dict[str, Any]:
    """Return the images per second of one variant with this library and with the peer."""
    variant = get_variant(name)
    with tempfile.TemporaryDirectory() as folder:
        case = Case(folder, name, batch_size, variant.image_size)
        write_files(case, onnx=peer == "onnxruntime")
        contestants = contest(case, ("ours", peer), rounds)
    speeds = {who: batch_size / seconds(contestant) for who, contestant in contestants.items()}
    top1 = None if variant.published is None else variant.published.top1
    return {"model": name, "image_size": variant.image_size, "top1": top1, **speeds}


def draw(rows: list[dict[str, Any]], peer: str, title: str, path: Path) -> None:
    """Draw one point per variant and runtime."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for who, label, color in (("ours", "repvgg_jax", "tab:blue"), (peer, peer, "tab:orange")):
        axes.scatter([row[who] for row in rows], [row["top1"] for row in rows], label=label, color=color, s=28)
    for row in rows:
        axes.plot([row[peer], row["ours"]], [row["top1"]] * 2, color="0.8", linewidth=1, zorder=0)
        axes.annotate(
            row["model"].removeprefix("RepVGG").strip("-"),
            (row["ours"], row["top1"]),
            xytext=(5, 3),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set_xscale("log")
    axes.set_xlabel("images per second")
    axes.set_ylabel("published ImageNet top-1, %")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure, print a table, and draw the picture."""
    parser = Parser("python -m benchmarks.throughput", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="picture to write")
    parser.add_argument("--models", nargs="+", default=rv.list_models(), help="names of variants (default: all)")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="images per call (default: 8)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="measurements of each variant (default: 3)")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="default: cpu")
    parser.add_argument("--title", default="", help="title of the picture")
    arguments = parser.parse_args()
    peer = "onnxruntime" if arguments.device == "cpu" else "torch.compile"
    rows = []
    print(
        f"| model | size | published top-1 | repvgg_jax images/s | {peer} images/s | ratio |\n|---|---|---|---|---|---|"
    )
    for name in arguments.models:
        row = measure(name, arguments.batch_size, arguments.rounds, peer)
        rows.append(row)
        speeds = f"{row['ours']:.1f} | {row[peer]:.1f} | {row['ours'] / row[peer]:.2f}"
        print(f"| {name} | {row['image_size']} | {row['top1']} | {speeds} |", flush=True)
    title = f"float32, batch {arguments.batch_size}" + (f", {arguments.title}" if arguments.title else "")
    draw([row for row in rows if row["top1"] is not None], peer, title, arguments.output)


if __name__ == "__main__":
    run_command(main)
