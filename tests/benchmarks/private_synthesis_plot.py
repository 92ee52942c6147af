"""Tables and pictures of what ``private_synthesis.py`` found."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def plot(result: dict[str, Any], folder: Path) -> None:
    """Accuracy against the strongest attack's AUC and TPR, one picture a data set."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted({row["data"] for row in result["rows"]}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
        points = [row for row in [*result["rows"], *result["controls"]] if row["data"] == name]
        for number, row in enumerate(points, 1):
            y, audit = row.get("accuracy_synthetic", row.get("accuracy")), row["audit"]
            look = {"marker": "o" if "accuracy_synthetic" in row else "s", "color": f"C{number % 10}"}
            for axes, x in ((left, audit["auc"]), (right, audit["tpr_at_1pct"] or 0.0)):
                axes.scatter([x], [y], label=f"{number} {label_of(row)}", **look)
                axes.annotate(str(number), (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
        swept = sorted((r for r in points if r["row"].startswith("public VAE, noise ratio")), key=_ratio)
        left.plot([r["audit"]["auc"] for r in swept], [r["accuracy_synthetic"] for r in swept], color="grey", lw=0.8)
        right.plot(
            [r["audit"]["tpr_at_1pct"] for r in swept], [r["accuracy_synthetic"] for r in swept], color="grey", lw=0.8
        )
        left.axvline(0.5, color="grey", linestyle=":")
        right.axvline(0.01, color="grey", linestyle=":")
        left.set(xlabel="AUC of the strongest attack", ylabel="accuracy on unseen real images", title=name)
        right.set(xlabel="its TPR at 1 % FPR", title="dotted: chance; line: noise ratio rising to the left")
        right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
        figure.tight_layout()
        figure.savefig(folder / f"private-synthesis-{name}.png", dpi=110)
        plt.close(figure)


def _ratio(row: dict[str, Any]) -> float:
    return float(row["noise_ratio"])


def label_of(row: dict[str, Any]) -> str:
    """The row's name, with the epsilon that was matched."""
    return row["row"] + (f", epsilon {row['epsilon']:g}" if "matched_to" in row else "")


def show(result: dict[str, Any]) -> None:
    """The tables as Markdown."""
    print("| data | row | accuracy | loss, points | kappa | bound | strongest attack | AUC | TPR at 1 % FPR | null |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in [*result["controls"], *result["rows"]]:
        audit, loss = row["audit"], row["loss_points"]
        value = row.get("accuracy_synthetic", row.get("accuracy"))
        proved = " | ".join("-" if row.get(k) is None else f"{row[k]:.3g}" for k in ("kappa", "advantage_bound"))
        print(
            f"| {row['data']} | {label_of(row)} | {value:.3f} | {loss[0]:.1f} ({loss[1]:.1f} to {loss[2]:.1f}) "
            f"| {proved} | {audit['strongest']} | {audit['auc']:.3f} | {100 * (audit['tpr_at_1pct'] or 0):.1f} % "
            f"| {audit['null_auc']:.3f} |"
        )
    for key in ("latent", "throughput", "wall_seconds", "cpu_seconds"):
        if key in result:
            print(f"\n{key}: {json.dumps(result[key])}")
