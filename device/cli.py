"""The command line on a board: `fieldvit-device VERB --root DIR`. Results on standard output, log on standard error."""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from device.contract.errors import DeviceError
from device.logs import set_up_logging

DEFAULT_ROOT = Path("/var/lib/fieldvit")
NOT_WELL = 1
INTERRUPTED = 128 + signal.SIGINT

Verb = Callable[[argparse.Namespace], int]


def main(argv: list[str] | None = None) -> int:
    """Run one verb; our own errors become one line and their exit code."""
    words = sys.argv[1:] if argv is None else argv
    arguments = _parser(words).parse_args(words)
    set_up_logging()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy: resizing a frame must not take every core
    verb: Verb = arguments.verb
    try:
        return verb(arguments)
    except DeviceError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, for example `| head`
        sys.stderr.close()
        return NOT_WELL


def _run(arguments: argparse.Namespace) -> int:
    root, config, board = _setup(arguments)
    set_up_logging(config.log.format, is_journal=bool(os.environ.get("JOURNAL_STREAM")))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with _lock(root, "run"):
        from device.opening import Opening

        opening = Opening(root, config, board)
        from device.app import Agent  # here: it is loaded beside the model
        from device.notify import Supervisor

        supervisor = Supervisor.from_environment(os.environ)
        agent = Agent(root, config, board, stop=stop, supervisor=supervisor, opening=opening)
        signal.signal(signal.SIGHUP, lambda *_: agent.reload())
        return agent.run()


def _update(arguments: argparse.Namespace) -> int:
    from device.ask import ask_for_update
    from device.config import resolve_runtime, resolve_source
    from device.lock import lock_owner
    from device.serving import Serving
    from device.slots import Slots
    from device.updater import Updater
    from device.verbs import serving_table

    root, config, board = _setup(arguments)
    if arguments.source:
        source = resolve_source(arguments.source, Path.cwd(), name="--from")
    else:
        source = resolve_source(config.update.source, root)
    if arguments.dry_run:
        return _show_preview(arguments, source)
    owner = lock_owner(root)
    if owner and owner.purpose == "run" and not arguments.source and not arguments.force:
        is_updated = ask_for_update(
            root, owner.pid, accept_loss=arguments.accept_loss, tell=logging.getLogger(__name__).info
        )
        return _show_update(arguments, serving_table(Slots(root)), is_updated, f"{source}, channel {config.channel}")
    with _lock(root, "update"):
        slots = Slots(root)
        _recover(slots)
        serving = Serving(slots, resolve_runtime(board, config.runtime))
        serving.start()  # a damaged slot is found here, and filled again
        with _recovering_from_interrupt(slots):
            updater = Updater(root, config, board, slots, learned=serving)
            staged = updater.stage(source, force=arguments.force, accept_loss=arguments.accept_loss)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # from here it is quick, and must not end halfway
        if staged:
            accept_loss = updater.accepts(accept_loss=arguments.accept_loss)
            fate = serving.activate(staged.slot, staged.test.precision, accept_loss=accept_loss).fate
            if fate.words:
                logging.getLogger(__name__).info("taught classes: %s", fate.words)
            serving.confirm()
        table = serving_table(slots)
    if staged and slots.state(staged.slot).state != "confirmed":
        raise DeviceError(
            "the model failed its last check and was rejected; 'fieldvit-device status --history' says why"
        )
    return _show_update(arguments, table, staged is not None, f"{source}, channel {config.channel}")


def _show_update(arguments: argparse.Namespace, table: dict[str, Any], is_updated: bool, offered: str) -> int:
    text = f"{table['name']} {table['version']} {table['precision']} in slot {table['slot']}: "
    text += "installed and confirmed" if is_updated else f"is up to date with {offered}"
    _show(arguments, {"updated": is_updated} | table, [text])
    return 0


def _show_preview(arguments: argparse.Namespace, source: Path | str) -> int:
    where = f"dir:{source}" if isinstance(source, Path) else source
    table = {"source": where, "force": arguments.force, "dry_run": True}
    found = _tell(arguments, "update", {name: value for name, value in table.items() if value})
    if not found["would_update"]:
        _show(arguments, found, ["is up to date"])
        return 0
    offered, learned = found["offered"], found["learned"]
    lines = [f"would install {offered['name']} {offered['version']}, release {offered['release']}"]
    lines += [f"  taught classes {fate}: {', '.join(labels)}" for fate, labels in learned.items() if labels]
    if learned["dropped"]:
        lines.append("  so it would be refused; '--accept-loss' takes it all the same")
    _show(arguments, found, lines)
    return 0


def _learn(arguments: argparse.Namespace) -> int:
    from device.contract.errors import ConfigError
    from device.hand import learn_arguments

    if bool(arguments.frames) == bool(arguments.frame_ids):
        raise ConfigError("name either files, or with --id frames that the agent has just seen")
    root, config, board = _setup(arguments)
    table = learn_arguments(root, config, board, arguments.label, arguments.frames, arguments.frame_ids)
    done = _tell(arguments, "learn", table)
    text = f"learned {done['label']} from {done['examples']} examples; {done['classes']} classes, version {done['version']}"
    _show(arguments, done, [text])
    return 0


def _undo(arguments: argparse.Namespace) -> int:
    done = _tell(arguments, "undo", {"lesson": arguments.lesson} if arguments.lesson else {})
    text = f"took back {done['examples']} examples of {done['label']}; {done['classes']} classes, version {done['version']}"
    _show(arguments, done, [text])
    return 0


def _learned(arguments: argparse.Namespace) -> int:
    from device.backup import read_backup
    from device.contract.errors import ArtifactError, ConfigError
    from device.hand import export_learned, learned_table

    root, config, _ = _setup(arguments)
    if arguments.action == "list":
        table = learned_table(root)
        lines = [f"{table['model']}: learned version {table['version']}"]
        lines += [f"  {k['label']}: {k['examples']} examples{', shipped too' * k['shipped']}" for k in table["classes"]]
        lines += [f"  lesson {k['id']}: {k['label']}, {k['examples']} examples" for k in table["lessons"]]
        _show(arguments, table, lines + table["problems"])
        return 0
    if arguments.file is None:
        raise ConfigError(f"learned {arguments.action}: name a file")
    if arguments.action == "export":
        done = export_learned(root, config, arguments.file)
        _show(arguments, done, [f"wrote {done['file']}: version {done['version']}, {_labels(done['taught'])}"])
        return 0
    from device.backup import MAGIC, require_backup

    try:
        with arguments.file.open("rb") as file:
            require_backup(beginning := file.read(len(MAGIC)), arguments.file)
            content = beginning + file.read()
    except OSError as error:
        raise ArtifactError(f"{arguments.file}: cannot be read ({error.strerror})") from error
    read_backup(content, arguments.file)  # here it is known by its name
    done = _tell(arguments, "restore", {"accept_loss": arguments.accept_loss}, attachment=content)
    _show(arguments, done, [f"restored as version {done['version']}: {_labels(done['labels'])}"])
    return 0


def _tell(
    arguments: argparse.Namespace, verb: str, table: dict[str, Any], *, attachment: bytes | None = None
) -> dict[str, Any]:
    """Have the agent obey a command, or do it here where none runs."""
    from device.ask import ask
    from device.lock import lock_owner

    root, config, board = _setup(arguments)
    owner = lock_owner(root)
    if owner and owner.purpose == "run":
        return ask(root, owner.pid, verb, table, attachment=attachment)
    from device.hand import obey_here

    with _lock(root, verb):
        return obey_here(root, config, board, verb, table, attachment=attachment)


def _status(arguments: argparse.Namespace) -> int:
    from device.contract.records import to_table
    from device.lock import lock_owner
    from device.slots import NAMES, Slots
    from device.verbs import serving_table

    root = _root(arguments)
    slots, owner = Slots(root), lock_owner(root)
    agent_pid = owner.pid if owner and owner.purpose == "run" else None
    answer = _agent_json(root, agent_pid)
    # only a running agent can answer for the modules that it has loaded
    table: dict[str, Any] = {"running": agent_pid is not None, "pid": agent_pid, "modules_ok": None, "modules": None}
    table |= answer | serving_table(slots)
    table["slots"] = {slot: to_table(slots.state(slot)) for slot in NAMES}
    lines = [f"agent: {'not running' if agent_pid is None else f'running, process {agent_pid}'}"]
    lines += [_slot_line(entry, is_served=entry["slot"] == table.get("slot")) for entry in table["slots"].values()]
    if table.get("slot") is None:
        lines.append("no model is served; 'fieldvit-device update' installs what the channel offers")
    if answer:
        lines.append(f"labels: {', '.join(table.get('labels', []))}; learned version {table.get('learned_version')}")
        lines.append(f"taught here: {', '.join(table.get('taught', [])) or 'nothing'}")
        lines.append(
            f"frames: {table.get('frames')}, errors {table.get('errors')}, messages waiting {table.get('spool_depth')}"
        )
        lines.append(_source_line(table))
        lines.append(f"broker: {'connected' if table.get('connected') else 'not connected'}")
        lines.append(f"runtime: {table.get('runtime')} on {table.get('delegate') or 'no model'}")
        if table.get("delegate_problem"):
            lines.append(f"delegate: {table['delegate_problem']}")
        lines.append(
            f"modules: {'ok' if table.get('modules_ok') else 'FORBIDDEN'}: {', '.join(table.get('modules', []))}"
        )
    if arguments.history:
        table["history"] = [to_table(entry) for entry in slots.history()]
        lines += [_history_line(entry) for entry in table["history"]]
    _show(arguments, table, lines)
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    from device.config import resolve_runtime
    from device.serving import Serving
    from device.slots import Slots
    from device.verbs import serving_table

    root, config, board = _setup(arguments)
    with _lock(root, "rollback"):
        slots = Slots(root)
        _recover(slots)
        serving = Serving(slots, resolve_runtime(board, config.runtime))
        serving.start()
        serving.rollback()
        table = serving_table(slots)
    _show(
        arguments, table, [f"back to {table['name']} {table['version']} {table['precision']} in slot {table['slot']}"]
    )
    return 0


def _infer(arguments: argparse.Namespace) -> int:
    from device.infer import infer_files

    root, config, board = _setup(arguments)
    table = infer_files(root, config, board, arguments.frames, precision=arguments.precision)
    lines = [f"{result['frame_id']}\t{result['label']}\t{result['confidence']:.4f}" for result in table["results"]]
    _show(arguments, table, lines)
    return 0


def _selftest(arguments: argparse.Namespace) -> int:
    from device.config import resolve_runtime
    from device.contract.errors import ArtifactError
    from device.contract.records import to_table
    from device.selftest import report_lines, run_in_child
    from device.slots import Slots

    root, config, board = _setup(arguments)
    slots = Slots(root)
    entry = slots.serving()
    if entry is None:
        raise ArtifactError(f"{root}: no model is installed; run 'fieldvit-device update'")
    runtime = resolve_runtime(board, config.runtime)
    test = run_in_child(
        slots.directory(entry.slot), entry.precision, threads=runtime.threads, delegate=runtime.delegate
    )
    _show(arguments, to_table(test), report_lines(test))
    return 0


def _set_up(arguments: argparse.Namespace) -> int:
    from device.contract.records import to_table
    from device.setup import Wishes, set_up

    names = ("site", "device", "board", "channel", "broker", "unit_directory", "user", "camera")
    wishes = Wishes(**{name: getattr(arguments, name) for name in names}, token=_token(arguments.token))
    root = Path(os.path.abspath(arguments.root))
    steps = set_up(root, wishes, enrol=_enrol, is_dry_run=arguments.dry_run)
    lines = [f"{step.done}: {step.what}" + (f"\n    next: {step.todo}" if step.todo else "") for step in steps]
    _show(arguments, {"dry_run": arguments.dry_run, "steps": to_table(steps)}, lines)
    return 0


def _token(text: str) -> str:
    """A token from standard input with `-`: what stands on the command line, every user of the board can read."""
    return sys.stdin.readline().strip() if text == "-" else text


def _enrol(root: Path, device: Any, token: str) -> dict[str, Any]:
    from device.identity import enrol

    return enrol(root, device, token).broker_table()


def _doctor(arguments: argparse.Namespace) -> int:
    from device.contract.records import to_table
    from device.doctor import examine

    findings = []
    for finding in examine(arguments.root):
        findings.append(finding)
        if not arguments.json:
            advice = "" if finding.ok else f"\n        -> {finding.advice}"
            print(f"{'ok' if finding.ok else 'WRONG':6s} {finding.check}: {finding.text}{advice}", flush=True)
    if arguments.json:
        print(json.dumps({"ok": all(f.ok for f in findings), "findings": to_table(findings)}, indent=1))
    return 0 if all(finding.ok for finding in findings) else NOT_WELL


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command, as the verbs themselves do."""

    _is_intermixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Take options among a verb's words too: plain argparse refuses the files in `learn ripe --root DIR photos/`."""
        if self._is_intermixing or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._is_intermixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_intermixing = False

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see '{self.prog} --help'\n")


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for a command line: with the verb that it begins with, or else with all of them."""
    parser = _Parser(
        prog="fieldvit-device", description="The FieldViT agent: serve, teach and update a vision model on this board."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for name in words[:1] if words and words[0] in _VERBS else _VERBS:  # all take as long as a frame
        _VERBS[name](verbs)
    return parser


def _add_run(verbs: Any) -> None:
    _add(verbs, "run", _run, "serve until stopped", "fieldvit-device run --root /var/lib/fieldvit", json_flag=False)


def _add_update(verbs: Any) -> None:
    example = "fieldvit-device update --from dir:/media/usb/updates"
    update = _add(verbs, "update", _update, "install what the channel offers; a running agent is asked to", example)
    update.add_argument(
        "--from",
        dest="source",
        metavar="SOURCE",
        help="look here instead of update.source in agent.toml: dir:PATH, or http(s)://HOST/PATH",
    )
    update.add_argument("--force", action="store_true", help="try a bundle again that was rejected here before")
    update.add_argument("--accept-loss", action="store_true", help="also where it does not know a class taught here")
    update.add_argument(
        "--dry-run", action="store_true", help="install nothing; say what is offered, and which taught classes it keeps"
    )


def _add_status(verbs: Any) -> None:
    status = _add(verbs, "status", _status, "what is served, and how it goes", "fieldvit-device status --json")
    status.add_argument("--history", action="store_true", help="every state the slots went through, with reasons")


def _add_rollback(verbs: Any) -> None:
    _add(verbs, "rollback", _rollback, "go back to the model before, for good", "fieldvit-device rollback")


def _add_infer(verbs: Any) -> None:
    infer = _add(verbs, "infer", _infer, "classify files", "fieldvit-device infer photo.png frames/ --json")
    infer.add_argument(
        "frames", nargs="+", type=Path, metavar="FRAME_OR_DIR", help="image files, or directories of them"
    )
    infer.add_argument("--precision", default="", help="another artifact of the bundle than the one served")


def _add_selftest(verbs: Any) -> None:
    text = "prove the served model again, in a child process"
    _add(verbs, "selftest", _selftest, text, "fieldvit-device selftest --json")


def _add_doctor(verbs: Any) -> None:
    text = "what is wrong with this board, and what to do"
    _add(verbs, "doctor", _doctor, text, "fieldvit-device doctor --root /var/lib/fieldvit")


def _add_learn(verbs: Any) -> None:
    learn = _add(verbs, "learn", _learn, "teach a class by hand", "fieldvit-device learn ripe photos/ripe/")
    learn.add_argument("label", metavar="LABEL", help="of all these frames; a class it knows, or a new one")
    learn.add_argument(
        "frames", nargs="*", type=Path, metavar="FRAME_OR_DIR", help="image files, or directories of them"
    )
    learn.add_argument(
        "--id",
        dest="frame_ids",
        metavar="FRAME_ID",
        action="append",
        default=[],
        help="a frame that the running agent has just seen; repeatable",
    )


def _add_undo(verbs: Any) -> None:
    undo = _add(verbs, "undo", _undo, "take a lesson back", "fieldvit-device undo")
    undo.add_argument(
        "lesson", nargs="?", metavar="LESSON", help="its id, as 'learned list' shows it; without it, the last one"
    )


def _add_learned(verbs: Any) -> None:
    learned = _add(
        verbs,
        "learned",
        _learned,
        "list, back up or restore what was taught",
        "fieldvit-device learned export backup.learned",
    )
    learned.add_argument("action", choices=("list", "export", "import"), help="what to do")
    learned.add_argument("file", nargs="?", type=Path, metavar="FILE", help="the backup to write or to read")
    learned.add_argument(
        "--accept-loss", action="store_true", help="import also where it does not know a class taught since"
    )


def _add_set_up(verbs: Any) -> None:
    from device.setup import SYSTEM_UNITS

    example = "fieldvit-device setup --site greenhouse --device cam-1 --board raspberry-pi-5 --token -"
    setup = _add(verbs, "setup", _set_up, "set this board up: configuration, certificate, service", example)
    setup.add_argument("--site", required=True, help="where the board is: fieldvit/v1/SITE/DEVICE/...")
    setup.add_argument("--device", required=True, help="its name there")
    setup.add_argument("--board", default="generic-x86-64", help="its profile (default %(default)s)")
    setup.add_argument("--channel", default="stable", help="which bundle it follows (default %(default)s)")
    setup.add_argument("--token", default="", help="of 'fieldvit fleet token'; - reads it from standard input")
    setup.add_argument("--broker", default="", metavar="mqtt[s]://HOST[:PORT]", help="needless with a token")
    setup.add_argument("--user", default="", help="whom the service runs as; by default systemd makes one")
    setup.add_argument(
        "--camera", default="", metavar="/dev/video0|csi", help="where frames come from, instead of ROOT/frames"
    )
    setup.add_argument(
        "--unit-dir",
        dest="unit_directory",
        type=Path,
        default=SYSTEM_UNITS,
        metavar="DIR",
        help="systemd's directory (default %(default)s); where it cannot be written, the unit goes into --root",
    )
    setup.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")


_VERBS: Mapping[str, Callable[[Any], None]] = {
    "run": _add_run,
    "update": _add_update,
    "status": _add_status,
    "rollback": _add_rollback,
    "learn": _add_learn,
    "undo": _add_undo,
    "learned": _add_learned,
    "infer": _add_infer,
    "selftest": _add_selftest,
    "setup": _add_set_up,
    "doctor": _add_doctor,
}


def _add(
    verbs: Any, name: str, verb: Verb, text: str, example: str, *, json_flag: bool = True
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text, epilog=f"example: {example}")
    parser.add_argument(
        "--root", type=Path, default=DEFAULT_ROOT, metavar="DIR", help=f"data directory (default {DEFAULT_ROOT})"
    )
    if json_flag:
        parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(verb=verb)
    return parser


def _setup(arguments: argparse.Namespace) -> tuple[Path, Any, Any]:
    from device.config import load_config
    from device.contract.board import load_board

    root = _root(arguments)
    config = load_config(root)
    return root, config, load_board(config.board)


def _root(arguments: argparse.Namespace) -> Path:
    from device.contract.errors import ConfigError

    root: Path = arguments.root
    if not root.is_dir():
        raise ConfigError(f"{root}: is not a directory; create it, or pass --root DIR")
    return root.resolve()


@contextlib.contextmanager
def _lock(root: Path, purpose: str) -> Iterator[None]:
    """Hold the data directory; what root writes into it belongs to its owner afterwards, or the agent could not replace it."""
    from device.lock import agent_lock

    with agent_lock(root, purpose):
        try:
            yield
        finally:
            owner = root.stat()
            if os.geteuid() == 0 and owner.st_uid != 0:
                for path in root.rglob("*"):
                    os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _recover(slots: Any) -> None:
    for line in slots.recover(is_start=False):
        logging.getLogger(__name__).warning("recovered: %s", line)


@contextlib.contextmanager
def _recovering_from_interrupt(slots: Any) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        _recover(type(slots)(slots.root))  # read again: it may have come between a line's writing and its being noted
        raise


def _agent_json(root: Path, agent_pid: int | None) -> dict[str, Any]:
    """What the running agent wrote about itself; what an agent before it wrote does not count."""
    try:
        table = json.loads((root / "agent.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) and agent_pid is not None and table.get("pid") == agent_pid else {}


def _show(arguments: argparse.Namespace, table: dict[str, Any], lines: list[str]) -> None:
    print(json.dumps(table, indent=1) if arguments.json else "\n".join(lines))


def _labels(labels: list[str]) -> str:
    return ", ".join(labels) or "no classes"


def _slot_line(entry: dict[str, Any], *, is_served: bool) -> str:
    model = f" {entry['name']} {entry['version']} {entry['precision']}".rstrip() if entry["name"] else ""
    reason = f" ({entry['reason']})" if entry["reason"] else ""
    return f"slot {entry['slot']}: {entry['state']}{reason}{model}{', served' if is_served else ''}"


def _source_line(table: dict[str, Any]) -> str:
    bad = ", ".join(f"{count} {reason}" for reason, count in sorted((table.get("bad_frames") or {}).items())) or "none"
    line = f"source: {table.get('source')}; bad frames: {bad}; dropped for newer ones: {table.get('frames_dropped')}"
    return line + (f"; PROBLEM: {table['source_problem']}" if table.get("source_problem") else "")


def _history_line(entry: dict[str, Any]) -> str:
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry["time"]))
    detail = f": {entry['detail']}" if entry["detail"] else ""
    return f"{entry['number']:5d} {moment} {_slot_line(entry, is_served=False)}{detail}"


if __name__ == "__main__":
    sys.exit(main())
