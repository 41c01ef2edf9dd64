"""Run the quickstart with five seeds and write the table `quickstart_seeds`.

    python -m bench.quickstart_seeds [SEED ...]

Each seed draws its own test half and trains its own model. A seed that is already in `runs/bench-seeds` with today's code
is not trained again.
"""

import sys
from pathlib import Path
from statistics import mean
from typing import Any

from bench.record import write_results
from host.quickstart.run import QuickstartConfig, run_quickstart

SEEDS = (0, 1, 2, 3, 4)
RUNS = Path("runs/bench-seeds")
SHARES = (
    "base_accuracy_float",
    "base_accuracy_int8",
    "all_accuracy_before",
    "all_accuracy_after",
    "old_classes_drop",
    "tflite_argmax_agreement",
    "coreml_argmax_agreement",
    "bad_updates_refused",
)


def readme_table(rows: list[dict[str, Any]]) -> str:
    """The table that README.md shows, from the rows of the results."""
    seeds, mean_row = rows[:-1], rows[-1]
    lowest, highest = min(row["all_accuracy_after"] for row in seeds), max(row["old_classes_drop"] for row in seeds)
    lines = ["| figure | mean of five seeds | seed 0 | how it was measured |", "|---|---|---|---|"]
    for figure, name, digits, how in (
        ("float32 TFLite, 8 known classes", "base_accuracy_float", 2, "about 720 test images, LiteRT"),
        ("int8 TFLite, 8 known classes", "base_accuracy_int8", 2, "the same images"),
        ("all ten classes before the lesson", "all_accuracy_before", 2, "all 898 test images; 8 and 9 are unknown"),
        ("all ten classes after 20 + 20 labels", "all_accuracy_after", 2, f"lowest of the seeds {lowest:.2%}"),
        ("accuracy lost on the 8 old classes", "old_classes_drop", 2, f"highest of the seeds {highest:.2%}"),
        ("float32 TFLite answers as PyTorch", "tflite_argmax_agreement", 0, "test images of the known classes"),
        (
            "Core ML answers as PyTorch",
            "coreml_argmax_agreement",
            0,
            "the saved float16 program, evaluated here, not on Apple's",
        ),
        ("bad updates refused", "bad_updates_refused", 0, "wrong keys, damaged on the way, broken inside"),
    ):
        cells = (f"{row[name]:.{digits}%}" for row in (mean_row, seeds[0]))
        lines.append(f"| {figure} | {' | '.join(cells)} | {how} |")
    cells = (f"{row['seconds']:.0f} s, {row['peak_memory_mb'] / 1e3:.1f} GB" for row in (mean_row, seeds[0]))
    lines.append(
        f"| time and peak memory of the job | {' | '.join(cells)} | 2 cores, after the installation; all processes |"
    )
    return "\n".join(lines)


def _row(seed: int, metrics: dict[str, Any]) -> dict[str, Any]:
    costs = {name: round(metrics[name]) for name in ("seconds", "peak_memory_mb")}
    return {"seed": str(seed)} | {name: metrics[name] for name in SHARES} | costs


def main(seeds: list[int]) -> int:
    rows = [_row(seed, run_quickstart(QuickstartConfig(seed=seed, runs=RUNS))) for seed in seeds]
    rows.append(
        {"seed": "mean"} | {name: mean(row[name] for row in rows) for name in (*SHARES, "seconds", "peak_memory_mb")}
    )
    write_results(
        "quickstart_seeds",
        command="python -m bench.quickstart_seeds " + " ".join(map(str, seeds)),
        seed=None,
        data="scikit-learn digits: half for training and field labels, half for the test; the split is drawn by the seed",
        rows=rows,
        title="Quickstart over five seeds",
        notes="Shares in 0..1, measured by the device process on the test half. 20 + 20 field labels, `slda`.",
    )
    print(readme_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main([int(argument) for argument in sys.argv[1:]] or list(SEEDS)))
