"""GCAB: what later tasks learn must not reach an earlier task through the gated block, not by one bit."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import host.models  # noqa: F401  repairs torchvision before timm
from bench.probes import make_images, photos, randomize, relative_error
from converters import coreml, gates, tflite
from converters.mil import MilProgram
from device.engine import Engine
from host.errors import ModelError
from host.models.gated_attention import S_MAX, GatedClassAttentionBlock, annealed_scale
from host.models.gcab import ENTRIES, GatedViT

BY_VARIANT = {entry.variant: entry for entry in ENTRIES}
FIELD_32 = BY_VARIANT["field-32"]
TWO_TASKS = (4, 6)


def tiny(tasks: tuple[int, ...] = (3,), *, seed: int = 0, **changes: int) -> GatedViT:
    """Two blocks of 24 channels on 4 x 4 tokens."""
    torch.manual_seed(seed)
    layout = {"image_size": 16, "patch_size": 4, "in_chans": 3, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return GatedViT(tasks=tasks, drop_path=0.1, **{**layout, **changes})


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def train(model: GatedViT, *, steps: int = 4, weight_decay: float = 0.5, is_held: bool = True) -> None:
    """A few steps of the newest task alone, with the encoder frozen."""
    block = model.class_block
    model.encoder.requires_grad_(False)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=weight_decay)
    labels = torch.arange(8) % model.tasks[-1]
    for step in range(steps):
        block.gate_scale = annealed_scale(step + 1, steps)
        optimizer.zero_grad()
        logits = model(make_images(8, 16, seed=step))[:, -model.tasks[-1] :]
        F.cross_entropy(logits, labels).backward()
        block.mask_gradients()
        block.compensate_gradients()
        if is_held:
            with block.reserved_held():
                optimizer.step()
        else:
            optimizer.step()
    model.eval()


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_a_task_adds_what_the_specification_says():
    with torch.device("meta"):
        model = BY_VARIANT["cifar"].create(num_classes=10)
        before = count(model)
        model.add_task(10)
    assert model.class_block.cls_tokens[1].numel() == 384
    assert model.class_block.e0[1].numel() + model.class_block.e2[1].numel() == 1_920
    assert (count(model.head.tasks[1]), count(model.norms[1])) == (3_850, 768)
    assert count(model) - before == 384 + 1_920 + 3_850 + 768


# --- protocol ---------------------------------------------------------------------------------------------------------


def test_logits_are_the_head_on_the_features_of_all_tasks():
    model = randomize(FIELD_32.create(tasks=TWO_TASKS))
    images = make_images(2, 32)
    features, tokens = model.forward_features(images), model.forward_tokens(images)
    assert (model.tasks, model.feature_dim, model.head.out_features) == (TWO_TASKS, 2 * 96, 10)
    assert (features.shape, tokens.shape) == ((2, 2 * 96), (2, 64, 96))
    torch.testing.assert_close(model(images), model.head(features))
    torch.testing.assert_close(features, model.join_tasks([tokens, tokens]))


def test_each_task_reads_its_own_tokens():
    model = randomize(tiny((3, 2)))
    tokens, compensated = model.forward_tokens(make_images(2, 16)), torch.randn(2, 16, 24)
    shared, mixed = model.join_tasks([tokens, tokens]), model.join_tasks([compensated, tokens])
    assert torch.equal(shared[:, 24:], mixed[:, 24:])
    assert not torch.allclose(shared[:, :24], mixed[:, :24])


def test_state_of_several_tasks_loads_into_the_same_structure():
    grown = tiny((3,))
    grown.add_task(2)
    loaded = tiny((3, 2), seed=1)
    loaded.load_state_dict(grown.state_dict())
    images = make_images(2, 16)
    assert torch.equal(loaded.eval()(images), grown.eval()(images))
    trainable = [[name for name, p in model.named_parameters() if p.requires_grad] for model in (grown, loaded)]
    assert trainable[0] == trainable[1]


def test_a_new_task_freezes_the_old_ones_and_the_norms():
    model = tiny((3, 2))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    norms = {f"encoder.blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2)} | {"class_block.norm1", "class_block.norm2"}
    norms |= {"norms.0"}
    expected = {f"{norm}.{part}" for norm in norms for part in ("weight", "bias")}
    expected |= {f"class_block.{part}.0" for part in ("cls_tokens", "e0", "e2")}
    assert frozen == expected | {"head.tasks.0.weight", "head.tasks.0.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": (4, 5)}, r"tasks \(4, 5\) have 9 classes together, but num_classes is 10"),
        ({"num_classes": 0}, "a task needs 1 class or more, got 0"),
        ({"tasks": (10, 0)}, "a task needs 1 class or more, got 0"),
    ],
)
def test_impossible_tasks_are_refused(options: dict, message: str):
    with pytest.raises(ModelError, match=message):
        FIELD_32.create(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 18}, "positive multiple of 4, the patch_size, and 8 or more, got 18; take 16 or 20"),
        ({"image_size": 4}, "positive multiple of 4, the patch_size, and 8 or more, got 4; take 8"),
        ({"num_heads": 5}, "embed_dim must be a multiple of num_heads, got 24 with 5 heads"),
        ({"depth": 0}, "depth must be 1 or more, got 0"),
        ({"tasks": ()}, "tasks must name at least one task's number of classes, got none"),
    ],
)
def test_impossible_layouts_are_refused(changes: dict, message: str):
    with pytest.raises(ModelError, match=message):
        tiny(**changes)


# --- architecture -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_encoder_matches_timm():
    from timm.models.convit import ConVit

    theirs = ConVit(
        img_size=32,
        patch_size=4,
        embed_dim=24,  # times heads
        depth=3,
        num_heads=4,
        local_up_to_layer=3,
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )
    randomize(theirs).norm = nn.Identity()
    ours = FIELD_32.create().eval()
    state = {name.replace("patch_embed.proj", "patch_embed"): tensor for name, tensor in theirs.state_dict().items()}
    state.pop("cls_token")
    ours.encoder.load_state_dict(state)
    images = make_images(2, 32)
    single = theirs.forward_features(images)
    exact = theirs.double().forward_features(images.double())
    assert relative_error(ours.forward_tokens(images), exact) <= 2 * relative_error(single, exact)
    assert relative_error(ours.deploy().forward_tokens(images), exact) <= 2 * relative_error(single, exact)
    ours.double()
    assert relative_error(ours.forward_tokens(images.double()), exact) <= 1e-10
    assert relative_error(ours.deploy().forward_tokens(images.double()), exact) <= 1e-10


def test_heads_begin_as_a_3_by_3_convolution():
    model = tiny(image_size=32, embed_dim=36, num_heads=9)
    maps = model.deploy().encoder.blocks[0].attn.position_map  # [heads, N, N]
    center = 8 * 4 + 4
    neighbours = [center + 8 * row + column for row in (-1, 0, 1) for column in (-1, 0, 1)]
    assert sorted(maps[:, center].argmax(dim=1).tolist()) == neighbours


def test_open_gates_are_plain_class_attention():
    from timm.models.cait import LayerScaleBlockClassAttn

    block = GatedClassAttentionBlock(embed_dim=24, num_heads=3, hidden_dim=96)
    block.add_task()
    randomize(block)
    for embedding in (block.e0[0], block.e2[0]):
        nn.init.constant_(embedding, 6.0)
    theirs = LayerScaleBlockClassAttn(24, 3, init_values=1.0, norm_layer=nn.LayerNorm).eval()
    for name in ("norm1", "norm2"):
        getattr(theirs, name).load_state_dict(getattr(block, name).state_dict())
    for part, names in ((theirs.attn, ("q", "k", "v", "proj")), (theirs.mlp, ("fc1", "fc2"))):
        part.load_state_dict(
            {f"{name}.{key}": tensor for name in names for key, tensor in getattr(block, name).state_dict().items()}
        )
    tokens = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens, block.cls_tokens[0].expand(2, 1, -1))[:, 0]
    torch.testing.assert_close(block(tokens, 0), expected)


def test_gates_are_binary_but_for_the_newest_task():
    block = randomize(tiny((3, 2))).class_block
    old, new = block.gates(0), block.gates(1)
    assert torch.equal(old[0], (block.e0[0] > 0).float())
    assert torch.equal(old[1], (block.e2[0] > 0).float())
    block.gate_scale = 1 / S_MAX
    assert torch.equal(block.gates(1)[0], new[0])  # evaluation is always at 800
    assert torch.equal(new[0], (S_MAX * block.e0[1]).sigmoid())
    assert (block.train().gates(1)[0] - 0.5).abs().max() < 1e-3


def test_scale_is_annealed_over_an_epoch():
    assert annealed_scale(0, 10) == 1 / 800
    assert annealed_scale(10, 10) == 800
    assert annealed_scale(5, 10) == pytest.approx((800 + 1 / 800) / 2)


# --- what later tasks may and may not do ------------------------------------------------------------------------------


def test_a_later_task_changes_no_bit_of_an_earlier_ones_logits():
    """Claim 1 of the specification: weight decay of 0.5 and Adam's momentum included."""
    model, images = tiny((3,)), make_images(4, 16, seed=9)
    train(model)
    model.add_task(2)
    before, weight = model.eval()(images), model.class_block.v.weight.clone()
    train(model, steps=8)
    after = model(images)
    assert torch.equal(after[:, :3], before[:, :3])
    assert not torch.allclose(after[:, 3:], before[:, 3:])
    assert 0.1 < (model.class_block.v.weight != weight).float().mean() < 0.9


def test_without_holding_weight_decay_reaches_an_earlier_task():
    model, images = tiny((3,)), make_images(4, 16, seed=9)
    train(model)
    model.add_task(2)
    before = model.eval()(images)
    train(model, is_held=False)
    assert not torch.allclose(model(images)[:, :3], before[:, :3])


def test_an_old_task_reads_its_reserved_entries_and_no_others():
    model, images = randomize(tiny((3, 2))), make_images(2, 16)
    old = model(images)[:, :3]
    for name, mask in model.class_block.reserved().items():
        parameter = model.class_block.get_parameter(name)
        kept, noise = parameter.detach().clone(), torch.randn(parameter.shape)
        parameter.data += (1 - mask) * noise
        assert torch.equal(model(images)[:, :3], old), name
        parameter.data = kept + mask * noise
        assert not torch.allclose(model(images)[:, :3], old), name
        parameter.data = kept


def test_gradients_vanish_exactly_where_entries_are_reserved():
    model = randomize(tiny((3, 2)))
    model(make_images(2, 16)).square().sum().backward()
    model.class_block.mask_gradients()
    for name, mask in model.class_block.reserved().items():
        gradient = model.class_block.get_parameter(name).grad
        assert not gradient[mask.bool()].any(), name
        assert gradient[~mask.bool()].any(), name


@pytest.mark.parametrize("scale", [1 / S_MAX, 1.0, 20.0])
def test_compensated_gradients_do_not_depend_on_the_scale(scale: float):
    """The derivative of sigmoid(s e) becomes that of 800 sigmoid(e), as long as |s e| < 50."""
    block = tiny().class_block.double().train()
    block.gate_scale = scale
    block.e0[0].data.uniform_(-1.0, 1.0)
    slope = torch.randn(24, dtype=torch.float64)
    (block.gates(0)[0] * slope).sum().backward()
    block.compensate_gradients()
    gate = block.e0[0].detach().sigmoid()
    torch.testing.assert_close(block.e0[0].grad, slope * S_MAX * gate * (1 - gate))


def test_gates_stay_within_reach():
    block = tiny().class_block
    with block.reserved_held():
        block.e0[0].data.fill_(9.0)
        block.e2[0].data.fill_(-9.0)
    assert (block.e0[0].max(), block.e2[0].min()) == (6.0, -6.0)


def test_reserved_share_never_falls():
    """Claim 3, the part that needs no long training."""
    block = tiny((2, 2, 2, 2)).class_block
    shares = [block.reserved_fraction(tasks) for tasks in range(5)]
    assert shares == sorted(shares)
    assert 0 == shares[0] < shares[1] < shares[4] < 1
    assert block.reserved_fraction() == shares[3]  # the newest reserves nothing against itself


# --- inference form and files -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_deploy_of_several_tasks_keeps_their_gates():
    model = randomize(FIELD_32.create(tasks=TWO_TASKS)).double()
    images = make_images(2, 32).double()
    deployed = model.deploy()
    assert relative_error(deployed(images), model(images)) < 1e-12  # double: soft gates must be the same, not nearly
    assert isinstance(deployed.head, nn.Linear)
    assert deployed.feature_dim == deployed.head.in_features == 2 * 96
    assert not deployed.training
    assert not any(parameter.requires_grad for parameter in deployed.parameters())
    with pytest.raises(ModelError, match="call deploy\\(\\) again"):
        deployed.add_task(2)


@torch.no_grad()
def test_closed_gates_can_be_deployed():
    model = randomize(tiny())
    nn.init.constant_(model.class_block.e2[0], -6.0)
    images = make_images(2, 16)
    assert relative_error(model.deploy()(images), model(images)) < 1e-5


def logits_of(model: nn.Module, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


def min_cosine(outputs: np.ndarray, reference: np.ndarray) -> float:
    norms = np.linalg.norm(outputs, axis=1) * np.linalg.norm(reference, axis=1)
    return float(((outputs * reference).sum(axis=1) / norms).min())


def tflite_logits(model: nn.Module, images: np.ndarray, directory: Path) -> np.ndarray:
    """Also asserts that plain LiteRT runs the file, and XNNPACK all of it in one piece."""
    head: Callable[[Tensor], Tensor] = model.head
    path = tflite.convert_float(model, (1, *images.shape[1:]), head.out_features, directory / "model.tflite")
    gates.assert_builtin_ops(path)
    assert gates.partitions(path) == (1, {})
    engine = Engine(path)
    features = np.concatenate([engine.run("features", images=image[None])["features"] for image in images])
    return head(torch.from_numpy(features)).numpy()


def coreml_logits(model: nn.Module, images: np.ndarray, directory: Path) -> np.ndarray:
    labels = [str(label) for label in range(model.head.out_features)]
    shape = (1, *images.shape[1:])
    path = coreml.convert(model, shape, directory / "model.mlpackage", input_spec_metadata={}, labels=labels)
    program = MilProgram(path, round_to_half=True)
    return np.concatenate([program.run({"images": image[None]})["logits"] for image in images])


@pytest.mark.slow  # the tests of all families convert models of one task
@pytest.mark.parametrize("to_logits", [tflite_logits, coreml_logits])
def test_files_of_several_tasks_give_the_same_logits(to_logits: Callable, tmp_path: Path):
    model, images = randomize(FIELD_32.create(tasks=TWO_TASKS)), photos(32)
    assert min_cosine(to_logits(model.deploy(), images, tmp_path), logits_of(model, images)) >= 0.9999
