"""Curves of a run as a picture."""

from pathlib import Path

from repvgg_jax.files import atomic_path

from .metrics import read_rows


def plot_curves(workdir: Path) -> Path:
    """Draw loss, accuracy and learning rate by epoch from `workdir/metrics.jsonl` into `workdir/curves.png`."""
    import matplotlib

    matplotlib.use("Agg")  # no display on a training machine
    import matplotlib.pyplot as plt

    rows = read_rows(workdir / "metrics.jsonl")
    training = [row for row in rows if "learning_rate" in row]
    evaluation = [row for row in rows if row.get("form") == "train"]
    epochs = [row["epoch"] for row in training]
    tested = [row["epoch"] for row in evaluation]

    figure, (loss, accuracy, rate) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    loss.plot(epochs, [row["loss"] for row in training], label="training", color="tab:blue", alpha=0.8)
    loss.plot(tested, [row["loss"] for row in evaluation], "o-", label="test", color="tab:orange", markersize=4)
    loss.set(title="loss", xlabel="epoch", yscale="log")
    loss.legend(frameon=False)

    accuracy.plot(
        epochs, [100 * row["top1"] for row in training], label="training (augmented)", color="tab:blue", alpha=0.8
    )
    test_top1 = [100 * row["top1"] for row in evaluation]
    accuracy.plot(tested, test_top1, "o-", label="test", color="tab:orange", markersize=4)
    if test_top1:
        accuracy.annotate(
            f"{test_top1[-1]:.2f} %",
            (tested[-1], test_top1[-1]),
            xytext=(-4, -14),
            textcoords="offset points",
            ha="right",
        )
    accuracy.set(title="top-1 accuracy, %", xlabel="epoch")
    accuracy.legend(frameon=False, loc="lower right")

    rate.plot(epochs, [row["learning_rate"] for row in training], color="tab:green")
    rate.set(title="learning rate", xlabel="epoch")
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)

    path = workdir / "curves.png"
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
    return path
