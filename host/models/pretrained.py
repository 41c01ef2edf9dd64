"""Published weights: timm's from the hub, or a safetensors file with timm's names or ours.

Weights for other classes keep the new head's initial values; weights for colour images enter a model for grey ones as
timm does it, by summing the first convolution over its channels. What belongs to a grid of positions is resampled for
images of another size (`fitting`). Two heads enter a model with one as their mean, which is what the published model
answers. Half precision becomes float32.
"""

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from host.errors import ModelError
from host.models.entry import ModelEntry, StateDict
from host.models.fitting import fit, is_other_grid, is_other_input, resampled
from host.models.heads import join_heads

HEAD = "head."
UNKNOWN_LICENCE = "unknown: ask who published the weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedWeights:
    """What was loaded, for the log and for a bundle's provenance.

    Attributes:
        source: the file's name, or the hub's of the weights.
        sha256: of the file; of the hub's, of its tensors as safetensors.
        num_loaded, num_tensors: how many of the model's tensors came from there.
        changes: what was done to them, in words.
    """

    source: str
    sha256: str
    num_loaded: int
    num_tensors: int
    changes: tuple[str, ...]

    def __str__(self) -> str:
        counts = f"weights of {self.source}: {self.num_loaded} of {self.num_tensors} tensors"
        return ", ".join((counts, *self.changes))


def load_pretrained(model: nn.Module, entry: ModelEntry, path: Path | None = None) -> LoadedWeights:
    """Load published weights into `model`, built from `entry` with any number of classes and channels.

    Args:
        model: changed in place, or not at all.
        entry: says what timm calls it.
        path: a safetensors file; None asks the hub.

    Raises:
        ModelError: no such file, no network, no published weights, NaN or infinity in them, or weights of another model.
    """
    published, source, sha256 = _from_hub(entry) if path is None else _from_file(path)
    where = f"{entry.name}: {path or f'the published weights of {entry.timm_name}'}"
    state, casts = _as_float32(published)
    _require_finite(state, where)
    own, prefix = model.state_dict(), getattr(model, "num_prefix_tokens", 0)
    state, joins = _with_own_names(state, own, entry, where)
    fitted = {n: fit(n, tensor, own[n], num_prefix_tokens=prefix) for n, tensor in state.items() if n in own}
    head = [name for name in own if name.startswith(HEAD)]
    is_new_head = all(fitted.get(name) is None for name in head)
    if is_new_head:  # of other classes: it starts anew, as a whole
        fitted |= {name: own[name] for name in head}
    problem = _misfit(state, own, fitted)
    if problem:
        raise ModelError(f"{where} does not fit: {problem}; {_next_step(state, own, fitted, entry)}")
    model.load_state_dict({**own, **{name: tensor for name, tensor in fitted.items() if tensor is not None}})
    return LoadedWeights(
        source=source,
        sha256=sha256,
        num_loaded=len(own) - (len(head) if is_new_head else 0),
        num_tensors=len(own),
        changes=(
            *([_new_head(state, own)] if is_new_head else joins),
            *_first_convolution(state, own),
            *resampled(state, own),
            *casts,
        ),
    )


def weights_licence(entry: ModelEntry, *, path: str, stated: str) -> str:
    """The licence of the weights that training starts from: as stated, or as the hub records it of its own.

    Args:
        entry: the model.
        path: of the file they are in; empty: the hub.
        stated: what the recipe says.
    """
    published = timm.models.get_pretrained_cfg(entry.timm_name) if entry.timm_name and not path else None
    return stated or (published.license if published else None) or UNKNOWN_LICENCE


def _as_float32(state: StateDict) -> tuple[StateDict, list[str]]:
    """Floating-point tensors as float32, the others as they are; and the casts in words."""
    others = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} - {torch.float32}
    cast = {name: tensor.float() if tensor.dtype in others else tensor for name, tensor in state.items()}
    return cast, [f"{name} cast to float32" for name in sorted(str(dtype).removeprefix("torch.") for dtype in others)]


def _require_finite(state: StateDict, where: str) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ModelError(f"{where}: {name} holds NaN or infinity; fetch the weights again, or take an earlier save")


def _with_own_names(state: StateDict, own: StateDict, entry: ModelEntry, where: str) -> tuple[StateDict, list[str]]:
    """The state under the model's names, its two heads joined where the model has one; and the latter in words."""
    join = join_heads if f"{HEAD}weight" in own else dict
    ours = join(state)
    if not ours.keys() <= own.keys():
        if not entry.timm_name:
            raise ModelError(f"{where} has other names than this model, and timm has no such model to take them from")
        ours = join(entry.from_timm(state))
    return ours, ["two heads joined in their mean"] if len(ours) < len(state) else []


def _new_head(state: StateDict, own: StateDict) -> str:
    num_classes = {name: len(tensor) for name, tensor in own.items() if name.startswith(HEAD)}
    published = [len(state[name]) for name in num_classes if name in state]
    before = f"{published[0]} -> " if published else ""
    return f"head new ({before}{next(iter(num_classes.values()))} classes)"


def _first_convolution(state: StateDict, own: StateDict) -> list[str]:
    """How the first convolution was fitted to the model's channels, in words; empty where it had them."""
    fitted = [own[name].shape[1] for name, tensor in state.items() if name in own and is_other_input(tensor, own[name])]
    if not fitted:
        return []
    how = "summed over colours" if fitted[0] == 1 else f"spread over {fitted[0]} channels"
    return [f"first convolution {how}"]


def _misfit(state: StateDict, own: StateDict, fitted: Mapping[str, Tensor | None]) -> str:
    """What is wrong with the weights, in words; empty where nothing is."""
    unknown = [name for name in state if name not in own and not name.startswith(HEAD)]
    missing = [name for name in own if name not in fitted]
    shapes = [name for name, tensor in fitted.items() if tensor is None]
    parts = [f"{len(names)} {what}" for names, what in ((missing, "missing"), (unknown, "unknown")) if names]
    if shapes:
        name = shapes[0]
        example = f"{name} is {list(state[name].shape)} and must be {list(own[name].shape)}"
        parts.append(f"{len(shapes)} of another shape ({example})")
    return f"of {len(own)} tensors {', '.join(parts)}" if parts else ""


def _next_step(state: StateDict, own: StateDict, fitted: Mapping[str, Tensor | None], entry: ModelEntry) -> str:
    misfits = [name for name, tensor in fitted.items() if tensor is None]
    if state.keys() <= own.keys() == fitted.keys() and all(is_other_grid(state[name], own[name]) for name in misfits):
        return "they are for images of another size: set the option image_size to theirs"
    return f"give weights of {entry.timm_name or entry.name}"


def _from_file(path: Path) -> tuple[StateDict, str, str]:
    """The tensors of a file, its name and its SHA-256."""
    try:
        content = path.read_bytes()
        if content[:2] in (b"PK", b"\x80\x02"):
            raise ModelError(
                f"{path}: a PyTorch checkpoint, which may hold code; load it where you trust it and save it with "
                "safetensors.torch.save_file(model.state_dict(), FILE)"
            )
        return load(content), path.name, hashlib.sha256(content).hexdigest()
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path}: not a readable safetensors file ({error}); copy it again, or save it with "
            "safetensors.torch.save_file(model.state_dict(), FILE)"
        ) from error


def _from_hub(entry: ModelEntry) -> tuple[StateDict, str, str]:
    """The tensors that timm publishes, what the hub calls them, and the SHA-256 of them as safetensors."""
    if not entry.timm_name:
        raise ModelError(f"{entry.name} has no published weights; train it, or name a safetensors file: weights = FILE")
    source = timm.models.get_pretrained_cfg(entry.timm_name).hf_hub_id
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry
    with torch.random.fork_rng(devices=[]):
        try:
            state = timm.create_model(entry.timm_name, pretrained=True).state_dict()
        except Exception as error:  # the hub's client raises its own, requests' and the system's errors
            raise ModelError(
                f"{entry.name}: the published weights of {entry.timm_name} cannot be fetched from the hub "
                f"({_cause(error)}); connect to the network, or fetch model.safetensors of {source} elsewhere and name "
                "it: weights = FILE"
            ) from error
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    return state, source, hashlib.sha256(save(tensors)).hexdigest()


def _cause(error: BaseException) -> str:
    """Kind and last line of what an error was raised from, without what an address may carry: a password, a signature."""
    while error.__cause__:
        error = error.__cause__
    line = (str(error).strip().splitlines() or [""])[-1]
    line = re.sub(r"(\w+://)[^\s/@]*@|\?[^\s'\")]*", r"\1", line)
    return f"{type(error).__name__}: {line[:300]}"
