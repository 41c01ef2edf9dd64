"""Projectors: ridge regression in closed form, judged on what it has not seen, bound to both backbones."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device.contract.errors import ArtifactError
from device.contract.manifest import Manifest, ProjectorEntry
from device.migration import read_projector
from host.continual.projector import PENALTIES, _left_out, class_means, fit_projector, measure_fit
from host.errors import HostError, RecipeError
from host.recipe import parse_recipe
from host.stages.migrate import Backbone, learn_projectors
from tests.support.bundles import make_manifest, with_content

D, E, N = 6, 5, 80


def pair(seed: int, *, noise: float = 0.0, count: int = N) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features of an old and a new backbone, and the map between them."""
    rng = np.random.default_rng(seed)
    old, weight, bias = rng.normal(2, 3, (count, D)), rng.normal(size=(D, E)), rng.normal(size=E)
    return old, old @ weight + bias + noise * rng.normal(size=(count, E)), weight, bias


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_a_linear_relation_is_found(seed: int):
    old, new, weight, bias = pair(seed)
    projector = fit_projector(old, new)
    np.testing.assert_allclose(projector.weight, weight, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(projector.bias, bias, rtol=1e-2, atol=1e-2)
    assert np.trace(projector.residual) < 1e-3 * np.trace(np.cov(new.T))


def test_left_out_errors_are_those_of_fits_without_the_image():
    old, new, *_ = pair(1, noise=2.0, count=25)
    penalty = 0.3
    x, y = old - old.mean(axis=0), new - new.mean(axis=0)
    variances, directions = np.linalg.eigh(x.T @ x / len(x))
    z = x @ directions
    found = _left_out(z, y, variances, z.T @ y / len(x), penalty)
    for index in range(len(old)):
        rest = np.arange(len(old)) != index
        # the same penalty in all, on sums: the fit of the rest has the penalty of the whole
        a, b = old[rest] - old[rest].mean(axis=0), new[rest] - new[rest].mean(axis=0)
        weight = np.linalg.solve(a.T @ a + len(old) * penalty * np.eye(D), a.T @ b)
        error = new[index] - new[rest].mean(axis=0) - (old[index] - old[rest].mean(axis=0)) @ weight
        np.testing.assert_allclose(found[index], error, rtol=1e-6, atol=1e-8)


def test_the_rest_is_what_unseen_images_show():
    old, new, *_ = pair(2, noise=1.5, count=400)
    projector = fit_projector(old[:300], new[:300])
    unseen = new[300:] - projector.features(old[300:])
    assert np.trace(projector.residual) == pytest.approx(np.trace(unseen.T @ unseen / 100), rel=0.25)


def test_more_features_than_images_are_no_trouble():
    rng = np.random.default_rng(3)
    old = rng.normal(size=(30, 100))
    new = old[:, :4] + 0.1 * rng.normal(size=(30, 4))
    projector = fit_projector(old, new)
    assert np.isfinite(projector.weight).all()
    assert np.trace(projector.residual) <= 1.5 * np.trace(np.cov(new.T))  # not worse than knowing nothing
    assert len(PENALTIES) > 10


def test_the_figures_tell_a_good_projector_from_none():
    old, new, *_ = pair(4, noise=0.5, count=200)
    labels = np.repeat([0, 1], 100)
    new[labels == 1] += 4
    old[labels == 1] += 4
    means, mean = class_means(new, labels), new.mean(axis=0)
    good = measure_fit(fit_projector(old[::2], new[::2]), old=old[1::2], new=new[1::2], means=means, mean=mean)
    rng = np.random.default_rng(5)
    bad = measure_fit(
        fit_projector(rng.permutation(old)[::2], new[::2]), old=old[1::2], new=new[1::2], means=means, mean=mean
    )
    assert good.r2 > 0.8
    assert good.head_agreement > 0.8
    assert bad.r2 < 0.2
    assert bad.mean_cosine < 0.5 < good.mean_cosine


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (np.zeros((5, D)), np.zeros((5, E)), "needs 20 or more images"),
        (np.zeros((30, D)), np.zeros((29, E)), "got 30 and 29"),
        (np.full((30, D), np.nan), np.zeros((30, E)), "not finite"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(old, new, message):
    with pytest.raises(HostError, match=message):
        fit_projector(old, new)


def backbone(name: str, features: np.ndarray) -> Backbone:
    artifact = replace(make_manifest().artifacts[0], backbone=name * 64)
    return Backbone(artifact=artifact, features=features[::2], held_out=features[1::2])


def test_every_way_gets_a_file_that_a_board_reads(tmp_path: Path):
    old, new, *_ = pair(6, noise=0.1)
    labels = np.arange(len(old) // 2) % 3
    ours = [backbone("c", new), backbone("a", old)]
    found = list(learn_projectors([backbone("a", old), backbone("b", 2 * old)], ours, labels))
    ways = [(entry.from_backbone[0], entry.to_backbone[0]) for entry, _ in found]
    assert ways == [("a", "c"), ("b", "c"), ("b", "a")]  # the same backbone needs none
    assert found[0][0].path == "projector-aaaaaaaa-cccccccc.npz"
    for entry, content in found:
        path = tmp_path / entry.path
        path.write_bytes(content)
        width = E if entry.to_backbone[0] == "c" else D
        ends = {"from_backbone": entry.from_backbone, "to_backbone": entry.to_backbone}
        projector = read_projector(path, **ends, dims=(D, width))
        assert projector.residual.shape == (width, width)
        assert entry.r2 > 0.9
    again = learn_projectors([backbone("a", old), backbone("b", 2 * old)], ours, labels)
    assert [content for _, content in again] == [content for _, content in found]


def entry(**changes: str) -> ProjectorEntry:
    fields = {"path": "model.int8.tflite", "from_backbone": "a" * 64, "to_backbone": "0" * 64} | changes
    return ProjectorEntry(**fields, r2=0.5, mean_cosine=0.5, head_agreement=0.5)


def test_a_manifest_with_projectors_has_a_schema_of_its_own():
    plain = with_content(make_manifest(), b"x")
    assert "projectors" not in plain.to_json()  # an older agent reads it as ever
    assert Manifest.from_json(plain.to_json()) == plain
    with_one = replace(plain, projectors=(entry(),), schema=2)
    assert Manifest.from_json(with_one.to_json()) == with_one
    assert with_one.projector("a" * 64, "0" * 64) == entry()
    assert with_one.projector("b" * 64, "0" * 64) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projectors": (entry(),)}, "1 projectors in schema 1"),
        ({"schema": 2}, "0 projectors in schema 2"),
        ({"projectors": (entry(), entry()), "schema": 2}, "two lead from the same backbone"),
        ({"projectors": (entry(path="none.npz"),), "schema": 2}, r"none\.npz is not among its files"),
        ({"projectors": (entry(to_backbone="f" * 64),), "schema": 2}, "a backbone that is not in this bundle"),
    ],
)
def test_projectors_that_do_not_fit_the_bundle_are_refused(changes, message):
    with pytest.raises(ArtifactError, match=message):
        replace(with_content(make_manifest(), b"x"), **changes)


RECIPE = """
name = "two"
data = { source = "digits" }
model = { family = "cnn", variant = "small" }
train = { epochs = 1 }
export = { migrate_from = ["../one/old.fieldvit"] }
"""


def test_a_recipe_names_earlier_bundles_from_its_folder_and_tells_only_their_names(tmp_path: Path):
    recipe = parse_recipe(RECIPE, where="recipe").found_from(tmp_path)
    assert Path(recipe.export.migrate_from[0]).parent.name == "one"
    assert recipe.table()["export"]["migrate_from"] == ["old.fieldvit"]


def test_a_missing_earlier_bundle_is_found_out_before_training(tmp_path: Path):
    from host.stages.order import run_recipe

    recipe = parse_recipe(RECIPE, where="recipe").found_from(tmp_path)
    with pytest.raises(RecipeError, match=r"export\.migrate_from: .*old\.fieldvit is not a file"):
        run_recipe(recipe, tmp_path, until="export", report=lambda *_: pytest.fail("trained"))


def test_an_earlier_bundle_that_is_none_is_found_out_before_training(tmp_path: Path):
    from host.stages.order import run_recipe

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "old.fieldvit").write_text("name = 'a recipe, and no bundle'")
    recipe = parse_recipe(RECIPE, where="recipe").found_from(tmp_path / "two")
    with pytest.raises(RecipeError, match=r"export\.migrate_from: .*old\.fieldvit: not a bundle"):
        run_recipe(recipe, tmp_path, until="export", report=lambda *_: pytest.fail("trained"))


@pytest.mark.slow
def test_taught_digits_survive_a_retrained_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The whole way, on real images: two recipes, an exported projector, lessons on int8 in LiteRT, and the move."""
    import bench.migration as table

    monkeypatch.setattr(table, "RUNS", tmp_path)
    row = table.measure(table.list_jobs()[0])
    assert row["left_behind"] == 0
    assert row["migrated_taught"] >= 0.85 * row["before_taught"]
    assert row["migrated_shipped"] >= row["before_shipped"] - 0.03
    assert row["from_sums_taught"] == pytest.approx(row["migrated_taught"], abs=0.05)
