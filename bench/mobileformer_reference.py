"""Compare our Mobile-Former with the public implementation; write the table `mobileformer_reference`.

    python -m bench.mobileformer_reference CHECKOUT

CHECKOUT is a work tree of the repository AAboys/MobileFormer (commit f447310), which is in no package and has no licence
to copy it under; its code is run from there, with the parts of an old timm that it brings along left out. Weights are
drawn for our model and given to theirs layer by layer, in the order in which both call them; only values and keys of a
Former -> Mobile bridge are called in another order there.
"""

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from bench.probes import make_images, randomize, relative_error
from bench.record import Row, write_results
from host.errors import HostError, ModelError
from host.models.measure import count_parameters
from host.models.mobileformer_variants import published

PACKAGE = "public_mobileformer"
VARIANTS = ("508m", "294m", "214m", "151m", "96m", "52m", "26m")
NUM_CLASSES, IMAGE_SIZES = 4, (64, 224)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.mobileformer_reference", description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path, help="work tree of AAboys/MobileFormer")
    try:
        public = load_public(parser.parse_args(argv).checkout)
        rows = [compare(public, variant, size) for variant in VARIANTS for size in IMAGE_SIZES]
    except HostError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    write_results(
        "mobileformer_reference",
        rows=rows,
        command="python -m bench.mobileformer_reference CHECKOUT",
        seed=0,
        data="random images and weights",
        title="Mobile-Former against the public implementation, in float64",
        notes="`relative_error` is of the logits, by the largest; `logits` are the public implementation's for one image.",
    )
    return 0


def load_public(checkout: Path) -> ModuleType:
    """Import their model, with stand-ins for the registry and the builder of the timm that it was cut from.

    Raises:
        ModelError: there is no such model in the folder.
    """
    if not (checkout / "mobile_former.py").is_file():
        raise ModelError(f"{checkout}: has no mobile_former.py; name a work tree of AAboys/MobileFormer")
    package = ModuleType(PACKAGE)
    package.__path__ = [str(checkout)]
    sys.modules[PACKAGE] = package
    _stand_in("helpers", build_model_with_cfg=_build, default_cfg_for_features=None)
    _stand_in("registry", register_model=lambda function: function)
    _stand_in("layers", DropPath=lambda _: nn.Identity())  # used at a rate of 0
    return importlib.import_module(f"{PACKAGE}.mobile_former")


def _stand_in(name: str, **members: Any) -> None:
    module = ModuleType(f"{PACKAGE}.{name}")
    module.__dict__.update(members)
    sys.modules[module.__name__] = module


def _build(kind: type[nn.Module], *_: Any, default_cfg: Any = None, **options: Any) -> nn.Module:
    return kind(**options)


@torch.no_grad()
def compare(public: ModuleType, variant: str, image_size: int) -> Row:
    """One variant at one resolution: parameters of both, and how far their logits are apart."""
    images = make_images(1, image_size).double()
    ours = randomize(published(variant, num_classes=NUM_CLASSES, in_chans=3, image_size=image_size).double())
    build = getattr(public, f"mobile_former_{variant}")
    theirs = build(num_classes=NUM_CLASSES, img_size=image_size).double().eval()
    copy_in_order(ours, theirs, images)
    theirs.tokens.weight.copy_(ours.tokens)
    expected = theirs(images)
    return {
        "variant": variant,
        "image_size": image_size,
        "parameters": count_parameters(ours),
        "public_parameters": count_parameters(theirs),
        "relative_error": float(f"{relative_error(ours(images), expected):.1e}"),
        "logits": " ".join(f"{value:.9f}" for value in expected[0].tolist()),
    }


def copy_in_order(source: nn.Module, target: nn.Module, images: Tensor) -> None:
    """Copy the state of every layer with weights to the layer that is called in its place.

    Raises:
        ModelError: another number of layers is called, or a pair does not fit.
    """
    ours, theirs = _called(source, images), _keys_first(_called(target, images))
    if len(ours) != len(theirs):
        raise ModelError(f"{len(ours)} layers are called in ours, {len(theirs)} in the public implementation")
    for (name, layer), (other_name, other) in zip(ours, theirs, strict=True):
        try:
            other.load_state_dict(layer.state_dict())
        except RuntimeError as error:
            raise ModelError(f"{name} of ours does not fit {other_name}: {error}") from error


def _keys_first(layers: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Swap the values (`global_local.proj`) and the keys (`global_local.k`) that follow them."""
    ordered = list(layers)
    for index, (name, _) in enumerate(layers):
        if name.endswith("global_local.proj"):
            ordered[index : index + 2] = reversed(layers[index : index + 2])
    return ordered


def _called(model: nn.Module, images: Tensor) -> list[tuple[str, nn.Module]]:
    """Layers with weights, in the order of their calls."""
    found: list[tuple[str, nn.Module]] = []
    layers = {name: m for name, m in model.named_modules() if not list(m.children()) and list(m.parameters())}
    handles = [
        layer.register_forward_hook(lambda layer, *_, name=name: found.append((name, layer)))
        for name, layer in layers.items()
    ]
    model(images)
    for handle in handles:
        handle.remove()
    return found


if __name__ == "__main__":
    sys.exit(main())
