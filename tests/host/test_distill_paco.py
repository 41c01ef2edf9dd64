"""PaCo: its loss against loops in float64, the queue and the second encoder, and that it teaches a classifier."""

import math

import pytest
import torch
from torch.nn import functional as F

from bench.probes import make_images
from host.distill.paco import NO_LABEL, PaCo, flip_and_shift, paco_loss
from host.distill.teacher import FrozenTeacher
from host.errors import DataError, ModelError
from host.models.cnn import CNN
from host.models.resnet_cifar import ResNet
from host.training.sam import frozen_statistics

K = 4
COUNTS = [100, 30, 10, 3]
images = make_images(8, 32)
labels = torch.arange(8) % K


def objective(**options: object) -> PaCo:
    torch.manual_seed(0)
    return PaCo(CNN(num_classes=K, in_chans=3, width=4), COUNTS, **{"contrast_dim": 6, "queue_size": 20, **options})


def slow_loss(class_logits, queries, vectors, vector_labels, *, temperature, alpha) -> float:
    """The authors' formula with loops: own class 1, own class's images alpha, everything but itself below."""
    total = 0.0
    for i, query in enumerate(queries.tolist()):
        label = int(vector_labels[i])
        products = [sum(a * b for a, b in zip(query, v, strict=True)) / temperature for v in vectors.tolist()]
        others = [j for j in range(len(products)) if j != i and vector_labels[j] != NO_LABEL]
        below = sum(math.exp(x) for x in class_logits[i].tolist()) + sum(math.exp(products[j]) for j in others)
        terms = [(1.0, class_logits[i, label].item())]
        terms += [(alpha, products[j]) for j in others if vector_labels[j] == label]
        total -= sum(w * (x - math.log(below)) for w, x in terms) / sum(w for w, _ in terms)
    return total / len(queries)


@pytest.mark.parametrize("alpha", [0.01, 0.5])
def test_loss_is_the_formula(alpha):
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(12, 6, generator=generator, dtype=torch.float64))
    logits = torch.randn(4, K, generator=generator, dtype=torch.float64)
    given = torch.tensor([0, 1, 1, 3, 0, 1, 1, 3, 2, NO_LABEL, 1, NO_LABEL])
    arguments = {"temperature": 0.2, "alpha": alpha}
    loss = paco_loss(logits, vectors[:4], vectors, given, **arguments)
    assert loss.item() == pytest.approx(slow_loss(logits, vectors[:4], vectors, given, **arguments), rel=1e-9)


def test_empty_places_of_the_queue_count_for_nothing():
    vectors, logits = F.normalize(torch.randn(8, 6)), torch.randn(4, K)
    given = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    longer = torch.cat([vectors, torch.zeros(5, 6)])
    unfilled = torch.cat([given, torch.full((5,), NO_LABEL)])
    arguments = {"temperature": 0.05, "alpha": 0.05}
    expected = paco_loss(logits, vectors[:4], vectors, given, **arguments)
    torch.testing.assert_close(paco_loss(logits, vectors[:4], longer, unfilled, **arguments), expected)


def test_a_step_compares_with_both_views_and_the_queue_and_shifts_classes_by_their_frequency():
    paco = objective(second_view=lambda images_nchw: images_nchw.flip(3))
    paco(images, labels)
    with torch.no_grad():
        features = paco.model.forward_features(images)
        logits = paco.model.head(features) + (torch.tensor(COUNTS) / sum(COUNTS)).log()
        queries = F.normalize(paco.projection(features))
        keys = F.normalize(paco.key_projection(paco.key_model.forward_features(images.flip(3))))
    vectors, given = torch.cat([queries, keys, paco.queue[:8]]), labels.repeat(3)
    expected = slow_loss(logits, queries, vectors, given, temperature=0.05, alpha=0.01)
    assert paco(images, labels).loss.item() == pytest.approx(expected, rel=1e-4)


def test_queue_is_a_ring_of_the_last_keys():
    paco = objective()
    for batch_labels in (labels, labels.flip(0), labels):  # 24 keys for 20 places
        paco(images, batch_labels)
    assert paco.queue_next.item() == 4
    assert torch.equal(paco.queue_labels, torch.cat([labels[4:], labels[4:8], labels.flip(0), labels[:4]]))
    torch.testing.assert_close(paco.queue.norm(dim=1), torch.ones(20))


def test_second_encoder_follows_slowly_and_takes_no_gradient():
    paco = objective(momentum=0.75)
    key, query = paco.key_model.head.weight, paco.model.head.weight
    before = key.clone()
    with torch.no_grad():
        query.add_(1)
    paco(images, labels).loss.backward()
    torch.testing.assert_close(key, before + 0.25)
    assert all(p.grad is None for part in (paco.key_model, paco.key_projection) for p in part.parameters())
    assert all(p.grad is not None for part in (paco.model, paco.projection) for p in part.parameters())


def test_second_pass_of_a_sharpness_aware_step_leaves_the_state_alone():
    paco = objective()
    paco(images, labels)
    before = {name: tensor.clone() for name, tensor in paco.state_dict().items()}
    with frozen_statistics(paco):
        paco(images, labels)
    assert all(torch.equal(tensor, before[name]) for name, tensor in paco.state_dict().items())
    paco(images, labels)
    assert paco.queue_next.item() == 16


def test_a_restarted_run_has_the_same_queue():
    first, second = objective(), objective()
    first(images, labels)
    second.load_state_dict(first.state_dict())
    losses = []
    for paco in (first, second):
        torch.manual_seed(1)
        losses.append(paco(images, labels).loss)
    assert torch.equal(*losses)


def test_batch_beyond_the_queue_keeps_its_last_keys():
    paco = objective(queue_size=5)
    paco(images, labels)
    assert torch.equal(paco.queue_labels, labels[-5:])


def test_views_are_the_image_mirrored_and_moved_by_whole_pixels():
    torch.manual_seed(0)
    picture = torch.arange(1.0, 16 * 16 + 1).reshape(1, 1, 16, 16)
    padded = F.pad(torch.cat([picture, picture.flip(3)]), (2, 2, 2, 2))  # an eighth of 16 pixels
    possible = {
        (mirrored, row, column): padded[mirrored, 0, row : row + 16, column : column + 16]
        for mirrored in range(2)
        for row in range(5)
        for column in range(5)
    }
    seen = set()
    for view in flip_and_shift(picture.expand(200, -1, -1, -1)):
        found = [key for key, expected in possible.items() if torch.allclose(view[0], expected, atol=1e-2)]
        assert len(found) == 1
        seen.update(found)
    assert len(seen) > 40


def test_it_teaches_a_classifier_that_can_be_a_teacher():
    batch, rare_last = make_images(32, 32, seed=2), torch.tensor([0] * 20 + [1] * 8 + [2] * 3 + [3])
    torch.manual_seed(0)
    paco = PaCo(CNN(num_classes=K, in_chans=3, width=4), [20, 8, 3, 1], queue_size=64, temperature=0.5).train()
    optimizer = torch.optim.Adam([p for p in paco.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = paco(batch, rare_last).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    predictions = FrozenTeacher(paco.model, num_classes=K)(batch).argmax(dim=1)
    assert (predictions == rare_last).float().mean() >= 0.95


def test_contrasts_are_not_rounded_by_autocast():
    vectors, given = F.normalize(torch.randn(8, 6)), torch.arange(8) % K
    logits = torch.randn(4, K)
    exact = paco_loss(logits, vectors[:4], vectors, given, temperature=0.05, alpha=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(paco_loss(logits, vectors[:4], vectors, given, temperature=0.05, alpha=0.5), exact)


def test_cosines_are_refused():
    with pytest.raises(ModelError, match=r"PaCo needs a linear classifier, .* ResNet has a NormalizedLinear"):
        PaCo(ResNet(num_classes=K, in_chans=3, depth=8, is_normalized=True), COUNTS)


def test_classes_without_images_are_refused():
    with pytest.raises(DataError, match="class 1 has 0 training images"):
        PaCo(CNN(num_classes=2, in_chans=3, width=4), [5, 0])
