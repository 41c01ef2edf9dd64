"""The same figures as a page and as Markdown: `report.html`, in which nothing is fetched, and `report.md`."""

from pathlib import Path

import numpy as np

from device.contract.files import write_atomic
from host.bench.result import BenchResult, BenchRow
from host.report import charts
from host.report.page import Headline, Section, render

LATENCY_COLUMNS = ("file", "p50 ms", "p90 ms", "p99 ms", "processor p50", "ratio of p50")
FILE_COLUMNS = ("file", "accuracy", "test images", "kB", "peak MB", "runtime", "partitions", "outside XNNPACK")


def write_reports(result: BenchResult, directory: Path) -> None:
    """Write both files into a directory, which is made if it is not there."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / "report.html", html(result).encode())
    write_atomic(directory / "report.md", markdown(result).encode())


def html(result: BenchResult) -> str:
    """The page, in the look of the quickstart's report."""
    first, *others = result.rows
    headlines = [
        Headline(value=f"{first.p50_ms:.3g} ms", caption=f"p50 of {first.title}", good=True),
        *(
            Headline(
                value=f"{row.ratio.value:.2f} ×",
                caption=f"p50 of {row.title}, in the first's",
                good=row.ratio.high >= 1,
            )
            for row in others
        ),
    ]
    sections = [
        Section(
            title="Latency",
            columns=LATENCY_COLUMNS,
            rows=_cells(result, LATENCY_COLUMNS),
            picture=_picture(result.rows),
            alt="p50, p90 and p99 of every file",
        ),
        Section(title="Files", columns=FILE_COLUMNS, rows=_cells(result, FILE_COLUMNS)),
        Section(title="How it was measured", text=". ".join(_capital(note) for note in result.notes()) + "."),
    ]
    return render(
        title=f"Measured: {first.file}",
        subtitle=f"{result.queries} queries of each file, one at a time and in turn",
        headlines=headlines,
        sections=sections,
        footer=_footer(result),
    )


def markdown(result: BenchResult) -> str:
    """Both tables, the notes, and where and when."""
    parts = [
        f"# Measured: {result.rows[0].file}",
        _table(LATENCY_COLUMNS, _cells(result, LATENCY_COLUMNS)),
        _table(FILE_COLUMNS, _cells(result, FILE_COLUMNS)),
        "\n".join(f"- {note}" for note in result.notes()),
        "\n".join(f"- {key}: {value}" for key, value in _footer(result).items()),
    ]
    return "\n\n".join(parts) + "\n"


def _cells(result: BenchResult, columns: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    return tuple(row.cells(columns) for row in result.rows)


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _picture(rows: tuple[BenchRow, ...]) -> str:
    return charts.latency_ranges(
        [row.title for row in rows], np.array([(row.p50_ms, row.p90_ms, row.p99_ms) for row in rows])
    )


def _footer(result: BenchResult) -> dict[str, str]:
    machine = ", ".join(f"{key} {value}" for key, value in result.machine.items())
    return {"command": result.command, "machine": machine, "date": result.date}


def _table(columns: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
