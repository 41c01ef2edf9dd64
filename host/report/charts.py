"""Pictures of the report as inline SVG: samples, confusion matrices, latencies, the timeline of events."""

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, GREEN, RED, AMBER = "#2f6fde", "#1f9d61", "#d64545", "#c98a0b"
EVENT_COLORS = {
    "installed": BLUE,
    "confirmed": GREEN,
    "learned": GREEN,
    "refused": RED,
    "rolled-back": RED,
    "error": RED,
}

_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.fonttype": "none",
    "svg.hashsalt": "fieldvit",
}


def sample_grid(images: np.ndarray, truth: Sequence[str], before: Sequence[str], after: Sequence[str]) -> str:
    """Draw frames with the answer before and after learning.

    Args:
        images: uint8 [N, h, w] or [N, h, w, C]; N a multiple of 10 looks best.
        truth: the true label of each frame.
        before: the answer before learning.
        after: the answer after it.
    """
    columns = 10
    rows = -(-len(images) // columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 1.3 * rows))
        for index, image in enumerate(images):
            axes = figure.add_subplot(rows, columns, index + 1)
            axes.imshow(255 - image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_xticks([]), axes.set_yticks([])
            colors = [GREEN if answer == truth[index] else RED for answer in (before[index], after[index])]
            axes.text(0.3, -0.2, before[index], color=colors[0], transform=axes.transAxes, ha="right", fontsize=10)
            axes.text(0.5, -0.2, "→", color=MUTED, transform=axes.transAxes, ha="center", fontsize=10)
            axes.text(0.7, -0.2, after[index], color=colors[1], transform=axes.transAxes, ha="left", fontsize=10)
        figure.subplots_adjust(left=0.01, right=0.99, top=0.98, bottom=0.09, wspace=0.12, hspace=0.35)
        return _svg(figure)


def confusion_matrices(labels: Sequence[str], before: np.ndarray, after: np.ndarray) -> str:
    """Draw two confusion matrices side by side; counts int [K, K], rows are the truth."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 4.6))
        for place, (title, counts) in enumerate(
            (("Before the field lesson", before), ("After 20 + 20 labels", after)), 1
        ):
            axes = figure.add_subplot(1, 2, place)
            shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
            axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
            for row, column in np.argwhere(counts):
                color = "white" if shares[row, column] > 0.5 else INK
                weight = "bold" if row == column else "normal"
                axes.text(
                    column, row, counts[row, column], ha="center", va="center", color=color, fontsize=8, weight=weight
                )
            axes.set_xticks(range(len(labels)), labels)
            axes.set_yticks(range(len(labels)), labels)
            axes.set_xlabel("answer of the board")
            axes.set_ylabel("truth" if place == 1 else "")
            axes.set_title(title, loc="left", fontsize=10, color=INK)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        figure.tight_layout()
        return _svg(figure)


def latency_histogram(latencies_ms: dict[str, Sequence[float]]) -> str:
    """Draw the latency of each artifact, milliseconds per frame, cut at the 99.5th percentile."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 2.6))
        axes = figure.add_subplot()
        top = max(float(np.percentile(values, 99.5)) for values in latencies_ms.values())
        bins = np.linspace(0, top, 60)
        for (name, values), color in zip(latencies_ms.items(), (BLUE, AMBER, GREEN), strict=False):
            axes.hist(values, bins=bins, alpha=0.55, color=color, label=name)
            axes.axvline(float(np.median(values)), color=color, linewidth=1)
        axes.set_xlabel("ms per frame: pre-processing, backbone and head (line: median)")
        axes.set_ylabel("frames")
        axes.legend(frameon=False)
        figure.tight_layout()
        return _svg(figure)


def latency_ranges(names: Sequence[str], percentiles_ms: np.ndarray) -> str:
    """Draw p50 as a dot with a line to p90 and a thinner one to p99, one row per name; float [N, 3], milliseconds."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 0.42 * max(len(names), 2) + 0.7))
        axes = figure.add_subplot()
        for row, (p50, p90, p99) in enumerate(percentiles_ms):
            color = BLUE if row == 0 else AMBER
            axes.plot([p50, p99], [row, row], color=color, linewidth=1.2, zorder=1)
            axes.plot([p50, p90], [row, row], color=color, linewidth=4, solid_capstyle="butt", zorder=2)
            axes.scatter([p50], [row], color=color, s=42, zorder=3)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("ms per query: p50 (dot), p90 (thick), p99 (thin)")
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        figure.tight_layout()
        return _svg(figure)


def event_timeline(events: Sequence[tuple[float, str, str]]) -> str:
    """Draw events as (seconds since the first one, kind, short text)."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 0.42 * max(len(events), 3) + 0.6))
        axes = figure.add_subplot()
        for row, (seconds, kind, text) in enumerate(events):
            color = EVENT_COLORS.get(kind, AMBER)
            axes.plot([0, seconds], [row, row], color=GRID, linewidth=1, zorder=1)
            axes.scatter([seconds], [row], color=color, s=36, zorder=2)
            axes.annotate(
                f"{kind}  {text}", (seconds, row), xytext=(8, 0), textcoords="offset points", va="center", fontsize=8.5
            )
        last = max((seconds for seconds, _, _ in events), default=1.0)
        axes.set_xlim(-0.02 * last, last * 1.6 + 0.1)
        axes.set_ylim(len(events) - 0.4, -0.6)
        axes.set_yticks([])
        axes.set_xlabel("seconds since the board's first event")
        axes.spines["left"].set_visible(False)
        figure.tight_layout()
        return _svg(figure)


def error_along_depth(
    errors: Mapping[str, Sequence[float | None]], departed: Mapping[str, tuple[int, str] | None]
) -> str:
    """Draw each artifact's relative error, tensor by tensor in the order of computation, on a logarithmic scale.

    Args:
        errors: by artifact; None where the reference has no such tensor.
        departed: by artifact, the position and the name of the tensor that departs first, marked in red.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.6, 2.2 * len(errors)))
        for place, (artifact, values) in enumerate(errors.items(), 1):
            axes = figure.add_subplot(len(errors), 1, place)
            points = [
                (position, max(value, 1e-9))
                for position, value in enumerate(values)
                if value is not None and np.isfinite(value)
            ]
            axes.plot(*zip(*points, strict=True), color=BLUE, linewidth=1, marker=".", markersize=3)
            if found := departed[artifact]:
                axes.axvline(found[0], color=RED, linewidth=1)
                axes.text(found[0], 1.02, found[1], color=RED, fontsize=8, transform=axes.get_xaxis_transform())
            axes.set_yscale("log")
            axes.set_ylabel("error / largest")
            axes.set_title(artifact, loc="right", fontsize=10, color=INK)
            axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.set_xlabel("tensors in the order of computation")
        figure.tight_layout()
        return _svg(figure)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
