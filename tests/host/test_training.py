"""Training learns, repeats itself bit for bit, and stops at a loss that is not finite."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from device.contract.manifest import InputSpec
from device.preprocess import preprocess
from host.data.digits import load_digits_split
from host.distill.soft import SoftDistillation
from host.errors import RecipeError, TrainingError
from host.models.registry import create_model
from host.training.config import TrainConfig
from host.training.loop import EpochMetrics, train

SPEC = InputSpec(height=32, width=32, channels=1, mean=(0.3,), std=(0.35,))
CONFIG = TrainConfig(epochs=30, batch_size=32, augment_strength=0.0)
SHORT = TrainConfig(epochs=2, batch_size=16)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small batches gain little from threads, and lose much to them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """32 fixed images, float32 [32, 32, 32, 1], and labels."""
    part = load_digits_split(0).train
    return preprocess(part.images[:32], SPEC), part.labels[:32]


def field_32() -> torch.nn.Module:
    return create_model("efficientformer", "field-32", num_classes=8, in_chans=1)


def fit(digits, config: TrainConfig = CONFIG, **kwargs) -> tuple[torch.nn.Module, list[EpochMetrics]]:
    model = field_32()
    return model, train(model, *digits, config, seed=0, **kwargs)


def test_loss_falls_on_32_fixed_images(digits):
    model, metrics = fit(digits)
    assert metrics[-1].loss < 0.7 * metrics[0].loss
    logits = model(torch.from_numpy(digits[0]).permute(0, 3, 1, 2))
    assert (logits.argmax(dim=1).numpy() == digits[1]).mean() > 0.9
    assert not model.training


def test_same_seed_gives_the_same_weights_bit_for_bit(digits):
    states = [fit(digits, SHORT)[0].state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    other = field_32()
    train(other, *digits, SHORT, seed=1)
    assert not torch.equal(other.head.weight, states[0]["head.weight"])


def test_training_leaves_the_callers_random_state_alone(digits):
    before = torch.random.get_rng_state()
    fit(digits, SHORT)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()


def test_every_epoch_is_reported(digits):
    seen: list[EpochMetrics] = []
    _, metrics = fit(digits, SHORT, on_epoch=seen.append)
    assert seen == metrics
    assert [entry.epoch for entry in seen] == [1, 2]
    assert seen[-1].learning_rate < seen[0].learning_rate


def test_student_comes_to_agree_with_its_teacher(digits):
    teacher, student = (create_model("cnn", "small", num_classes=8, in_chans=1, seed=seed) for seed in (0, 1))
    wrong_labels = (digits[1] + 1) % 8  # only the teacher can have taught them
    train(teacher, digits[0], wrong_labels, CONFIG, seed=0)
    train(student, *digits, CONFIG, seed=1, teacher=teacher, distill=SoftDistillation(temperature=2.0, weight=0.99))
    with torch.no_grad():
        answers = student(torch.from_numpy(digits[0]).permute(0, 3, 1, 2)).argmax(dim=1).numpy()
    assert (answers == wrong_labels).mean() > 0.9


def test_soft_loss_is_zero_where_student_and_teacher_agree():
    logits, labels = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    method = SoftDistillation(temperature=3.0, weight=0.25)
    expected = 0.75 * F.cross_entropy(logits, labels)
    torch.testing.assert_close(method.loss(logits, logits + 5.0, labels), expected)  # a shift changes no probability


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_loss_is_the_divergence_times_the_squared_temperature(temperature):
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    p, q = ([math.exp(a / temperature), math.exp(b / temperature)] for a, b in ([0.0, 2.0], [1.0, 0.0]))
    p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    expected = temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    loss = SoftDistillation(temperature=temperature, weight=1.0).loss(student, teacher, torch.tensor([0]))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_loss_that_is_not_finite_names_epoch_and_batch(digits):
    images = digits[0].copy()
    images[7] = np.nan
    with pytest.raises(TrainingError, match=r"loss is nan in epoch 1, batch [12]; lower"):
        train(field_32(), images, digits[1], SHORT, seed=0)


def test_too_few_images_and_half_a_distillation_are_refused(digits):
    with pytest.raises(TrainingError, match="32 images are fewer than a batch of 64"):
        fit(digits, TrainConfig())
    with pytest.raises(TrainingError, match="go together"):
        fit(digits, teacher=field_32())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"epochs": 0}, r"train\.epochs must be above 0, got 0"), ({"turned_share": 1.0}, r"train\.turned_share")],
)
def test_bad_training_values_are_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        TrainConfig(**change)
