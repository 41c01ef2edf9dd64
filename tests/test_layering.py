"""Who may import whom (docs/design.md, section 1): read from every source file, and seen in processes of their own."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("device", "converters", "host")
LIBRARY = ("device.contract", "device.preprocess", "device.pictures", "device.learning", "device.engine")
SHARED = ("host.errors", "host.files", "host.signals")  # small helpers: standard library only
TRAINING = ("torch", "torchvision", "timm", "tensorflow", "jax", "lightning", "transformers")
CONVERTING = ("litert_torch", "ai_edge_quantizer", "coremltools", "onnx", "tensorflow", "jax")


@dataclass(frozen=True)
class Rule:
    """What the modules of one part may import: of ours anywhere, of others while they are being imported."""

    part: str
    ours: tuple[str, ...]
    others: tuple[str, ...] | None = None  # None: anything but the converters' packages
    never: tuple[str, ...] = ()  # not even inside a function


# The first rule whose part holds the module decides.
RULES = [
    Rule("device.contract", ("device.contract",), (), TRAINING),
    Rule("device.preprocess", ("device.contract",), ("numpy",), TRAINING),
    Rule("device.pictures", ("device.contract",), ("numpy",), TRAINING),
    Rule("device.learning", ("device.contract", "device.learning"), ("numpy",), TRAINING),
    Rule("device.runtime", ("device.contract",), (), TRAINING),
    Rule("device.engine", ("device.contract", "device.delegates", "device.runtime"), ("numpy",), TRAINING),
    Rule("device.mqtt", ("device",), ("numpy", "paho"), TRAINING),
    Rule(
        "device",
        ("device",),
        ("numpy", "tuf", "securesystemslib"),
        (*TRAINING, "paho", "ai_edge_litert", "tflite_runtime"),
    ),
    Rule("converters", ("converters", "host.models", "host.quantize.spec", *LIBRARY)),
    Rule("host.quantize.spec", ("device.contract", *SHARED), (), TRAINING),
    Rule("host.models", ("host.models", "device.contract", *SHARED)),
    *(
        Rule(f"host.{part}", ("host.models", *(f"host.{p}" for p in parts), *SHARED, *LIBRARY))
        for parts in [("continual", "data", "distill", "prune", "quantize", "training")]
        for part in parts
    ),
    Rule("host.fleet", ("host.fleet", *SHARED, *LIBRARY), None, TRAINING),
    Rule("host.monitor", ("host.monitor", "host.fleet", *SHARED, *LIBRARY), None, TRAINING),
    Rule("host.simulate", ("host.simulate", "host.monitor.broker", *SHARED, *LIBRARY), None, TRAINING),
    Rule("host", ("host", "converters", *LIBRARY)),  # commands, recipes and stages wire the parts
]


@dataclass(frozen=True)
class Import:
    """One imported name, where it stands, and whether importing the file runs it."""

    target: str
    line: int
    runs_on_import: bool


def test_no_file_imports_what_its_part_must_not():
    assert not [violation for name in modules() for violation in violations(name)]


def test_modules_do_not_import_each_other_in_rings():
    graph = {name: {target_module(i.target) for i in imports(name) if i.runs_on_import} - {name} for name in modules()}
    try:
        TopologicalSorter({name: {t for t in targets if t in graph} for name, targets in graph.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"ring: {' <- '.join(error.args[1])}")


def test_device_package_is_empty():
    assert (ROOT / "device" / "__init__.py").read_text().strip() == ""


def test_board_profiles_are_data_only():
    assert not list((ROOT / "firmware_configs").rglob("*.py"))


@pytest.mark.parametrize("module", ["device.cli", "device.contract.board"])
def test_agent_loads_no_training_framework_and_nothing_of_the_host(module):
    assert loaded_by(module).isdisjoint({*TRAINING, "host", "converters"})


def test_contract_loads_the_standard_library_only():
    names = [name for name in modules() if name.startswith("device.contract")]
    assert loaded_by(*names) <= {"device", *sys.stdlib_module_names}


@pytest.mark.parametrize("part", ["host.fleet", "host.monitor", "host.simulate", "host.cli"])
def test_operating_a_fleet_loads_no_training_framework(part):
    names = [name for name in modules() if holds(part, name)]
    assert names
    assert loaded_by(*names).isdisjoint(TRAINING)


def test_the_rules_catch_what_they_name(tmp_path):
    source = "import torch\nfrom device import slots\ndef f():\n    import coremltools, host.training.fit\n"
    found = violations("converters.example", list(parse(source)))
    assert [line.split(": ")[1] for line in found] == [
        "imports device.slots; converters may import converters, host.models, host.quantize.spec, device.contract, "
        "device.preprocess, device.pictures, device.learning, device.engine",
        "imports host.training.fit; converters may import converters, host.models, host.quantize.spec, "
        "device.contract, device.preprocess, device.pictures, device.learning, device.engine",
    ]
    assert "inside the function" in violations("converters.example", list(parse("import coremltools")))[0]
    assert "never" in violations("device.agent", list(parse("def f():\n    import torch")))[0]
    assert not violations("device.agent", list(parse("def f():\n    import cv2")))


def modules() -> list[str]:
    files = (path.relative_to(ROOT) for part in OURS for path in sorted((ROOT / part).rglob("*.py")))
    return [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files]


def source_of(name: str) -> Path:
    path = ROOT.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(name: str) -> list[Import]:
    return list(parse(source_of(name).read_text(encoding="utf-8")))


def parse(source: str) -> Iterator[Import]:
    yield from walk(ast.parse(source), runs_on_import=True)


def walk(node: ast.AST, *, runs_on_import: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, runs_on_import) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (Import(f"{child.module}.{a.name}", child.lineno, runs_on_import) for a in child.names)
        else:
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_for_types_only(child)
            yield from walk(child, runs_on_import=runs_on_import and not later)


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def violations(name: str, found: list[Import] | None = None) -> list[str]:
    rule = next(rule for rule in RULES if holds(rule.part, name))
    lines = []
    for item in imports(name) if found is None else found:
        package = item.target.partition(".")[0]
        why = ""
        if package in {"tests", "bench"}:
            why = "which is not installed"
        elif package in OURS:
            if not any(holds(part, item.target) for part in (*rule.ours, rule.part)):
                why = f"{rule.part} may import {', '.join(rule.ours)}"
        elif package in rule.never:
            why = f"{rule.part} must never do that"
        elif item.runs_on_import and package in CONVERTING:
            why = "import it inside the function that needs it"
        elif (
            item.runs_on_import and rule.others is not None and package not in {*rule.others, *sys.stdlib_module_names}
        ):
            why = f"at import time {rule.part} may load {', '.join(rule.others) or 'the standard library only'}"
        if why:
            lines.append(f"{name.replace('.', '/')}.py:{item.line}: imports {item.target}; {why}")
    return lines


def may_load(rule: Rule, package: str) -> bool:
    return rule.others is None or package in {*rule.others, *sys.stdlib_module_names}


def holds(part: str, name: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def target_module(target: str) -> str:
    """The module that an imported name is in: the name itself, or what it was imported from."""
    return target if source_of(target).exists() else target.rpartition(".")[0]


def loaded_by(*names: str) -> set[str]:
    """The top-level packages that importing modules loads, in a process of its own: pytest holds torch already."""
    script = f"import sys; before = set(sys.modules); import {', '.join(names)}; print(*set(sys.modules) - before)"
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    return {name.partition(".")[0] for name in out.stdout.split()}
