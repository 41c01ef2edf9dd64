"""Published weights from a file that timm saved, from one of ours, and without either."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.probes import make_images, randomize, relative_error
from host.errors import ModelError
from host.models.checkpoint import save_model
from host.models.options import with_options
from host.models.pretrained import UNKNOWN_LICENCE, load_pretrained, weights_licence
from host.models.registry import create_model, find_model

ROOT = Path(__file__).parents[3]
SMALLEST = ("efficientformer/l1", "efficientformerv2/s0", "nextvit/s", "mobilevit/xxs", "mobilevitv2/050", "deit/tiny")


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory) -> Path:
    """Weights that timm initialised, moved off their initial values and saved."""
    import timm

    path = tmp_path_factory.mktemp("timm") / "efficientformerv2_s0.safetensors"
    save_file(randomize(timm.create_model("efficientformerv2_s0")).state_dict(), path)
    return path


def load(path: Path | None, name: str = "efficientformerv2/s0", *, num_classes: int = 1000, in_chans: int = 3):
    entry = find_model(*name.split("/"))
    model = create_model(entry.family, entry.variant, num_classes=num_classes, in_chans=in_chans)
    load_pretrained(model, entry, path)
    return model.eval()


def load_with(options: dict, name: str, state: dict, folder: Path):
    """The model with these options after it took the state from a file, and what was reported."""
    entry = with_options(find_model(*name.split("/")), options)
    model = entry.create()
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "published.safetensors")
    return model.eval(), load_pretrained(model, entry, folder / "published.safetensors")


@pytest.mark.parametrize("name", SMALLEST)
def test_what_timm_saved_is_loaded_under_our_names(name, tmp_path):
    """What a model then computes, `test_timm` compares."""
    import timm

    entry = find_model(*name.split("/"))
    state = randomize(timm.create_model(entry.timm_name)).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    loaded, expected = load(tmp_path / "weights.safetensors", name).state_dict(), entry.from_timm(state)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in loaded)


@pytest.mark.parametrize(
    ("name", "size", "change"),
    [
        ("deit/tiny", 96, "position embedding resampled from 14 x 14 to 6 x 6"),
        ("deit/tiny-distilled", 96, "position embedding resampled from 14 x 14 to 6 x 6"),
        ("efficientformer/l1", 96, "attention bias resampled from 7 x 7 to 3 x 3"),
        (
            "efficientformerv2/s0",
            96,
            "attention bias resampled from 14 x 14 to 6 x 6, attention bias resampled from 7 x 7 to 3 x 3",
        ),
    ],
)
def test_what_belongs_to_a_grid_is_resampled_for_another_image_size(name, size, change, tmp_path):
    import timm

    entry = find_model(*name.split("/"))
    state = entry.from_timm(randomize(timm.create_model(entry.timm_name)).state_dict())
    model, loaded = load_with({"image_size": size}, name, state, tmp_path)
    assert loaded.changes == tuple(change.split(", "))
    assert loaded.num_loaded == loaded.num_tensors
    for key, tensor in model.state_dict().items():
        if key.endswith(("pos_embed", "attention_biases")):
            expected = by_timm(state[key], tensor, getattr(model, "num_prefix_tokens", 0))
            assert not torch.equal(tensor, state[key]), key
            assert torch.equal(tensor, expected), key
        elif not key.endswith("attention_bias_idxs"):
            assert torch.equal(tensor, state[key]), key


def by_timm(published: Tensor, own: Tensor, num_prefix_tokens: int) -> Tensor:
    from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table_levit

    if published.ndim == 2:
        return resize_rel_pos_bias_table_levit(published.T, own.T.shape).T
    side = round((own.shape[1] - num_prefix_tokens) ** 0.5)
    return resample_abs_pos_embed(published, [side, side], num_prefix_tokens=num_prefix_tokens)


def test_a_position_embedding_for_larger_images_is_a_smooth_enlargement(tmp_path):
    """A ramp over the rows stays one, and the class token, which has no place, stays what it is."""
    state = find_model("deit", "field-32").create().state_dict()
    state["pos_embed"][0] = torch.tensor([9.0, *torch.arange(8.0).repeat_interleave(8)])[:, None]
    model, _ = load_with({"image_size": 64}, "deit/field-32", state, tmp_path)
    (prefix, *positions) = model.pos_embed[0, :, 0].tolist()
    assert prefix == 9
    column = torch.tensor(positions).reshape(16, 16)[4:12, 3]  # away from the border
    torch.testing.assert_close(column, (torch.arange(4.0, 12) - 0.5) / 2, atol=1e-5, rtol=0)


def test_weights_that_mix_the_positions_of_another_size_name_the_option(tmp_path):
    state = find_model("ninformer", "field-32").create().state_dict()
    message = r"token_ff.* is \[.*64.*\] and must be \[.*144.*\]\); they are for images of another size: set the option image_size"
    with pytest.raises(ModelError, match=message):
        load_with({"image_size": 48}, "ninformer/field-32", state, tmp_path)


def test_another_width_or_patch_is_no_other_image_size(tmp_path):
    state = find_model("deit", "field-32").create().state_dict()
    for options in ({"patch_size": 16}, {"embed_dim": 64}):
        with pytest.raises(ModelError, match=r"does not fit: .*; give weights of deit/field-32"):
            load_with(options, "deit/field-32", state, tmp_path)


@pytest.mark.parametrize("name", ["efficientformer/l1", "efficientformerv2/s0"])
@torch.no_grad()
def test_one_head_takes_the_mean_of_the_published_two(name, tmp_path):
    import timm

    entry = find_model(*name.split("/"))
    reference = randomize(timm.create_model(entry.timm_name))
    images = make_images(1, 224)
    expected = reference(images)
    for state in (reference.state_dict(), entry.from_timm(reference.state_dict())):  # timm's file, and one of ours
        model, loaded = load_with({"distilled": False}, name, state, tmp_path)
        assert loaded.changes == ("two heads joined in their mean",)
        assert relative_error(model(images), expected) <= 1e-5


def test_one_new_head_starts_anew(timm_file):
    entry = with_options(find_model("efficientformerv2", "s0"), {"distilled": False})
    model = entry.create(num_classes=10)
    before = model.head.weight.clone()
    assert load_pretrained(model, entry, timm_file).changes == ("head new (1000 -> 10 classes)",)
    assert torch.equal(model.head.weight, before)


def test_other_classes_keep_their_own_head_and_grey_images_sum_the_first_convolution(timm_file):
    fresh = create_model("efficientformerv2", "s0", num_classes=10, in_chans=1)
    model = load(timm_file, num_classes=10, in_chans=1)
    assert torch.equal(model.head.classes.weight, fresh.head.classes.weight)
    published = load_file(timm_file)["stem.conv1.conv.weight"]
    torch.testing.assert_close(model.backbone.stem.conv1.conv.weight, published.sum(dim=1, keepdim=True))


def test_the_report_says_what_was_loaded_and_what_was_changed(timm_file):
    model = create_model("efficientformerv2", "s0", num_classes=10, in_chans=1)
    loaded = load_pretrained(model, find_model("efficientformerv2", "s0"), timm_file)
    count = len(model.state_dict())
    assert str(loaded) == (
        f"weights of efficientformerv2_s0.safetensors: {count - 4} of {count} tensors, head new (1000 -> 10 classes), "
        "first convolution summed over colours"
    )
    assert loaded.sha256 == hashlib.sha256(timm_file.read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32_and_is_reported(tmp_path, dtype):
    model = randomize(create_model("deit", "field-32", num_classes=10, in_chans=3))
    halves = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    save_file(halves, tmp_path / "half.safetensors")
    loaded = load_pretrained(model, find_model("deit", "field-32"), tmp_path / "half.safetensors")
    assert str(loaded).endswith(f"tensors, {str(dtype).removeprefix('torch.')} cast to float32")
    assert all(torch.equal(tensor, halves[name].float()) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, value):
    state = create_model("deit", "field-32", num_classes=10, in_chans=3).state_dict()
    state["blocks.2.mlp.fc1.bias"][5] = value
    save_file(state, tmp_path / "diverged.safetensors")
    with pytest.raises(ModelError, match=r"diverged.safetensors: blocks\.2\.mlp\.fc1\.bias holds NaN or infinity"):
        load(tmp_path / "diverged.safetensors", "deit/field-32", num_classes=10)


@pytest.mark.parametrize(
    ("name", "path", "stated", "licence"),
    [
        ("efficientformerv2/s0", "", "", "apache-2.0"),
        ("mobilevit/xxs", "", "", "cvnets-license"),
        ("mobilevit/xxs", "", "MIT", "MIT"),
        ("efficientformerv2/s0", "mine.safetensors", "", UNKNOWN_LICENCE),
        ("deit/field-32", "mine.safetensors", "CC-BY-4.0", "CC-BY-4.0"),
    ],
)
def test_the_licence_is_the_stated_one_or_the_hub_s_or_unknown(name, path, stated, licence):
    assert weights_licence(find_model(*name.split("/")), path=path, stated=stated) == licence


def test_the_cause_of_a_failed_fetch_is_told_without_secrets(monkeypatch):
    import timm

    def fail(name, *, pretrained=False):
        raise OSError("first line\nProxy http://user:secret@proxy:3128 refused https://hub/model?signature=secret")

    monkeypatch.setattr(timm, "create_model", fail)
    model = create_model("deit", "field-32", num_classes=10, in_chans=3)
    with pytest.raises(ModelError, match=r"\(OSError: Proxy http://proxy:3128 refused https://hub/model\)") as caught:
        load_pretrained(model, find_model("deit", "tiny"))
    assert "secret" not in str(caught.value)


def test_a_file_of_ours_is_loaded(tmp_path):
    model = randomize(create_model("deit", "field-32", num_classes=10, in_chans=3))
    save_model(model, tmp_path / "mine.safetensors")
    loaded = load(tmp_path / "mine.safetensors", "deit/field-32", num_classes=10)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "efficientformerv2/s1",
            r"does not fit: of \d+ tensors .* missing, .* of another shape \(.* is \[.*\] and must be .*; give weights of efficientformerv2_s1",
        ),
        ("deit/tiny", r"does not fit"),
        ("ninformer/cifar10", r"has other names than this model, and timm has no such model"),
    ],
)
def test_weights_of_another_model_are_refused(timm_file, name, message):
    with pytest.raises(ModelError, match=message):
        load(timm_file, name)


def test_a_damaged_or_missing_file_is_named(tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no tensors here")
    for path in (damaged, tmp_path / "missing.safetensors"):
        with pytest.raises(ModelError, match=f"{path.name}: not a readable safetensors file"):
            load(path)


@pytest.mark.parametrize("without", ["head_dist.", "head."])
def test_a_head_is_taken_whole_or_not_at_all(timm_file, tmp_path, without):
    state = {name: tensor for name, tensor in load_file(timm_file).items() if not name.startswith(without)}
    save_file(state, tmp_path / "partial.safetensors")
    with pytest.raises(
        ModelError, match=r"does not fit: of \d+ tensors 2 missing; give weights of efficientformerv2_s0"
    ):
        load(tmp_path / "partial.safetensors")


def test_the_hub_s_weights_are_loaded_and_the_random_state_is_left_alone(monkeypatch):
    import timm

    published = randomize(timm.create_model("efficientformerv2_s0"))
    entry = find_model("efficientformerv2", "s0")
    model = create_model("efficientformerv2", "s0", num_classes=1000, in_chans=3)
    monkeypatch.setattr(timm, "create_model", lambda name, *, pretrained=False: published)  # there is no network here
    before = torch.random.get_rng_state()
    load_pretrained(model, entry)
    assert torch.equal(torch.random.get_rng_state(), before)
    images = make_images(1, 224)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), published(images), rtol=1e-4, atol=1e-4)


def test_a_pickled_checkpoint_is_not_opened(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=r"weights.pth: a PyTorch checkpoint, which may hold code; .*save_file"):
        load(tmp_path / "weights.pth")


def test_nothing_changes_when_weights_do_not_fit(timm_file):
    model = create_model("deit", "tiny", num_classes=10, in_chans=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError):
        load_pretrained(model, find_model("deit", "tiny"), timm_file)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_models_without_published_weights_say_so():
    with pytest.raises(ModelError, match=r"ninformer/cifar10 has no published weights; .* weights = FILE"):
        load(None, "ninformer/cifar10", num_classes=10)


def test_without_a_network_there_is_one_clear_error(tmp_path):
    script = (
        "from host.models.registry import create_model, find_model\n"
        "from host.models.pretrained import load_pretrained\n"
        "model = create_model('efficientformerv2', 's0', num_classes=10, in_chans=3)\n"
        "load_pretrained(model, find_model('efficientformerv2', 's0'))\n"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "efficientformerv2/s0: the published weights of efficientformerv2_s0 cannot be fetched from the hub" in last
    assert "offline" in last.lower()  # the cause, in the words of the hub's client
    assert "model.safetensors of timm/efficientformerv2_s0" in last
    assert "weights = FILE" in last
