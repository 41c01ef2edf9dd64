"""Let torchvision's usual wheel, which is built for CUDA, be imported beside a CPU build of PyTorch.

That wheel registers `nms` and `qnms` from a library that a CPU build cannot load, and then refuses to be imported
("operator torchvision::nms does not exist"). timm imports torchvision. We declare the two operators, without bodies:
what calls them fails as before, everything else works. A complete torchvision, and any CUDA build of PyTorch, is left
alone.
"""

import sys

import torch

_SCHEMA = "{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries: list[torch.library.Library] = []  # the declarations last as long as this object


def apply() -> None:
    """Make `import torchvision` work, if that is what it takes."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error) or torch.version.cuda is not None or torch.version.hip is not None:
            raise
        _declare()


def _declare() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left behind
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(_SCHEMA.format(name=name))
    _libraries.append(library)
