"""The command line: every verb has help with an example and a line in the README, and says in one line what is wrong."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from host.cli import app, main
from tests.support.bundles import write_plain_bundle

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
VERBS = sorted(command.callback.__name__ for command in app.registered_commands)


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def one_line_error(capsys, *arguments):
    code, _, err = run(capsys, *arguments)
    assert code != 0
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    return lines[0]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example_and_a_line_in_the_readme(capsys, verb):
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0
    assert f"Example: fieldvit {verb}" in " ".join(out.split())
    assert f"fieldvit {verb}" in README or f" {verb} " in README


def test_models_are_listed_with_what_identifies_them(capsys):
    code, out, _ = run(capsys, "models", "--json")
    models = {f"{model['family']}/{model['variant']}": model for model in json.loads(out)["models"]}
    assert code == 0
    assert models["nextvit/s"]["parameters"] == 31_763_368
    assert {"task", "input", "macs", "paper", "kind"} <= models["nextvit/s"].keys()
    assert {model["kind"] for model in models.values()} == {"exact", "ours"}
    code, out, _ = run(capsys, "models")
    assert code == 0
    assert all(name in out for name in models)


def test_a_model_is_drawn_from_image_to_logits(capsys):
    code, out, _ = run(capsys, "models", "show", "deit/tiny")
    assert code == 0
    assert "12 x Block" in out
    assert out.index("3 x 224 x 224") < out.index("196 x 192") < out.index("Linear")
    code, out, _ = run(capsys, "models", "show", "deit/tiny", "--json")
    assert json.loads(out)["stages"][-1]["output"] == [1000]


def test_models_say_which_fit_a_board(capsys):
    code, out, _ = run(capsys, "models", "--board", "raspberry-pi-zero-2w", "--json")
    models = {f"{model['family']}/{model['variant']}": model for model in json.loads(out)["models"]}
    assert code == 0
    assert models["nextvit/s"]["int8_bytes_estimate"] == 31_763_368
    assert not models["nextvit/s"]["fits"]
    assert models["nextvit/field-32"]["fits"]
    assert models["mobilevit/s"]["fits"]
    assert (models["nextvit/s"]["fits"], models["nextvit/s"]["over_budget"]) == (False, "int8")
    code, out, _ = run(capsys, "models", "--board", "raspberry-pi-zero-2w")
    assert out.startswith("raspberry-pi-zero-2w takes artifacts of up to 16.8 MB; estimated are 1 byte per parameter")


def test_without_arguments_help_is_shown(capsys):
    code, out, _ = run(capsys)
    assert code == 0
    assert all(verb in out for verb in VERBS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rnu",), "No such command 'rnu'"),
        (("models", "show", "nextvit"), "no model nextvit; variants of nextvit are s, b, l"),
        (("models", "show", "nextvit_small"), "'nextvit_small' is no model name; write FAMILY/VARIANT"),
        (("models", "show", "NextViT/S"), "did you mean nextvit/s?"),
        (("models", "--json", "show", "nextvit/s"), "--json belongs behind the verb"),
        (("models", "--board", "toaster"), "board 'toaster' is unknown"),
        (("models", "--board", "imx8mp", "show", "nextvit/s"), "--board belongs to the list"),
        (("run", "nowhere.toml"), "nowhere.toml: cannot be read"),
        (("run", "latin.toml"), "latin.toml: cannot be read (it is not UTF-8)"),
        (("quickstart", "--seed", "-1"), "Invalid value for '--seed'"),
        (("train",), "Missing argument"),
        (("verify", "no.fieldvit"), "no.fieldvit: no such bundle"),
        (("verify", "no.fieldvit", "--out", "here"), "--out here is where --layers draws; add --layers"),
        (("bench", "no.fieldvit"), "no.fieldvit: no such bundle"),
        (("export", "x.toml", "--fast"), "No such option"),
        (("monitor", "--broker", "rabbit"), "broker kind 'rabbit' is unknown"),
        (("monitor", "--broker", "mqtt://127.0.0.1:1", "--store", "m.sqlite", "--port", "0"), "127.0.0.1:1"),
        (("quickstart", "--device-python", "nowhere/python"), "nowhere/python: no device environment"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "gr\xfcn"')
    assert message in one_line_error(capsys, *arguments)


@pytest.mark.parametrize("arguments", [("run", "nowhere.toml"), ("train", "typo.toml"), ("verify", "no.fieldvit")])
def test_a_mistake_is_told_before_pytorch_is_imported(tmp_path, arguments):
    (tmp_path / "typo.toml").write_text("nmae = 'x'")
    script = (
        "import sys; from host.cli import main; code = main(sys.argv[1:]); "
        "print(code, {'torch', 'timm', 'sklearn'} & set(sys.modules))"
    )
    verb, path = arguments
    command = [sys.executable, "-c", script, verb, str(tmp_path / path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    code, loaded = done.stdout.split(maxsplit=1)
    assert int(code) != 0
    assert loaded.strip() == "set()", done.stderr


def test_a_taken_port_is_named(capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        store = ("--store", tmp_path / "m.sqlite")
        for ports in (("--broker-port", port, "--port", 0), ("--broker-port", 0, "--port", port)):
            assert f"127.0.0.1:{port} cannot be used" in one_line_error(capsys, "monitor", *store, *ports)


def test_publish_refuses_a_bad_channel_before_it_makes_anything(capsys, tmp_path):
    bundle = write_plain_bundle(tmp_path / "plain-0.1.0.fieldvit")
    places = ("--repo", tmp_path / "updates", "--keys", tmp_path / "keys")
    assert "channel 'a/b'" in one_line_error(capsys, "publish", bundle, "--channel", "a/b", *places)
    assert not (tmp_path / "keys").exists()


def test_damaged_bundle_is_refused(capsys, tmp_path):
    bundle = write_plain_bundle(tmp_path / "plain-0.1.0.fieldvit", content=b"no model, 0nly bytes")
    assert "differs from the manifest" in one_line_error(capsys, "verify", bundle)


def test_publish_then_flash(capsys, tmp_path):
    bundle = write_plain_bundle(tmp_path / "plain-0.1.0.fieldvit")
    places = ("--repo", tmp_path / "updates")
    assert run(capsys, "publish", bundle, *places, "--keys", tmp_path / "keys")[0] == 0
    target = f"dir:{tmp_path / 'board'}"
    code, out, _ = run(capsys, "flash", bundle, *places, "--to", target, "--broker", "mqtt://127.0.0.1:1883")
    assert code == 0
    assert "fieldvit-device run" in out
    assert "was built for" in one_line_error(
        capsys, "flash", bundle, *places, "--to", target, "--board", "raspberry-pi-5"
    )
    assert "board 'x' is unknown" in one_line_error(capsys, "flash", bundle, *places, "--to", target, "--board", "x")
    assert "write dir:PATH" in one_line_error(capsys, "flash", bundle, *places, "--to", "usb")


def test_publish_with_other_keys_is_refused(capsys, tmp_path):
    bundle = write_plain_bundle(tmp_path / "plain-0.1.0.fieldvit")
    run(capsys, "publish", bundle, "--repo", tmp_path / "updates", "--keys", tmp_path / "keys")
    run(capsys, "publish", bundle, "--repo", tmp_path / "updates2", "--keys", tmp_path / "keys2")
    error = one_line_error(
        capsys, "publish", bundle, "--repo", tmp_path / "updates", "--keys", tmp_path / "keys2", "--channel", "beta"
    )
    assert "is not this repository's" in error


def test_boards_and_doctor_print_json(capsys):
    code, out, _ = run(capsys, "boards", "--json")
    assert code == 0
    assert "raspberry-pi-5" in {board["name"] for board in json.loads(out)["boards"]}
    code, out, _ = run(capsys, "doctor", "--json")
    findings = json.loads(out)["findings"]
    assert code == (0 if all(finding["ok"] for finding in findings if finding["required"]) else 1)
