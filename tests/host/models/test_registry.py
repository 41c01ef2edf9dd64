"""Laws over the registry: sizes, gradients, determinism and inference form of every model."""

import hashlib
import re
from collections.abc import Iterable

import pytest
import torch

from bench.probes import make_images, randomize, relative_error, settle_norms
from bench.specified import PARAMETERS_AND_MACS, WITHOUT_TEACHER_HEAD, macs_error_allowed
from host.errors import ModelError
from host.models.entry import ModelEntry
from host.models.measure import count_macs, count_parameters, draw_stages
from host.models.options import build_model, option_names
from host.models.registry import create_model, find_model, list_models
from tests.support.models import ranks_and_operations

ENTRIES = list_models()
TEACHERS = {"cnn", "resnet-cifar"}
"""Families that are there to teach others."""
SMALL = [entry for entry in ENTRIES if not entry.is_exact or entry.family in TEACHERS]
every_model = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
ONE_PER_FAMILY = list({entry.family: entry for entry in SMALL}.values())
BY_SIZE = sorted(ENTRIES, key=lambda entry: -entry.parameters)
SMALLEST_EXACT = list({entry.family: entry for entry in BY_SIZE if entry.is_exact}.values())
every_small_model = pytest.mark.parametrize("entry", SMALL, ids=lambda entry: entry.name)


def in_tiers(default: Iterable[ModelEntry]) -> list[object]:
    """All entries as parameters, slow but for those."""
    chosen = list(default)
    return [pytest.param(e, id=e.name, marks=() if e in chosen else pytest.mark.slow) for e in ENTRIES]


small_and_slow = pytest.mark.parametrize("entry", in_tiers(SMALL))


def on_meta(entry: ModelEntry, **options: object) -> torch.nn.Module:
    with torch.device("meta"):
        return entry.create(**options).eval()


def test_published_variants_are_the_specified_ones():
    assert {entry.name for entry in ENTRIES if entry.is_exact} == PARAMETERS_AND_MACS.keys()


def test_small_variants_say_that_they_are_ours():
    assert all(("field-" in entry.variant) != entry.is_exact for entry in ENTRIES if entry.family not in TEACHERS)
    assert {e.family for e in SMALL} == {e.family for e in ENTRIES}
    assert all(32 <= entry.image_size <= 96 for entry in SMALL)
    assert all(entry.parameters < 1.5e6 and entry.macs < 70e6 for entry in SMALL)


@every_model
def test_sizes_are_exact(entry: ModelEntry):
    model = on_meta(entry)
    parameters, macs = count_parameters(model), count_macs(model, entry.image_size, entry.in_chans)
    assert (parameters, macs) == (entry.parameters, entry.macs)
    specified_parameters, specified_macs = PARAMETERS_AND_MACS.get(entry.name, (None, None))
    if specified_parameters is not None:
        assert parameters == specified_parameters
    if specified_macs is not None:
        assert abs(macs / 1e6 - specified_macs) <= macs_error_allowed(entry.name, specified_macs)


@pytest.mark.parametrize(("variant", "patch_size", "num_tokens"), [("cifar", 4, 64), ("imagenet", 16, 196)])
def test_parts_of_gcab_are_the_sums_of_their_specified_layers(variant, patch_size, num_tokens):
    """Five blocks of a ConViT of width 384 with 12 heads, and the gated one; q, k and v have no biases."""
    model = on_meta(find_model("gcab", variant))
    mlp = 384 * 1536 + 1536 + 1536 * 384 + 384
    block = 4 * 384**2 + 384 + mlp + 2 * 2 * 384
    scores = 3 * 12 + 12 + 12  # of three offsets, and a gate, per head
    patches = 3 * patch_size**2 * 384 + 384 + num_tokens * 384
    assert count_parameters(model.encoder) == patches + 5 * (block + scores)
    assert count_parameters(model.class_block) == block + 384 + 384 + 1536  # class token, e0, e2


@every_model
def test_summaries_say_whose_pixels_are_not_normalized(entry: ModelEntry):
    assert ("0..1" in entry.summary) == (set(entry.mean) == {0} and set(entry.std) == {1})


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.timm_name], ids=lambda e: e.name)
def test_published_weights_get_the_pixels_that_they_were_trained_on(entry: ModelEntry):
    import timm

    config = timm.get_pretrained_cfg(entry.timm_name)
    assert (entry.mean, entry.std) == (tuple(map(float, config.mean)), tuple(map(float, config.std)))


def test_counting_leaves_the_model_alone():
    model = create_model("nextvit", "field-32", num_classes=10, in_chans=3).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_macs(model, 32, 3)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("name", "parameters"), WITHOUT_TEACHER_HEAD.items())
def test_sizes_without_the_teacher_s_head_are_exact(name, parameters):
    assert count_parameters(on_meta(find_model(*name.split("/")), distilled=False)) == parameters


@small_and_slow
def test_every_model_runs_and_back_propagates(entry: ModelEntry):
    in_chans = 4 - entry.in_chans  # 1 for colour images, 3 for grey ones: the tests below have the published number
    model = create_model(entry.family, entry.variant, num_classes=5, in_chans=in_chans)
    images = make_images(2, entry.image_size, in_chans)
    features = model.forward_features(images)
    assert features.shape == (2, model.feature_dim)
    logits = model(images)
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())  # zero where stochastic depth left a branch out


@small_and_slow
def test_every_parameter_changes_the_output(entry: ModelEntry):
    """In evaluation, as pruning and fine-tuning with frozen norms differentiate, and where no norm takes a shift away."""
    images = make_images(2, entry.image_size, entry.in_chans).double()
    model = settle_norms(randomize(entry.create()).double(), images)
    shifts = [name for name, _ in model.named_parameters() if SHIFTS_OF_A_SOFTMAX.search(name)]
    assert without_gradient(model, images) == shifts


SHIFTS_OF_A_SOFTMAX = re.compile(r"\.(talking_head1|k\.conv|k\.bn|e_mhsa\.k|to_mobile\.key|pos_proj)\.bias$")
"""Biases that add the same to every score of a query, which a softmax takes away."""


def without_gradient(model: torch.nn.Module, images: torch.Tensor) -> list[str]:
    """Parameters whose gradients are zero to the rounding of float64, none or not finite."""
    model(images).square().sum().backward()
    largest = {
        name: torch.tensor(0.0) if p.grad is None else p.grad.abs().max() for name, p in model.named_parameters()
    }
    limit = 1e-13 * max(largest.values())
    return [name for name, value in largest.items() if not limit < value < torch.inf]


@pytest.mark.parametrize("entry", in_tiers(e for e in ENTRIES if e.parameters < 3e6))
def test_weights_depend_on_the_seed_alone(entry: ModelEntry):
    before = torch.random.get_rng_state()
    first, second, other = (fingerprint(entry, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert first == second != other


def fingerprint(entry: ModelEntry, seed: int) -> str:
    """SHA-256 of the names and numbers of a model's initial state."""
    digest = hashlib.sha256()
    for name, tensor in build_model(entry, num_classes=5, in_chans=1, seed=seed).state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


@every_small_model
def test_images_of_another_shape_are_refused(entry: ModelEntry):
    model, size = entry.create().eval(), entry.image_size
    shapes = [(1, 4 - entry.in_chans, size, size), (entry.in_chans, size, size)]
    if not entry.family.startswith("mobilevit"):  # which trains on several sizes
        shapes += [(1, entry.in_chans, size + 8, size), (1, entry.in_chans, size, size - 8)]
    for form in (model, model.deploy()):
        expected = f"this {type(form).__name__} takes images [B, {entry.in_chans}, "
        for shape in shapes:
            with pytest.raises(ModelError, match=f"^{re.escape(expected)}.* got {re.escape(str(list(shape)))}"):
                form(torch.zeros(shape))


@small_and_slow
def test_inference_form_equals_the_model_whatever_the_statistics_and_leaves_it_alone(entry: ModelEntry):
    model = randomize(entry.create()).double().train()
    images = make_images(1, entry.image_size, entry.in_chans).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    deployed = model.deploy()
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert model.training
    assert not any(module.training for module in deployed.modules())
    assert not memory(model) & memory(deployed)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        features, deployed_features = model.eval().forward_features(images), deployed.forward_features(images)
        assert relative_error(deployed_features, features) <= 1e-9
        assert relative_error(deployed.head(deployed_features), model.head(features)) <= 1e-9


def memory(model: torch.nn.Module) -> set[int]:
    """Where the numbers of a model begin."""
    return {tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()}


@small_and_slow
def test_inference_form_is_float32_close_with_one_linear_head(entry: ModelEntry):
    model = randomize(entry.create())
    images = make_images(4, entry.image_size, entry.in_chans)
    deployed = settle_norms(model, images).deploy()
    with torch.no_grad():
        logits = deployed(images[:2])
        trained = model(images[:2])
        assert torch.equal(deployed.deploy()(images[:2]), logits)
    assert isinstance(deployed.head, torch.nn.Linear)
    assert deployed.feature_dim == deployed.head.in_features == model.feature_dim
    assert not any(parameter.requires_grad for parameter in deployed.parameters())
    if relative_error(logits, trained) > 1e-4:  # then by rounding alone, of which the training form has as much
        with torch.no_grad():
            exact = model.double()(images[:2].double())
        rounding = relative_error(trained.double(), exact)
        assert relative_error(logits.double(), exact) <= 2 * rounding


@pytest.mark.parametrize("entry", in_tiers([*ONE_PER_FAMILY, *SMALLEST_EXACT]))
def test_graph_of_the_inference_form_stays_at_rank_4_and_looks_nothing_up(entry: ModelEntry):
    with torch.device("cpu" if entry.family == "gcab" else "meta"):  # which units gcab's gates leave is in the numbers
        image = torch.zeros(1, entry.in_chans, entry.image_size, entry.image_size)
        graph_ranks, graph_operations = ranks_and_operations(entry.create().deploy(), image)
    assert max(graph_ranks) <= 4
    assert not [name for name in graph_operations if any(word in name for word in REFUSED)]


REFUSED = ("index", "gather", "nonzero", "_local_scalar", "scaled_dot_product", "im2col", "pixel_shuffle", "where")


@pytest.mark.parametrize(
    ("entry", "size"),
    [
        pytest.param(e, size, id=f"{e.name}-{size}")
        for e in ENTRIES
        for size in (-1, 0, e.image_size + 1)
        if e in [*ONE_PER_FAMILY, *SMALLEST_EXACT] and "image_size" in option_names(e)
    ],
)
def test_an_impossible_image_size_is_refused_and_the_nearest_possible_ones_are_named(entry: ModelEntry, size: int):
    with torch.device("meta"):
        try:
            entry.create(image_size=size)
        except ModelError as error:
            message = str(error)
        else:
            assert size > 0
            return
        for nearest in re.findall(r"\d+", message.partition("; take ")[2]):
            entry.create(image_size=int(nearest))
    assert re.search(rf"^image_size must be .*, got {size}; take |; change sr_ratio or image_size$", message)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.variant in ("l1", "field-64", "s")], ids=lambda e: e.name)
def test_drawing_accounts_for_the_whole_model(entry: ModelEntry):
    stages = draw_stages(entry)
    assert stages[-1].output == (entry.num_classes,)
    assert sum(stage.macs for stage in stages) >= 0.98 * entry.macs
    assert sum(stage.parameters for stage in stages) <= entry.parameters


def test_unknown_names_list_what_there_is():
    with pytest.raises(ModelError, match=r"no model vit/huge; families are efficientformer, .*'fieldvit models'"):
        find_model("vit", "huge")
    with pytest.raises(ModelError, match=r"no model nextvit/xl; variants of nextvit are s, b, l, field-"):
        find_model("nextvit", "xl")
    with pytest.raises(ModelError, match=r"did you mean ninformer/field-32\?"):
        find_model("NinFormer", "field-32")


@pytest.mark.parametrize(("num_classes", "in_chans"), [(0, 3), (10, 0)])
def test_counts_below_one_are_refused(num_classes, in_chans):
    with pytest.raises(ModelError, match="must be 1 or more"):
        create_model("cnn", "small", num_classes=num_classes, in_chans=in_chans)
