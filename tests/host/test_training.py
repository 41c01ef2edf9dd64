"""Training learns, repeats itself bit for bit, goes on after a kill, and stops at a loss that is not finite."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from device.contract.manifest import InputSpec
from host.data.digits import load_digits_split
from host.data.inputs import to_input
from host.data.splits import LabeledImages
from host.errors import RecipeError, TrainingError
from host.models.registry import create_model
from host.training.batches import EpochBatches, epoch_order
from host.training.checkpoint import load_state
from host.training.config import TrainConfig
from host.training.loop import EpochMetrics, Hooks, train
from host.training.objective import CrossEntropy, Objective, Outcome
from host.training.optimizers import decay_groups
from host.training.sam import climb, frozen_statistics, restore
from host.training.schedule import learning_rate
from host.training.turned import TurnedImages

ROOT = Path(__file__).parents[2]
SPEC = InputSpec(height=32, width=32, channels=1, mean=(0.3,), std=(0.35,))
PLAIN = TrainConfig(epochs=30, batch_size=32)
EVERYTHING = TrainConfig(
    epochs=2,
    batch_size=16,
    accumulate=2,
    optimizer="sgd",
    learning_rate=0.05,
    sam_radius=0.05,
    ema_decay=0.9,
    precision="bfloat16",
    crop="pad",
    flip=0.5,
    rand_augment="rand-m9-mstd0.5-inc1",
    erasing=0.25,
    mixup=0.8,
    cutmix=1.0,
    mix_share=0.5,
    repeats=2,
    augment_strength=0.5,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small batches gain little from threads, and lose much to them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> LabeledImages:
    """32 fixed images."""
    return load_digits_split(0).train.take(np.arange(32))


def field_32(family: str = "efficientformer", seed: int = 0) -> nn.Module:
    return create_model(family, "field-32", num_classes=8, in_chans=1, seed=seed)


def fit(
    images: LabeledImages, config: TrainConfig = PLAIN, objective: Objective | None = None, **options
) -> tuple[nn.Module, list[EpochMetrics]]:
    objective = objective or CrossEntropy(field_32(), label_smoothing=config.label_smoothing)
    options.setdefault("seed", 0)
    return objective.model, train(objective, images, SPEC, config, **options)


def logits_of(model: nn.Module, images: LabeledImages) -> Tensor:
    with torch.no_grad():
        return model(torch.from_numpy(to_input(images.images, SPEC)).permute(0, 3, 1, 2))


def is_same(one: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


def turned(model: nn.Module) -> TurnedImages:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return TurnedImages(model, lambda logits, images, labels: F.cross_entropy(logits, labels), share=0.4)


def test_loss_falls_on_32_fixed_images(digits):
    model, metrics = fit(digits)
    assert metrics[-1].loss < 0.7 * metrics[0].loss
    assert (logits_of(model, digits).argmax(dim=1).numpy() == digits.labels).mean() > 0.9
    assert not model.training


@pytest.mark.parametrize(
    "change", [{"optimizer": "sgd", "learning_rate": 0.1}, {"sam_radius": 0.05}, {"ema_decay": 0.5}]
)
def test_every_optimizer_learns(digits, change):
    _, metrics = fit(digits, replace(PLAIN, **change))
    assert metrics[-1].loss < 0.8 * metrics[0].loss


def test_same_seed_gives_the_same_weights_bit_for_bit(digits):
    one, other = (fit(digits, EVERYTHING)[0] for _ in range(2))
    assert is_same(one, other)
    assert not is_same(one, fit(digits, EVERYTHING, seed=1)[0])


@pytest.mark.slow
def test_loading_processes_change_nothing(digits):
    config = replace(PLAIN, epochs=2, batch_size=16, crop="resized", flip=0.5, rand_augment="rand-m9-mstd0.5-inc1")
    assert is_same(fit(digits, config)[0], fit(digits, replace(config, workers=2))[0])


def test_training_leaves_the_callers_random_states_alone(digits):
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    fit(digits, EVERYTHING)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert not torch.are_deterministic_algorithms_enabled()


class Stopped(Exception):
    """As good as a kill: nothing runs after it."""


def stop_at(step: int) -> Hooks:
    def on_step(done: int, total: int, loss: float) -> None:
        if done == step:
            raise Stopped

    return Hooks(on_step=on_step)


@pytest.mark.parametrize("make", [None, turned])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(digits, tmp_path, make):
    config = EVERYTHING if make is None else TrainConfig(epochs=2, batch_size=16)
    objective = lambda: make(field_32()) if make else None  # noqa: E731  # a new one for every start
    whole, metrics = fit(digits, config, objective())
    path = tmp_path / "checkpoint.safetensors"
    for step in sorted(np.random.default_rng().choice(np.arange(1, 4), 2, replace=False)):
        with pytest.raises(Stopped):
            fit(digits, config, objective(), checkpoint=path, checkpoint_interval_s=0, hooks=stop_at(step))
    resumed, again = fit(digits, config, objective(), checkpoint=path)
    assert is_same(whole, resumed)
    assert again == metrics


def test_a_checkpoint_of_another_run_is_not_gone_on_from(digits, tmp_path):
    path, config = tmp_path / "checkpoint.safetensors", replace(PLAIN, epochs=1)
    with pytest.raises(Stopped):
        fit(digits, replace(config, epochs=2), checkpoint=path, checkpoint_interval_s=0, hooks=stop_at(2))
    assert is_same(fit(digits, config, checkpoint=path)[0], fit(digits, config)[0])


def test_a_damaged_checkpoint_is_named(digits, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(b"half")
    with pytest.raises(TrainingError, match=r"checkpoint\.safetensors: not a checkpoint.*remove it to start anew"):
        fit(digits, checkpoint=path)


class NaNAt(CrossEntropy):
    """A loss that is not a number in one forward pass."""

    def __init__(self, model: nn.Module, step: int) -> None:
        super().__init__(model)
        self.step, self.calls = step, 0

    def forward(self, images_nchw: Tensor, labels: Tensor, targets: Tensor | None = None) -> Outcome:
        outcome = super().forward(images_nchw, labels, targets)
        self.calls += 1
        return outcome._replace(loss=outcome.loss * (torch.nan if self.calls == self.step else 1))


def test_a_loss_that_is_not_finite_names_epoch_batch_and_step_and_keeps_the_checkpoint(digits, tmp_path):
    path, config = tmp_path / "checkpoint.safetensors", TrainConfig(epochs=4, batch_size=16)
    with pytest.raises(TrainingError, match=r"loss is nan in epoch 2, batch 1 \(step 3\); the last checkpoint is kept"):
        fit(digits, config, NaNAt(field_32(), 3), checkpoint=path, checkpoint_interval_s=0)
    assert list(tmp_path.iterdir()) == [path]
    resumed = NaNAt(field_32(), 0)
    fit(digits, config, resumed, checkpoint=path)
    assert resumed.calls == 8 - 2  # it went on after step 2
    assert is_same(resumed.model, fit(digits, config, NaNAt(field_32(), 0))[0])


def test_weights_that_are_not_finite_are_not_kept(digits, tmp_path):
    path = tmp_path / "checkpoint.safetensors"

    def spoil(done: int, total: int, loss: float) -> None:
        if done == 2:
            model.head.weight.data[0, 0] = torch.nan

    model = field_32()
    config = TrainConfig(epochs=2, batch_size=16)
    with pytest.raises(TrainingError, match=r"weights model\.head\.weight are not finite after step 2"):
        train(
            CrossEntropy(model),
            digits,
            SPEC,
            config,
            seed=0,
            checkpoint=path,
            checkpoint_interval_s=0,
            hooks=Hooks(on_step=spoil),
        )
    assert path.exists()


def test_every_epoch_is_told_with_what_was_validated(digits):
    seen: list[EpochMetrics] = []
    hooks = Hooks(on_epoch=seen.append, validate=lambda model, epoch: {"is_training": float(model.training)})
    _, metrics = fit(digits, TrainConfig(epochs=2, batch_size=16), hooks=hooks)
    assert seen == metrics
    assert [entry.epoch for entry in seen] == [1, 2]
    assert seen[-1].learning_rate < seen[0].learning_rate
    assert all(entry.validation == {"is_training": 0.0} for entry in seen)


def test_the_average_is_what_training_leaves(digits):
    model, _ = fit(digits, replace(PLAIN, epochs=2, ema_decay=0.999))
    start, raw = field_32(), fit(digits, replace(PLAIN, epochs=2))[0]
    near, far = ((model.head.weight - other.head.weight).norm() for other in (start, raw))
    assert 0 < near < 0.01 * far  # two steps with 0.999 move hardly away from the start


def test_images_are_mixed_only_in_their_share_of_the_epochs(digits):
    seen: list[bool] = []

    class Watching(CrossEntropy):
        def forward(self, images_nchw: Tensor, labels: Tensor, targets: Tensor | None = None) -> Outcome:
            seen.append(targets is not None)
            return super().forward(images_nchw, labels, targets)

    config = TrainConfig(epochs=4, batch_size=32, mixup=0.8, mix_share=0.5)
    fit(digits, config, Watching(field_32()))
    assert seen == [True, True, False, False]


@given(
    count=st.integers(8, 60),
    batch=st.sampled_from([4, 8]),
    world_size=st.sampled_from([1, 2]),
    accumulate=st.sampled_from([1, 2]),
    first=st.integers(0, 3),
)
def test_processes_share_the_batches_of_one(count, batch, world_size, accumulate, first):
    images = LabeledImages(images=np.zeros((count, 1, 1, 1), np.uint8), labels=np.zeros(count, np.int64))

    def places(rank: int, size: int, parts: int) -> list[set]:
        config = TrainConfig(batch_size=batch, accumulate=parts)
        batches = EpochBatches(images, config, seed=3, rank=rank, world_size=size)
        batches.epoch, batches.first_step = 2, min(first, batches.steps)
        lists = list(batches)
        assert len(lists) == len(batches)
        return [set().union(*lists[at : at + parts]) for at in range(0, len(lists), parts)]

    whole = places(0, 1, 1)
    shared = [
        set.union(*parts) for parts in zip(*(places(r, world_size, accumulate) for r in range(world_size)), strict=True)
    ]
    assert shared == whole
    assert len(set().union(*whole)) == len(whole) * batch  # no image twice


def test_repeated_augmentation_fills_batches_with_fewer_images(digits):
    batches = EpochBatches(digits, TrainConfig(batch_size=8, repeats=4), seed=0)
    for batch in batches:
        assert len({place.index for place in batch}) == 2
        assert {place.repeat for place in batch} == {0, 1, 2, 3}


def test_images_in_shards_are_read_shards_together():
    blocks = np.arange(200) // 5  # 40 shards
    images = LabeledImages(images=np.zeros((200, 1, 1, 1), np.uint8), labels=np.zeros(200, np.int64), blocks=blocks)
    order = epoch_order(images, 1, 0)
    assert sorted(order) == list(range(200))
    open_shards = [len(set(blocks[order[at : at + 40]])) for at in range(0, 200, 40)]
    assert max(open_shards) == 8
    assert (np.diff(order) == 1).mean() < 0.2  # shuffled all the same


@given(step=st.integers(0, 99), warmup=st.sampled_from([0.0, 0.1]), schedule=st.sampled_from(["cosine", "steps"]))
def test_learning_rate_stays_in_its_range(step, warmup, schedule):
    config = TrainConfig(learning_rate=0.1, final_learning_rate=1e-5, warmup_share=warmup, schedule=schedule)
    rate = learning_rate(config, step, 100)
    assert 1e-6 <= rate <= 0.1
    assert learning_rate(config, 10, 100) == pytest.approx(0.1, rel=0.03)
    if step >= 10:
        assert learning_rate(config, step + 1, 100) <= rate
    if schedule == "steps":
        assert learning_rate(config, 80, 100) == pytest.approx(1e-3)
        assert learning_rate(config, 95, 100) == pytest.approx(1e-5)


def test_only_matrices_and_kernels_decay():
    model = field_32("deit")
    groups = decay_groups(model, 0.05)
    by_group = [
        {name for name, p in model.named_parameters() if any(p is q for q in group["params"])} for group in groups
    ]
    assert {"pos_embed", "cls_token", "head.bias"} <= by_group[1]
    assert "head.weight" in by_group[0]
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert sum(len(group) for group in by_group) == len(list(model.parameters()))


def test_sam_takes_the_gradient_at_the_worst_place_nearby():
    weight = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    (0.5 * weight.square().sum()).backward()  # the gradient is the weight
    before = climb([weight], 0.5)
    torch.testing.assert_close(weight.detach(), torch.tensor([3.3, 4.4], dtype=torch.float64))
    restore([weight], before)
    assert weight.tolist() == [3.0, 4.0]


def test_sams_second_pass_leaves_the_statistics():
    norm = nn.BatchNorm1d(2)
    x = torch.randn(8, 2) + 3
    with frozen_statistics(norm):
        y = norm(x)
    assert norm.running_mean.tolist() == [0, 0]
    assert norm.num_batches_tracked == 0
    assert norm.momentum == 0.1
    torch.testing.assert_close(y.mean(dim=0), torch.zeros(2), atol=1e-6, rtol=0)


def test_too_few_images_and_shares_that_do_not_divide_are_refused(digits):
    with pytest.raises(TrainingError, match="32 images are fewer than a batch of 64"):
        fit(digits, TrainConfig())
    with pytest.raises(TrainingError, match="cannot be shared by 3 processes"):
        EpochBatches(digits, TrainConfig(batch_size=16), seed=0, world_size=3)
    with pytest.raises(TrainingError, match="in pairs, but a process has 1 at a time"):
        EpochBatches(digits, TrainConfig(batch_size=2, mixup=0.8), seed=0, world_size=2)


def test_float16_needs_a_gpu(digits):
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(TrainingError, match='"float16" needs a GPU; take "bfloat16"'):
        fit(digits, TrainConfig(precision="float16", batch_size=16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": -1}, r"train\.epochs must be 0 or more, got -1"),
        ({"turned_share": 1.0}, r"train\.turned_share"),
        ({"optimizer": "adam"}, r"train\.optimizer must be one of adamw, sgd, got 'adam'"),
        ({"erasing": 2.0}, r"train\.erasing must be within 0\.\.1"),
        ({"flip": 0.5}, r"need train\.crop"),
        ({"mixup": 0.8, "turned_share": 0.1}, r"cannot go with turned_share"),
        ({"batch_size": 64, "accumulate": 3}, r"must be a multiple of accumulate x repeats, 3 x 1"),
        ({"sam_radius": 0.1, "precision": "float16"}, r"cannot go with precision"),
    ],
)
def test_bad_training_values_are_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        TrainConfig(**change)


def test_an_unknown_rand_augment_policy_is_refused(digits):
    with pytest.raises(RecipeError, match="'auto-m9' is not one of timm's policies"):
        fit(digits, replace(EVERYTHING, rand_augment="auto-m9"))


PROCESS = ROOT / "tests" / "support" / "training_process.py"


def run_processes(count: int, out: Path, **environment: str) -> subprocess.CompletedProcess:
    """Train in `count` processes as `torchrun` starts them; the first writes losses and weights to `out`."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", f"{count}"]
    launcher = torchrun if count > 1 else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, *launcher, str(PROCESS), str(out)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=ROOT)


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_batch(tmp_path):
    for count in (1, 2):
        done = run_processes(count, tmp_path / f"{count}.pt")
        assert done.returncode == 0, done.stderr
    (one, weights), (two, same_weights) = (torch.load(tmp_path / f"{count}.pt") for count in (1, 2))
    assert len(one) == 20
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1e-4
    assert max((weights[name] - same_weights[name]).abs().max() for name in weights) <= 1e-3


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_then_goes_on(tmp_path):
    whole = run_processes(2, tmp_path / "whole.pt")
    assert whole.returncode == 0, whole.stderr
    killed = run_processes(2, tmp_path / "parts.pt", KILL_STEP="7")
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr
    assert load_state(tmp_path / "parts.safetensors", recipe="") is None  # it is whole, and of another recipe
    assert not (tmp_path / "parts.pt").exists()
    again = run_processes(2, tmp_path / "parts.pt")
    assert again.returncode == 0, again.stderr
    losses, weights = torch.load(tmp_path / "parts.pt")
    assert len(losses) < 20  # it did not begin anew
    reference = torch.load(tmp_path / "whole.pt")[1]
    assert all(torch.equal(tensor, reference[name]) for name, tensor in weights.items())


@pytest.mark.slow
def test_kill_nine_at_random_steps_changes_nothing(tmp_path):
    assert run_processes(1, tmp_path / "whole.pt").returncode == 0
    for step in sorted(np.random.default_rng().choice(np.arange(1, 20), 3, replace=False)):
        killed = run_processes(1, tmp_path / "parts.pt", KILL_STEP=f"{step}")
        assert killed.returncode == -signal.SIGKILL
    assert run_processes(1, tmp_path / "parts.pt").returncode == 0
    (_, weights), (_, reference) = (torch.load(tmp_path / f"{name}.pt") for name in ("parts", "whole"))
    assert all(torch.equal(tensor, reference[name]) for name, tensor in weights.items())
