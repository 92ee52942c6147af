"""The benchmark's result as Markdown tables: what its README quotes."""

from __future__ import annotations

POLICY_COLUMNS = ("model", "policy", "bits", "explained_variance_mean", "explained_variance_largest", "accuracy")
DEFENCE_COLUMNS = ("defence", "policy", "bits", "released", "accuracy", "accuracy_cost", "explained_variance")
TIMING_COLUMNS = ("parameters", "pictures", "auditors", "wall_s", "cpu_s")
TABLE_COLUMNS = (
    "data",
    "outputs",
    "accuracy_honest",
    "accuracy_vicious",
    "explained_variance",
    "ssim_reconstruction",
    "ssim_class_mean",
    "psnr_db_reconstruction",
    "psnr_db_class_mean",
    "risk_r_reconstruction",
    "risk_r_class_mean",
)


def cell(value) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def markdown(rows: list[dict], columns: tuple[str, ...]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def interval(found: dict | None) -> str:
    return "-" if found is None else f"{found['auc']:.2f} [{found['interval'][0]:.2f}, {found['interval'][1]:.2f}]"


def detection_table(found: dict) -> str:
    rows = []
    for name, stratum in found["strata"].items():
        worked = (stratum["successful"] or {"models": 0})["models"]
        rows.append(
            {
                "stratum": name,
                "worked": worked,
                "of them flagged": stratum["successful_flagged"],
                "AUC of those": interval(stratum["successful"]),
                "failed": stratum["failed"],
                "failed, flagged": stratum["failed_flagged"],
                "AUC, all": interval(stratum["all"]),
            }
        )
    attacks = [row for row in found["models"] if "succeeded" in row]
    columns = ("stratum", "attack", "accuracy", "twin_accuracy", "own_explained_variance",
               "twin_best_explained_variance", "succeeded", "score", "margin", "flagged")  # fmt: skip
    pooled = interval(found["pooled_strong_and_weak"])
    return "\n".join(
        [
            markdown(rows, tuple(rows[0])),
            (
                f"\nstrong and weak that worked, pooled: AUC {pooled}; honest {found['honest']}, "
                f"falsely flagged: {found['false_positives'] or 'none'}; threshold {found['threshold']}\n"
            ),
            markdown(attacks, columns),
        ]
    )


def indicator_table(found: dict) -> str:
    rows = [{"group": name, **values} for name, values in found.items()]
    return markdown(rows, ("group", "models", "auc_one_output", "auc_window_of_50", "windows_flagged"))


def as_tables(result: dict) -> str:
    """Return every part that was run as a table under its name."""
    forms = {
        "table": lambda rows: markdown(rows, TABLE_COLUMNS),
        "detection": detection_table,
        "files": lambda rows: markdown(rows, tuple(rows[0])),
        "policies": lambda rows: markdown(rows, POLICY_COLUMNS),
        "indicator": indicator_table,
        "defences": lambda rows: markdown(rows, DEFENCE_COLUMNS),
        "timing": lambda rows: markdown(rows, TIMING_COLUMNS),
        "small-probes": lambda rows: markdown(rows, tuple(rows[0])),
        "public-code": str,
    }
    parts = [f"## {name}\n\n{form(result[name])}" for name, form in forms.items() if name in result]
    spent = ", ".join(f"{n} {s['wall']:.0f} ({s['processor']:.0f})" for n, s in result["seconds"].items())
    whole = sum(s["wall"] for s in result["seconds"].values())
    return "\n\n".join([*parts, f"seconds by the clock (of the processors): {spent}; total {whole:.0f}"])
