"""bench.claims: every claim once, no verdict without its reason, and rows of results judged as their numbers say."""

import json

import pytest
import torch

import host.models  # noqa: F401  repairs torchvision before timm
from bench import claim_checks, claims, latency_families, small_claims
from bench.claim_checks import INCOMPLETE, NOT_REPRODUCED, NOT_TESTABLE, REPRODUCED, VERDICTS
from bench.claims import CLAIMS
from bench.ninformer_cifar10 import CIFAR, DROPOUT, MNIST, OURS
from bench.small_claims import BUILDERS, HYBRID, MIXER, PIXELS, SEEDS, TRAINING, list_jobs

COUNTS = {
    "EfficientFormer": 6,
    "Next-ViT": 5,
    "NiNformer": 5,
    "MobileViT family": 5,
    "NViT": 5,
    "GCAB": 5,
    "DeiT-LT": 5,
}
RIVALS = ("ViT", "MLP-Mixer, 4 blocks")


def ninformer_rows(gap: float, *, seeds=SEEDS, datasets=(CIFAR, MNIST)) -> list[dict]:
    """NiNformer better than every rival by `gap`, on average over the seeds a little more."""
    return [
        {"dataset": dataset, "model": model, "dropout": DROPOUT, "seed": seed, "clean_accuracy": accuracy}
        for dataset in datasets
        for seed in seeds
        for model, accuracy in [(OURS, 0.6 + gap + 0.01 * seed), *((rival, 0.6) for rival in RIVALS)]
    ]


def latency_rows(*ratios: float) -> list[dict]:
    return [
        {"model": f"nextvit/{variant}", "p50_ms": 100 * ratio, "ratio_to_ResNet-50": ratio}
        for variant, ratio in zip("sbl", ratios, strict=False)
    ]


def small_rows(claim: str, seeds=SEEDS, **accuracies: float) -> list[dict]:
    """One row per seed of each of the claim's variants, in their order; `accuracies` are named `v0`, `v1`, ..."""
    keys = [key for key in BUILDERS if key[0] == claim]
    return [
        {
            "claim": claim,
            "model": model,
            "variant": variant,
            "seed": seed,
            "clean_accuracy": accuracies[f"v{index}"],
            "normalised_accuracy": accuracies.get("normalised"),
            "latency_ratio": accuracies.get("ratio") if seed == 0 and index == 2 else None,
        }
        for index, (_, model, variant) in enumerate(keys)
        for seed in seeds
    ]


def test_every_claim_is_there_once_and_in_order():
    expected = [(name, number) for name, count in COUNTS.items() for number in range(1, count + 1)]
    assert [(claim.specification, claim.number) for claim in CLAIMS] == expected
    assert len(expected) == 36


def test_what_cannot_be_tested_says_why():
    checks = [claim.check for claim in CLAIMS if claim.how is None]
    assert len(checks) == 13
    for check in checks:
        finding = check()
        assert finding.verdict == NOT_TESTABLE
        assert finding.why.startswith("needs ")
    assert claim_checks.check_reserved_fraction().why


@pytest.mark.parametrize(
    "check",
    [
        claim_checks.check_folding,
        claim_checks.check_separable_attention,
        claim_checks.check_permutation,
        claim_checks.check_zero_forgetting,
        lambda: claim_checks.check_sizes("ninformer", others=claim_checks.ninformer_sizes),
    ],
)
def test_quick_checks_find_the_claim_reproduced(check):
    finding = check()
    assert (finding.verdict, finding.why) == (REPRODUCED, None)
    assert finding.figure


def test_a_size_that_differs_is_named():
    finding = claim_checks.check_sizes("ninformer", others=lambda: {"heads": (4, 5)})
    assert (finding.verdict, finding.why) == (NOT_REPRODUCED, "heads")


def test_dense_model_is_exact_but_for_the_embedding():
    finding = claim_checks.check_dense_model()
    assert finding.verdict == NOT_REPRODUCED
    assert "LayerNorm" in finding.why


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        ([], INCOMPLETE),
        (ninformer_rows(0.01, seeds=(0, 1)), INCOMPLETE),
        (ninformer_rows(0.01, datasets=(CIFAR,)), INCOMPLETE),
        (ninformer_rows(0.01), REPRODUCED),
        (ninformer_rows(-0.005), NOT_REPRODUCED),  # better on average, but not with seed 0
    ],
)
def test_ninformer_is_judged_by_every_seed(rows, verdict):
    finding = claim_checks.judge_ninformer(rows, rivals=RIVALS)
    assert finding.verdict == verdict
    assert (finding.why is None) == (verdict == REPRODUCED)


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ((1.0, 1.5), INCOMPLETE),
        ((1.0, 1.5, 2.05), REPRODUCED),
        ((1.0, 1.5, 2.3), NOT_REPRODUCED),
        ((1.0, 1.5, 1.4), NOT_REPRODUCED),
        ((1.5, 1.3, 1.1), NOT_REPRODUCED),
    ],
)
def test_latency_must_grow_in_nearly_equal_steps(ratios, verdict):
    assert claim_checks.judge_increments(latency_rows(*ratios)).verdict == verdict


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        (small_rows(HYBRID, v0=0.6, v1=0.5, v2=0.61, ratio=1.2), REPRODUCED),
        (small_rows(HYBRID, v0=0.6, v1=0.5, v2=0.61, ratio=0.9), NOT_REPRODUCED),
        (small_rows(HYBRID, v0=0.6, v1=0.6, v2=0.61, ratio=1.2), NOT_REPRODUCED),
        (small_rows(HYBRID, v0=0.6, v1=0.5, v2=0.61), INCOMPLETE),
        (small_rows(HYBRID, seeds=(0, 1), v0=0.6, v1=0.5, v2=0.61, ratio=1.2), INCOMPLETE),
    ],
)
def test_attention_must_gain_and_cost(rows, verdict):
    assert claim_checks.judge_hybrid(rows).verdict == verdict


def test_pixels_must_cost_accuracy_in_both_models():
    rows = small_rows(PIXELS, v0=0.5, v1=0.5, normalised=0.2)
    assert claim_checks.judge_pixels(rows).verdict == REPRODUCED
    assert claim_checks.judge_pixels(rows[:-1]).verdict == INCOMPLETE
    assert claim_checks.judge_pixels([*rows[:-1], {**rows[-1], "normalised_accuracy": 0.5}]).verdict == NOT_REPRODUCED


def test_mixers_are_judged_by_accuracy_and_parameters():
    finding = claim_checks.judge_mixers(small_rows(MIXER, v0=0.60, v1=0.61))
    assert finding.verdict == NOT_REPRODUCED
    assert "L1 grows by 0.22%" in finding.why
    assert "accuracy is lower" not in finding.why
    assert "accuracy is lower" in claim_checks.judge_mixers(small_rows(MIXER, v0=0.61, v1=0.60)).why
    assert claim_checks.judge_mixers([]).verdict == INCOMPLETE


def test_rows_of_another_recipe_do_not_count(tmp_path):
    job = latency_families.list_jobs()[0]
    rows = [{"model": "now", "recipe": job.recipe}, {"model": "before", "recipe": "0"}]
    (tmp_path / "latency_families.json").write_text(json.dumps({"rows": rows}))
    assert [row["model"] for row in claims.current_rows("latency_families", tmp_path)] == ["now"]
    assert claims.current_rows("small_claims", tmp_path) == ()


def test_the_table_holds_verdicts_of_the_four_kinds_only():
    path = claims.RESULTS / "claims.json"
    if not path.exists():
        pytest.skip("not measured yet")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == len(CLAIMS)
    assert {row["verdict"] for row in rows} <= set(VERDICTS)
    assert all(row["why"] for row in rows if row["verdict"] in (NOT_TESTABLE, INCOMPLETE))


# --- the trainings ----------------------------------------------------------------------------------------------------


def test_trainings_are_three_seeds_of_every_variant():
    jobs = list_jobs()
    assert len({job.recipe for job in jobs}) == len(jobs) == len(BUILDERS) * len(SEEDS)
    assert {claim for claim, _, _ in BUILDERS} == set(TRAINING)


def test_attention_throughout_keeps_the_widths_and_deploys():
    as_is, _, more = (small_claims.build(*key, seed=0).eval() for key in BUILDERS if key[0] == HYBRID)
    widths = [[block.out_chs for block in model.stages[1].blocks] for model in (as_is, more)]
    assert widths[0] == widths[1]
    assert {type(block).__name__ for block in more.stages[1].blocks} == {"NextTransformerBlock"}
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(more.deploy()(images), more(images), rtol=1e-3, atol=1e-4)


def test_training_learns_a_few_images():
    key = next(key for key in BUILDERS if key[0] == MIXER)
    model = small_claims.build(*key, seed=0)
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    images, labels = images.repeat(16, 1, 1, 1), torch.arange(4).repeat(16)
    settings = {"epochs": 20, "batch_size": 16, "is_half": False}
    small_claims.train(model, images, labels, settings, small_claims.to_unit, seed=0)
    assert small_claims.accuracy(model, images, labels, small_claims.to_unit) > 0.9


def test_normalized_images_have_imagenets_mean_and_deviation():
    images = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert small_claims.to_unit(images).max() == 1
    expected = [(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert small_claims.to_imagenet(images)[0, :, 0, 0].tolist() == pytest.approx(expected)
