"""Run the quickstart with five seeds and write the table `quickstart_seeds`.

    python -m bench.quickstart_seeds [SEED ...]

Each seed draws its own test half and trains its own model. A seed that is already in `runs/bench-seeds` with today's code
is not trained again.
"""

import sys
from pathlib import Path
from statistics import mean

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


def main(seeds: list[int]) -> int:
    rows = []
    for seed in seeds:
        metrics = run_quickstart(QuickstartConfig(seed=seed, runs=RUNS))
        rows.append(
            {"seed": str(seed)} | {name: metrics[name] for name in SHARES} | {"seconds": round(metrics["seconds"])}
        )
    rows.append({"seed": "mean"} | {name: mean(row[name] for row in rows) for name in (*SHARES, "seconds")})
    write_results(
        "quickstart_seeds",
        command="python -m bench.quickstart_seeds " + " ".join(map(str, seeds)),
        seed=None,
        data="scikit-learn digits: half for training and field labels, half for the test; the split is drawn by the seed",
        rows=rows,
        title="Quickstart over five seeds",
        notes="Shares in 0..1, measured by the device process on the test half. 20 + 20 field labels, `slda`.",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main([int(argument) for argument in sys.argv[1:]] or list(SEEDS)))
