"""The Makefile's set-up: what it says when the machine is not ready, and what it does not do twice.

No package is installed here: pip is a stand-in script, in a copy of the files that the set-up reads.
"""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")


@pytest.fixture
def project(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "constraints", tmp_path / "constraints")
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    return tmp_path


@pytest.fixture
def fake_python(tmp_path):
    """Write an interpreter that answers the set-up's questions, and whose pip only notes that it was called."""

    def write(version="3.11.9", *, has_venv=True, pip="exit 0"):
        path = tmp_path / f"python-{version}"
        path.write_text(
            f"""#!/bin/sh
case "$*" in
*version_info*) echo {version.rpartition(".")[0]} ;;
*python_version*) echo "Python {version}" ;;
*ensurepip*) exit {0 if has_venv else 1} ;;
-V) echo "Python {version}" ;;
"-m venv"*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
"-m pip"*) echo "$*" >> "{tmp_path}/pip-calls"; {pip} ;;
*) exit 99 ;;
esac
"""
        )
        path.chmod(0o755)
        return path

    return write


def make(directory, *arguments, **environment):
    inherited = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL", "PYTHON", "TORCH_INDEX"}}
    command = [MAKE, "--no-print-directory", *arguments]
    return subprocess.run(
        command, cwd=directory, env=inherited | environment, capture_output=True, text=True, timeout=60, check=False
    )


def error_of(result):
    """Our one line: what make itself adds about the failed target is not ours."""
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("/bin/false", "PYTHON=/bin/false is no Python at all"),
        ("/no/such/python", "PYTHON=/no/such/python does not exist"),
    ],
)
def test_what_is_no_python_gives_one_line(project, python, message):
    line = error_of(make(project, "env", f"PYTHON={python}"))
    assert message in line
    assert "make env PYTHON=/path/to/python3.11" in line
    assert not (project / ".venv").exists()


@pytest.mark.parametrize("version", ["3.10.14", "3.12.1"])
def test_another_python_gives_one_line_with_both_versions(project, fake_python, version):
    line = error_of(make(project, "env", f"PYTHON={fake_python(version)}"))
    assert f"is Python {version}, but the pinned versions need Python 3.11" in line


def test_no_python_on_the_path_gives_one_line(project, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "sh", "env", "basename", "sed", "cat"):
        (tools / name).symlink_to(shutil.which(name))
    line = error_of(make(project, "env", PATH=str(tools)))
    assert "no Python 3.11 found; install it" in line


def test_a_shim_that_cannot_run_is_passed_over(project, fake_python, tmp_path):
    shims = tmp_path / "shims"
    shims.mkdir()
    (shims / "python3.11").write_text("#!/bin/sh\necho 'command not found' >&2\nexit 127\n")
    (shims / "python3.11").chmod(0o755)
    shutil.copy(fake_python(), shims / "python3")
    result = make(project, "env", PATH=f"{shims}:{os.environ['PATH']}")
    assert result.returncode == 0, result.stderr


def test_python_without_venv_gives_one_line(project, fake_python):
    line = error_of(make(project, "device-env", f"PYTHON={fake_python(has_venv=False)}"))
    assert "has no venv module; install it (Debian/Ubuntu: apt install python3.11-venv) and run make device-env" in line


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("Failed to establish a new connection: [Errno -2] Name or service not known", "no network: pip cannot reach"),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: ResolutionImpossible", "ERROR: ResolutionImpossible (log: .venv/install.log)"),
    ],
)
def test_pip_failing_gives_one_line_and_no_stamp(project, fake_python, said, message):
    python = fake_python(pip=f"echo '{said}'; exit 1")
    assert message in error_of(make(project, "env", f"PYTHON={python}"))
    assert not (project / ".venv" / ".stamp").exists()
    assert said in (project / ".venv" / "install.log").read_text()


def test_indexes_are_not_shown(project, fake_python):
    python = fake_python(pip="echo 'Looking in indexes: https://user:secret@index.example/simple'; exit 1")
    result = make(project, "env", f"PYTHON={python}", "TORCH_INDEX=https://torch.example/cpu")
    assert ".example" not in result.stdout + result.stderr
    assert "--extra-index-url https://torch.example/cpu" in (project / "pip-calls").read_text()


def test_second_call_installs_nothing(project, fake_python):
    python = fake_python()
    assert make(project, "env", "device-env", f"PYTHON={python}").returncode == 0
    calls = (project / "pip-calls").read_text().splitlines()
    assert len(calls) == 2
    assert "-c constraints/host.txt -e .[host,dev]" in calls[0]
    assert "-c constraints/device.txt -e .[device]" in calls[1]
    assert make(project, "env", "device-env", f"PYTHON={python}").returncode == 0
    (project / "pyproject.toml").touch()  # a fresh checkout: other times, same content
    assert make(project, "env", "device-env", f"PYTHON={python}").returncode == 0
    assert (project / "pip-calls").read_text().splitlines() == calls


def test_other_pins_install_again_in_the_same_environment(project, fake_python):
    python = fake_python()
    make(project, "env", f"PYTHON={python}")
    (project / ".venv" / "kept").touch()
    with (project / "constraints" / "host.txt").open("a") as file:
        file.write("# changed\n")
    future = (project / ".venv" / ".stamp").stat().st_mtime + 5
    os.utime(project / "constraints" / "host.txt", (future, future))
    assert make(project, "env", f"PYTHON={python}").returncode == 0
    assert len((project / "pip-calls").read_text().splitlines()) == 2
    assert (project / ".venv" / "kept").exists()


@pytest.mark.parametrize(
    ("target", "directory", "arguments"),
    [
        ("onnx2tf-env", ".venv-onnx2tf", "-c constraints/onnx2tf.txt onnx2tf tensorflow"),
        ("legacy-env", ".venv-legacy", "-c constraints/device-legacy.txt -e .[device-legacy]"),
    ],
)
def test_other_environments_are_made_from_their_own_pins(project, fake_python, target, directory, arguments):
    assert make(project, target, f"PYTHON={fake_python()}").returncode == 0
    assert (project / directory / ".stamp").exists()
    assert arguments in (project / "pip-calls").read_text()
    line = error_of(make(project, "clean", target, f"PYTHON={fake_python('3.12.1')}"))
    assert f"name one: make {target} PYTHON=" in line


def test_interrupted_install_starts_over(project, fake_python, tmp_path):
    # TERM and not INT, which is ignored where pytest itself runs in the background of a script
    started = tmp_path / "started"
    python = fake_python(pip=f"[ -e {started} ] || {{ touch {started}; kill -TERM 0; sleep 5; }}")
    command = [MAKE, "env", f"PYTHON={python}"]
    first = subprocess.run(command, cwd=project, capture_output=True, timeout=60, start_new_session=True, check=False)
    assert first.returncode != 0
    assert b"error: interrupted; make env starts over" in first.stderr
    assert not (project / ".venv" / ".stamp").exists()
    assert make(project, "env", f"PYTHON={python}").returncode == 0
    assert (project / ".venv" / ".stamp").exists()


def test_help_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    listed = re.findall(r"^  make (\S+) +\S", make(ROOT).stdout, re.MULTILINE)
    assert set(phony) <= set(listed)
    assert {"quickstart", "test", "lint", "bench"} <= set(listed)


def test_every_pin_is_exact_and_boards_get_the_host_s_versions():
    pins = {path.stem: pins_of(path) for path in (ROOT / "constraints").glob("*.txt")}
    assert set(pins) == {"host", "device", "device-legacy", "legacy-test", "peers", "onnx2tf"}
    assert pins["device"].items() <= pins["host"].items()
    assert "cryptography" not in pins["device"]
    assert pins["host"]["torch"] == "2.13.0"  # without +cpu: which build it is, is up to the index
    assert not pins["peers"].keys() & pins["host"].keys()
    assert pins["onnx2tf"]["numpy"].startswith(
        "1.26."
    )  # what onnx2tf and TensorFlow 2.19 pin, hence its own environment


def test_wanted_packages_are_pinned():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, file in {"device": "device", "device-legacy": "device-legacy", "host": "host", "dev": "host"}.items():
        wanted = {re.match(r"[\w.-]+", requirement)[0] for requirement in extras[extra]} - {"fieldvit"}
        assert wanted <= pins_of(ROOT / "constraints" / f"{file}.txt").keys()


def pins_of(path):
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith(("#", "-c "))]
    pins = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines]
    assert all(pins), path
    return {pin[1].lower().replace("_", "-"): pin[2] for pin in pins}
