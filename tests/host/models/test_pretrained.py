"""Published weights from a file that timm saved, from one of ours, and without either."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from host.errors import ModelError
from host.models.checkpoint import save_model
from host.models.pretrained import load_pretrained
from host.models.registry import create_model, find_model, list_models
from tests.support.models import make_images, randomize

ROOT = Path(__file__).parents[3]
PUBLISHED = [entry for entry in list_models() if entry.timm_name]
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


@pytest.mark.parametrize(
    "entry", [pytest.param(e, id=e.name, marks=() if e.name in SMALLEST else pytest.mark.slow) for e in PUBLISHED]
)
def test_what_timm_saved_is_loaded_and_gives_timm_s_outputs(entry, tmp_path):
    import timm

    reference = randomize(timm.create_model(entry.timm_name))
    save_file(reference.state_dict(), tmp_path / "weights.safetensors")
    images = make_images(1, entry.image_size)
    with torch.no_grad():
        ours = load(tmp_path / "weights.safetensors", entry.name)
        torch.testing.assert_close(ours(images), reference(images), rtol=1e-4, atol=1e-4)


def test_other_classes_keep_their_own_head_and_grey_images_sum_the_first_convolution(timm_file):
    fresh = create_model("efficientformerv2", "s0", num_classes=10, in_chans=1)
    model = load(timm_file, num_classes=10, in_chans=1)
    assert torch.equal(model.head.classes.weight, fresh.head.classes.weight)
    published = load_file(timm_file)["stem.conv1.conv.weight"]
    torch.testing.assert_close(model.backbone.stem.conv1.conv.weight, published.sum(dim=1, keepdim=True))


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
    assert "model.safetensors of timm/efficientformerv2_s0" in last
    assert "weights = FILE" in last
