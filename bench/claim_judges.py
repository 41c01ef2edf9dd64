"""Judge claims by rows that other benchmarks measured: trainings of hours, latencies of many models.

A judge takes the rows of a results file and returns what became of the claim. Too few rows are no verdict: the claim is
incomplete until every seed is measured.
"""

from collections.abc import Sequence
from statistics import mean

import torch

from bench.claim_findings import NUM_SEEDS, Finding, incomplete, judged
from bench.ninformer_cifar10 import CIFAR, DROPOUT, MNIST, OURS
from bench.record import Row
from bench.small_claims import (
    AS_IS,
    CONVOLUTION,
    HYBRID,
    MIXER,
    MORE_ATTENTION,
    NO_ATTENTION,
    PIXELS,
    POOLING,
    by_seed,
    paired_gaps,
    spread,
    with_convolution_mixers,
)
from host.models.measure import count_parameters
from host.models.registry import find_model

NEARLY_EQUAL = 0.2
"""Next-ViT 4: how much the smaller of two increments may lack of the larger one. Each is a difference of two medians."""
VISIBLE_DROP = 0.05
"""MobileViT 5, of accuracy, with every seed."""


def judge_mixers(rows: Sequence[Row]) -> Finding:
    """Not lower: the mean of the paired gaps is not below zero."""
    pooling, convolution = (by_seed(rows, claim=MIXER, variant=variant) for variant in (POOLING, CONVOLUTION))
    gaps = paired_gaps(convolution, pooling)
    growth = {variant: mixer_growth(variant) for variant in ("field-32", "l1", "l3", "l7")}
    figure = (
        f"accuracy {spread([*convolution.values()])} with convolutions, {spread([*pooling.values()])} with pooling, gap "
        f"{spread(gaps, '+')}, {len(gaps)} seeds; extra parameters "
        + ", ".join(f"{variant} {share:.2%}" for variant, share in growth.items())
    )
    if len(gaps) < NUM_SEEDS:
        return incomplete(len(gaps), "small_claims", figure)
    why = [] if mean(gaps) >= 0 else ["accuracy is lower"]
    if max(growth[variant] for variant in ("l1", "l3", "l7")) >= 0.002:
        why.append(
            f"exactly counted, L1 grows by {growth['l1']:.2%}; the paper's 12.25 and 12.27 million, as rounded as that, "
            "allow 0.08 to 0.25%"
        )
    return judged(not why, figure, "; ".join(why))


def mixer_growth(variant: str) -> float:
    """The share of parameters that convolution mixers add."""
    with torch.device("meta"):
        model = find_model("efficientformer", variant).create()
        before = count_parameters(model)
        return count_parameters(with_convolution_mixers(model)) / before - 1


def judge_hybrid(rows: Sequence[Row]) -> Finding:
    """Attention gains with every seed; more of it costs a larger share of time than it gains of accuracy."""
    as_is, without, more = (
        by_seed(rows, claim=HYBRID, variant=variant) for variant in (AS_IS, NO_ATTENTION, MORE_ATTENTION)
    )
    ratios = [ratio for ratio in by_seed(rows, "latency_ratio", claim=HYBRID, variant=MORE_ATTENTION).values() if ratio]
    losses, gains = paired_gaps(as_is, without), paired_gaps(more, as_is)
    figure = (
        f"accuracy with attention less without: {spread(losses, '+')}; all NTB in stage 2: accuracy {spread(gains, '+')}, "
        f"latency {ratios[0] if ratios else '–'} times; {min(len(losses), len(gains))} seeds"
    )
    if min(len(losses), len(gains)) < NUM_SEEDS or not ratios:
        return incomplete(min(len(losses), len(gains)), "small_claims", figure)
    why = [] if min(losses) > 0 else ["without attention accuracy is not lower with every seed"]
    slower, better = ratios[0] - 1, mean(gains) / mean(as_is.values())
    if slower <= max(better, 0):
        why.append(f"{slower:+.1%} of latency is not more than {better:+.1%} of accuracy")
    return judged(not why, figure, "; ".join(why) + " (the specification marks the direction as unverified)")


def judge_increments(rows: Sequence[Row]) -> Finding:
    """S < B < L, with increments within `NEARLY_EQUAL`; in units of the peer that was measured in turn with each."""
    unit = "ratio_to_ResNet-50"
    found = {row["model"]: row for row in rows if row["model"] in ("nextvit/s", "nextvit/b", "nextvit/l")}
    if len(found) < 3:
        return incomplete(len(found), "latency_families", of=3, what="variants")
    small, base, large = (found[f"nextvit/{variant}"] for variant in "sbl")
    first, second = base[unit] - small[unit], large[unit] - base[unit]
    difference = 1 - min(first, second) / max(first, second)
    trio = (small, base, large)
    milliseconds, ratios = (", ".join(f"{row[column]:.3g}" for row in trio) for column in ("p50_ms", unit))
    figure = (
        f"{milliseconds} ms in LiteRT for S, B, L; {ratios} times ResNet-50, increments {first:+.2f} and {second:+.2f}, "
        f"{difference:.0%} apart (at most {NEARLY_EQUAL:.0%})"
    )
    return judged(min(first, second) > 0 and difference <= NEARLY_EQUAL, figure, "order or increments differ")


def judge_ninformer(
    rows: Sequence[Row], rivals: Sequence[str], *, least: float = 0.0, reported: Sequence[str] = ()
) -> Finding:
    """Better than each rival by more than `least` with every seed on CIFAR-10; MNIST must be measured and is reported."""

    def gaps(dataset: str, model: str) -> list[float]:
        key = {"dataset": dataset, "dropout": DROPOUT}
        return paired_gaps(by_seed(rows, model=OURS, **key), by_seed(rows, model=model, **key))

    found = {(dataset, rival): gaps(dataset, rival) for dataset in (CIFAR, MNIST) for rival in (*rivals, *reported)}
    figure = "; ".join(
        f"{dataset}: "
        + ", ".join(f"{spread(found[dataset, rival], '+')} over {rival}" for rival in (*rivals, *reported))
        for dataset in (CIFAR, MNIST)
    )
    fewest = {dataset: min(len(found[dataset, rival]) for rival in (*rivals, *reported)) for dataset in (CIFAR, MNIST)}
    if min(fewest.values()) < NUM_SEEDS:
        return incomplete(
            fewest[CIFAR], "ninformer_cifar10", figure, what=f"seeds on CIFAR-10, {fewest[MNIST]} on MNIST"
        )
    losers = [rival for rival in rivals if min(found[CIFAR, rival]) <= least]
    return judged(not losers, figure, f"not with every seed: {', '.join(losers)}")


def judge_pixels(rows: Sequence[Row]) -> Finding:
    models = ("mobilevit/field-32", "mobilevitv2/field-32")
    clean = {model: by_seed(rows, claim=PIXELS, model=model) for model in models}
    wrong = {model: by_seed(rows, "normalised_accuracy", claim=PIXELS, model=model) for model in models}
    drops = {model: paired_gaps(clean[model], wrong[model]) for model in models}
    figure = "; ".join(
        f"{model} {spread([*clean[model].values()])} falls to {spread([*wrong[model].values()])}, {len(drops[model])} seeds"
        for model in models
    )
    fewest = min(map(len, drops.values()))
    if fewest < NUM_SEEDS:
        return incomplete(fewest, "small_claims", figure)
    losing = [model for model in models if min(drops[model]) <= VISIBLE_DROP]
    return judged(not losing, figure, f"{', '.join(losing)} loses {VISIBLE_DROP} or less with some seed")
