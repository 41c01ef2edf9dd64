"""Measures of a distilled transformer's two tokens: against loops, and where the answer is known."""

import numpy as np
import pytest
import torch

from bench.probes import make_images, randomize
from host.distill.analysis import (
    analyze_tokens,
    attention_weights,
    disagreement,
    feature_rank,
    group_accuracy,
    mean_attention_distance,
)
from host.errors import DataError, ModelError
from host.models.deit import VisionTransformer
from host.models.vit_widths import uniform_widths

COUNTS = [50, 500, 5, 160]
BOUNDARIES = (1, 3)  # many: class 1; medium: 3 and 0; few: 2


def transformer(**options: object) -> VisionTransformer:
    settings = {"num_classes": 4, "in_chans": 3, "image_size": 32, "patch_size": 8, "is_distilled": True, **options}
    return randomize(VisionTransformer(**settings, embed_dim=16, widths=uniform_widths(3, 2, 8, 32)))


def test_attention_weights_are_what_the_layer_multiplies_with():
    attention = transformer().blocks[1].attn.double()
    x = torch.randn(2, 18, 16, dtype=torch.float64)
    weights = attention_weights(attention, x)
    values = attention.qkv(x)[:, :, -16:].unflatten(2, (2, 8)).transpose(1, 2)
    torch.testing.assert_close(attention.proj((weights @ values).transpose(1, 2).flatten(2)), attention(x))
    torch.testing.assert_close(weights.sum(dim=3), torch.ones(2, 2, 18, dtype=torch.float64))


def test_distance_of_looking_at_oneself_is_0_and_at_the_neighbour_a_patch():
    neighbour = torch.zeros(16, 16)
    for patch in range(16):
        neighbour[patch, patch ^ 1] = 1  # the one beside it, in rows of 4
    weights = torch.stack([torch.eye(16), neighbour])[None]
    distances = mean_attention_distance(weights, num_prefix_tokens=0, patch_size=8)
    torch.testing.assert_close(distances, torch.tensor([[0.0, 8.0]]))


def test_distance_is_the_weighted_mean_between_patches_only():
    weights = torch.rand(1, 3, 11, 11, dtype=torch.float64).softmax(dim=-1)
    expected = np.zeros(3)
    for head in range(3):
        for i in range(9):
            shares = weights[0, head, 2 + i, 2:].numpy()
            for j in range(9):
                distance = 16 * np.hypot(i // 3 - j // 3, i % 3 - j % 3)
                expected[head] += shares[j] / shares.sum() * distance / 9
    distances = mean_attention_distance(weights, num_prefix_tokens=2, patch_size=16)
    np.testing.assert_allclose(distances[0].numpy(), expected)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rank_of_equal_singular_values_is_their_number(rank):
    torch.manual_seed(0)
    left = torch.linalg.qr(torch.cat([torch.ones(40, 1), torch.randn(40, rank)], dim=1).double())[0][:, 1:]
    right = torch.linalg.qr(torch.randn(8, 8).double())[0][:rank]
    assert feature_rank(5 * left @ right + 100) == rank


def test_rank_counts_until_the_energy_is_reached():
    deviations = torch.tensor([10.0, 1.0, 0.5])  # squares 100, 1, 0.25: shares 0.988, 0.010, 0.002
    features = torch.cat([torch.diag(deviations), -torch.diag(deviations)])
    assert feature_rank(features) == 2
    assert feature_rank(features, energy=0.98) == 1
    assert feature_rank(features, energy=1.0) == 3


def test_rank_of_equal_features_is_0():
    assert feature_rank(torch.ones(5, 3)) == 0


def test_groups_are_means_over_classes_by_falling_count():
    labels = np.array([0, 0, 1, 1, 1, 1, 2, 3, 3])
    predictions = np.array([0, 1, 1, 1, 1, 0, 2, 0, 0])
    accuracy = group_accuracy(predictions, labels, COUNTS, BOUNDARIES)
    assert accuracy.many == 3 / 4
    assert accuracy.medium == (1 / 2 + 0 / 2) / 2
    assert accuracy.few == 1
    assert accuracy.overall == 5 / 9


def test_groups_need_every_class():
    with pytest.raises(DataError, match="class 2 has no test image"):
        group_accuracy(np.array([0, 1, 3]), np.array([0, 1, 3]), COUNTS, BOUNDARIES)


def test_disagreement_is_a_share():
    logits = torch.eye(4)
    assert disagreement(logits, logits) == 0
    assert disagreement(logits, logits[[0, 1, 3, 2]]) == 0.5


def test_analysis_of_a_model_is_that_of_its_parts():
    model, images, labels = transformer().train(), make_images(12, 32), torch.arange(12) % 4
    batches = [(images[:7], labels[:7]), (images[7:], labels[7:])]
    found = analyze_tokens(model, batches, COUNTS, boundaries=BOUNDARIES, blocks=(2, 0))
    assert model.training
    model.eval()
    with torch.no_grad():
        features = model.forward_features(images)
        cls, dist = model.head.separate(features)
        tokens = model.blocks[:2](model.embed(images))
        weights = attention_weights(model.blocks[2].attn, model.blocks[2].norm1(tokens))
    distances = mean_attention_distance(weights, num_prefix_tokens=2, patch_size=8).mean(dim=0)
    for accuracy, logits in ((found.cls, cls), (found.dist, dist), (found.average, model(images))):
        assert accuracy == group_accuracy(logits.argmax(dim=1).numpy(), labels.numpy(), COUNTS, BOUNDARIES)
    assert found.disagreement == disagreement(cls, dist) > 0
    assert found.dist_ranks[1] == feature_rank(tokens[:, 1])
    assert len(found.dist_ranks) == 3
    assert found.attention_distances.keys() == {0, 2}
    torch.testing.assert_close(torch.tensor(found.attention_distances[2]), distances)


def test_model_without_a_distillation_token_is_refused():
    with pytest.raises(ModelError, match="no distillation token"):
        analyze_tokens(transformer(is_distilled=False), [], COUNTS, boundaries=BOUNDARIES)
