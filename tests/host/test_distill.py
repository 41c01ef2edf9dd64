"""Distillation: every loss against a slow float64 one, the frozen teacher, and what students learn from whom."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bench.probes import make_images
from host.distill.class_balance import DeferredReweighting, effective_number_weights
from host.distill.deit_lt import DeiTLT
from host.distill.feature import FeatureDistillation
from host.distill.hard import HardDistillation
from host.distill.ldam import LDAM, ldam_margins
from host.distill.soft import SoftDistillation
from host.distill.teacher import FrozenTeacher
from host.errors import DataError, ModelError
from host.models.cnn import CNN
from host.models.deit import VisionTransformer, field_32
from host.models.heads import DistillationHeads
from host.models.resnet_cifar import ResNet
from host.models.vit_widths import uniform_widths
from host.training.objective import Objective

K = 5
COUNTS = [500, 160, 50, 16, 5]
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])
count_lists = st.lists(st.integers(1, 20_000), min_size=2, max_size=20)


def transformer(**options: object) -> VisionTransformer:
    torch.manual_seed(0)
    settings = {"num_classes": K, "in_chans": 3, "image_size": 32, "patch_size": 8, "embed_dim": 16}
    return VisionTransformer(**settings, widths=uniform_widths(2, 2, 8, 32), is_distilled=True, **options)


def cnn(seed: int = 0) -> CNN:
    torch.manual_seed(seed)
    return CNN(num_classes=K, in_chans=3, width=4)


def two_heads_on_one_vector() -> CNN:
    model = cnn()
    model.head = DistillationHeads(model.feature_dim, K)
    return model


STUDENTS = {"one head": cnn, "two tokens": transformer, "two heads on one vector": two_heads_on_one_vector}
every_student = pytest.mark.parametrize("make", STUDENTS.values(), ids=STUDENTS)
images = make_images(6, 32)
teacher_logits = 3 * torch.randn(6, K, generator=torch.Generator().manual_seed(1))


def answer(images_nchw: Tensor) -> Tensor:
    """A teacher that gives the same logits to any six images."""
    return teacher_logits


def heads(model: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Logits in float64 for labels and teacher, computed here from the weights."""
    with torch.no_grad():
        features = model.forward_features(images)
        if isinstance(model, VisionTransformer):
            pairs = zip((model.head.classes, model.head.teacher), features.chunk(2, dim=1), strict=True)
        elif isinstance(model.head, DistillationHeads):
            pairs = [(model.head.classes, features), (model.head.teacher, features)]
        else:
            pairs = [(model.head, features)] * 2
        of_labels, of_teacher = ((x @ linear.weight.T + linear.bias).double().numpy() for linear, x in pairs)
    return of_labels, of_teacher


def cross_entropy(logits: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Of logits [B, K] with targets [B, K]; a mean by the weights [B] of the images."""
    losses = [
        -sum(t * (v - _log_sum(row)) for t, v in zip(p, row, strict=True))
        for p, row in zip(targets, logits, strict=True)
    ]
    return float(np.average(losses, weights=weights))


def _log_sum(row: np.ndarray) -> float:
    return max(row) + math.log(sum(math.exp(v - max(row)) for v in row))


def one_hot(labels: Tensor, smoothing: float = 0.0) -> np.ndarray:
    return np.eye(K)[labels.numpy()] * (1 - smoothing) + smoothing / K


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.array([[math.exp(v - _log_sum(row)) for v in row] for row in logits])


@every_student
def test_soft_distillation_is_the_formula(make):
    model = make().eval()
    objective = SoftDistillation(model, answer, temperature=2.0, weight=0.3, label_smoothing=0.1)
    of_labels, of_teacher = heads(model)
    p, q = softmax(teacher_logits.double().numpy() / 2), softmax(of_teacher / 2)
    divergence = sum(pi * (math.log(pi) - math.log(qi)) for pi, qi in zip(p.flat, q.flat, strict=True)) / 6
    expected = 0.7 * cross_entropy(of_labels, one_hot(LABELS, 0.1)) + 0.3 * 4 * divergence
    assert objective(images, LABELS).loss.item() == pytest.approx(expected, rel=1e-5)


@every_student
def test_hard_distillation_is_the_formula(make):
    model = make().eval()
    of_labels, of_teacher = heads(model)
    taught = one_hot(teacher_logits.argmax(dim=1))
    expected = 0.8 * cross_entropy(of_labels, one_hot(LABELS, 0.1)) + 0.2 * cross_entropy(of_teacher, taught)
    objective = HardDistillation(model, answer, weight=0.2, label_smoothing=0.1)
    assert objective(images, LABELS).loss.item() == pytest.approx(expected, rel=1e-5)


@every_student
def test_shown_logits_are_those_of_inference(make):
    model = make().eval()
    outcome = HardDistillation(model, answer)(images, LABELS)
    torch.testing.assert_close(outcome.logits, model(images))
    assert torch.equal(outcome.labels, LABELS)


def test_targets_of_mixed_images_replace_the_labels_of_one_head_only():
    model = transformer().eval()
    targets = torch.from_numpy(0.7 * one_hot(LABELS) + 0.3 * one_hot(LABELS.flip(0))).float()
    of_labels, of_teacher = heads(model)
    taught = cross_entropy(of_teacher, one_hot(teacher_logits.argmax(dim=1)))
    expected = (cross_entropy(of_labels, targets.double().numpy()) + taught) / 2
    objective = HardDistillation(model, answer, label_smoothing=0.1)
    assert objective(images, LABELS, targets).loss.item() == pytest.approx(expected, rel=1e-5)


def test_imitating_oneself_costs_nothing():
    model = cnn().eval()
    objective = SoftDistillation(model, FrozenTeacher(model, num_classes=K), temperature=3.0, weight=1.0)
    assert objective(images, LABELS).loss.item() == pytest.approx(0, abs=1e-6)


def test_feature_distillation_is_the_formula():
    model, other = transformer().eval(), cnn(1)
    objective = FeatureDistillation(model, FrozenTeacher(other, num_classes=K), weight=0.5, label_smoothing=0.1)
    of_labels, of_teacher = heads(model)
    with torch.no_grad():
        weight, bias = objective.projection.weight.double(), objective.projection.bias.double()
        projected = model.forward_features(images).double() @ weight.T + bias
        difference = projected - other.eval().forward_features(images)
    label_loss = cross_entropy((of_labels + of_teacher) / 2, one_hot(LABELS, 0.1))
    expected = label_loss + 0.5 * float((difference**2).sum()) / difference.numel()
    assert objective(images, LABELS).loss.item() == pytest.approx(expected, rel=1e-5)


def test_projection_of_features_is_trained_and_not_part_of_the_model():
    objective = FeatureDistillation(transformer(), FrozenTeacher(cnn(1), num_classes=K))
    losses = fit(objective, images, LABELS, steps=30)
    assert losses[-1] < losses[0] / 2
    assert objective.projection.weight.shape == (16, 32)
    assert not any("projection" in name for name in objective.model.state_dict())


def test_deit_lt_is_hard_distillation_until_reweighting_begins():
    model = transformer().eval()
    hard = HardDistillation(model, answer, label_smoothing=0.1)(images, LABELS).loss
    never = DeiTLT(model, answer, COUNTS, reweight_from_epoch=None)
    later = DeiTLT(model, answer, COUNTS, reweight_from_epoch=9)
    never.start_epoch(100, 100)
    later.start_epoch(8, 10)
    assert never(images, LABELS).loss.equal(hard)
    assert later(images, LABELS).loss.equal(hard)


def test_deit_lt_weighs_the_dist_token_by_the_teacher_s_label():
    model = transformer().eval()
    objective = DeiTLT(model, answer, COUNTS, reweight_from_epoch=9)
    objective.start_epoch(9, 10)
    of_labels, of_teacher = heads(model)
    taught = teacher_logits.argmax(dim=1)
    assert not torch.equal(taught, LABELS)
    weights = effective_number_weights(COUNTS)[taught.numpy()]
    expected = (cross_entropy(of_labels, one_hot(LABELS)) + cross_entropy(of_teacher, one_hot(taught), weights)) / 2
    assert objective(images, LABELS).loss.item() == pytest.approx(expected, rel=1e-5)


def test_deit_lt_smooths_mixed_targets_in_both_phases_as_they_come():
    model = transformer().eval()
    targets = torch.from_numpy(one_hot(LABELS, 0.2)).float()
    objective = DeiTLT(model, answer, [10] * K, reweight_from_epoch=2)  # equal counts weigh equally
    objective.start_epoch(1, 2)
    before = objective(images, LABELS, targets).loss
    objective.start_epoch(2, 2)
    torch.testing.assert_close(objective(images, LABELS, targets).loss, before)


@given(count_lists, st.floats(0, 0.9999))
def test_class_weights_have_mean_1_and_favour_the_rare(counts, beta):
    weights = effective_number_weights(counts, beta)
    assert weights.mean() == pytest.approx(1)
    by_count = weights[np.argsort(counts)]
    assert (np.diff(by_count) <= 1e-9 * by_count[:-1]).all()


def test_class_weights_are_the_effective_numbers():
    effective = [sum(0.9999**i for i in range(count)) for count in COUNTS]  # a geometric series
    expected = np.array([1 / e for e in effective])
    np.testing.assert_allclose(effective_number_weights(COUNTS), expected / expected.sum() * K)


def test_reweighting_goes_on_and_off_with_the_epoch():
    loss = DeferredReweighting(COUNTS, from_epoch=3)
    states = []
    for epoch in (1, 2, 3, 4, 2):  # the last as after a restart
        loss.start_epoch(epoch)
        states.append(loss.is_on)
    assert states == [False, False, True, True, False]


@given(count_lists)
def test_margins_are_largest_for_the_rarest(counts):
    margins = ldam_margins(counts, 0.5)
    assert margins.max() == pytest.approx(0.5)
    assert (margins > 0).all()
    assert (np.diff(margins[np.argsort(counts)]) <= 1e-12).all()


@pytest.mark.parametrize("epoch", [1, 161])
def test_ldam_is_the_formula(epoch):
    model = normalized()
    objective = LDAM(model, COUNTS, reweight_from_epoch=161).eval()
    objective.start_epoch(epoch, 200)
    with torch.no_grad():
        logits = model(images).double().numpy()
    for row, label in zip(logits, LABELS, strict=True):
        row[label] -= 0.5 * (5 / COUNTS[label]) ** 0.25
    weights = effective_number_weights(COUNTS)[LABELS.numpy()] if epoch == 161 else None
    expected = cross_entropy(30 * logits, one_hot(LABELS), weights)
    assert objective(images, LABELS).loss.item() == pytest.approx(expected, rel=1e-5)


def test_ldam_learns_fixed_images():
    objective = LDAM(normalized(), COUNTS, reweight_from_epoch=5)
    losses = fit(objective, images, LABELS, steps=30)
    assert losses[-1] < losses[0] / 4
    assert not objective.takes_mixed


def normalized() -> ResNet:
    torch.manual_seed(0)
    return ResNet(num_classes=K, in_chans=3, depth=8, is_normalized=True)


def test_teacher_is_frozen_and_outside_of_what_is_trained():
    original = cnn(1).train()
    teacher = FrozenTeacher(original, num_classes=K)
    objective = HardDistillation(cnn(), teacher)
    before = teacher(images)
    fit(objective, images, LABELS, steps=2)
    with torch.no_grad():
        next(original.parameters()).add_(1)
    assert torch.equal(teacher(images), before)
    assert original.training
    assert not before.requires_grad
    assert objective.state_dict().keys() == {f"model.{name}" for name in objective.model.state_dict()}


def test_gradients_reach_the_student_only():
    teacher = FrozenTeacher(cnn(1), num_classes=K)
    for objective in (
        SoftDistillation(transformer(), teacher, temperature=2.0),
        HardDistillation(transformer(), teacher),
        DeiTLT(transformer(), teacher, COUNTS, reweight_from_epoch=1),
        FeatureDistillation(transformer(), teacher),
    ):
        objective(images, LABELS).loss.backward()
        assert all(parameter.grad is not None for parameter in objective.parameters())
    assert all(parameter.grad is None for parameter in teacher.model.parameters())


def test_losses_are_float32_under_autocast():
    teacher = FrozenTeacher(cnn(1), num_classes=K)
    for objective in (
        SoftDistillation(transformer(), teacher, temperature=2.0),
        DeiTLT(transformer(), teacher, COUNTS, reweight_from_epoch=1),
        FeatureDistillation(transformer(), teacher),
        LDAM(normalized(), COUNTS),
    ):
        exact = objective(images, LABELS).loss
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(images, LABELS).loss
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact, rtol=0.05, atol=0)


@pytest.mark.parametrize("size", [24, 32, 64])
def test_teacher_takes_images_of_any_size(size):
    teacher = FrozenTeacher(cnn(), num_classes=K)
    flat = torch.tensor([0.5, -1, 2])[None, :, None, None].expand(2, 3, size, size)  # resizing leaves these alone
    with torch.no_grad():
        torch.testing.assert_close(teacher(flat), teacher.model(flat[:, :, :1, :1].expand(2, 3, 32, 32)))
    assert teacher.features(flat).shape == (2, teacher.feature_dim)


def test_teacher_s_smaller_image_is_the_mean_of_what_it_covers():
    teacher = FrozenTeacher(cnn(), num_classes=K)
    fine = (torch.arange(64) % 2).float().expand(1, 3, 64, 64)  # stripes that sampling without a filter would keep
    assert (teacher._fit(fine)[..., 1:-1] - 0.5).abs().max() < 1e-6


def test_teacher_with_two_heads_answers_with_their_mean():
    model = transformer()
    torch.testing.assert_close(FrozenTeacher(model, num_classes=K)(images), model.eval()(images))


def test_teacher_of_other_classes_is_refused():
    with pytest.raises(ModelError, match="the teacher, a CNN, tells 5 classes apart and the student 7"):
        FrozenTeacher(cnn(), num_classes=7)


def test_teacher_that_would_be_trained_is_refused():
    with pytest.raises(ModelError, match=r"a CNN as teacher .* wrap it in FrozenTeacher"):
        HardDistillation(transformer(), cnn())


def test_students_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match="DeiT-LT trains two heads, and this CNN has one"):
        DeiTLT(cnn(), answer, COUNTS, reweight_from_epoch=None)
    with pytest.raises(ModelError, match="normalized classifier, and this CNN has a Linear"):
        LDAM(cnn(), COUNTS)


def test_counts_of_other_classes_are_refused():
    with pytest.raises(DataError, match="4 class counts for a model of 5 classes"):
        DeiTLT(transformer(), answer, COUNTS[:4], reweight_from_epoch=9)
    with pytest.raises(DataError, match="6 class counts for a model of 5 classes"):
        LDAM(normalized(), [*COUNTS, 1])


def test_classes_without_images_are_refused():
    with pytest.raises(DataError, match="class 1 has 0 training images"):
        effective_number_weights([5, 0, 3])
    with pytest.raises(DataError, match="class 2 has -1 training images"):
        ldam_margins([5, 4, -1])


learned = make_images(32, 32, seed=2)
learned_labels = torch.arange(32) % K
wrong_labels = (learned_labels + 1) % K


@pytest.fixture(scope="module")
def wrongly_taught() -> FrozenTeacher:
    """A network that learned other labels by heart."""
    model = cnn(1)
    nobody = HardDistillation(model, lambda images_nchw: torch.zeros(len(images_nchw), K), weight=0.0)
    fit(nobody, learned, wrong_labels, steps=40)
    teacher = FrozenTeacher(model, num_classes=K)
    assert agreement(teacher(learned), wrong_labels) == 1
    return teacher


@pytest.mark.parametrize("make", [transformer, two_heads_on_one_vector])
def test_one_head_learns_the_labels_and_the_other_the_teacher(make, wrongly_taught):
    objective = DeiTLT(make(), wrongly_taught, COUNTS, reweight_from_epoch=1, label_smoothing=0.0)
    losses = fit(objective, learned, learned_labels, steps=120)
    with torch.no_grad():
        classes, taught = objective.model.head.separate(objective.model.forward_features(learned))
    assert losses[-1] < losses[0] / 2
    assert agreement(classes, learned_labels) >= 0.9
    assert agreement(taught, wrong_labels) >= 0.9


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_student_with_one_head_learns_from_whom_the_weight_says(weight, wrongly_taught):
    objective = SoftDistillation(cnn(), wrongly_taught, temperature=2.0, weight=weight)
    fit(objective, learned, learned_labels, steps=40)
    with torch.no_grad():
        assert agreement(objective.model(learned), wrong_labels if weight else learned_labels) >= 0.9


def agreement(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(dim=1) == labels).float().mean().item()


def fit(objective: Objective, batch: Tensor, labels: Tensor, *, steps: int) -> list[float]:
    """Adam on one batch; in evaluation mode afterwards."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=5e-3)
    objective.train()
    losses = []
    for epoch in range(1, steps + 1):
        objective.start_epoch(epoch, steps)
        loss = objective(batch, labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    objective.eval()
    return losses


def test_the_field_transformer_distils():
    objective = DeiTLT(field_32(num_classes=K, in_chans=3, is_distilled=True), answer, COUNTS, reweight_from_epoch=2)
    assert fit(objective, images, LABELS, steps=3)[-1] > 0
    assert isinstance(objective.model.deploy().head, nn.Linear)
