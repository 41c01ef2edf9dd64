"""What `flash --to ssh:` and `bench --on ssh:` do on the board. Sent there as text for `python3 -c`: standard library only, imports nothing of ours.

    python3 -c TEXT VERB JSON      the answer is the last line of standard output, as JSON

Everything lies under the board's data directory:

    incoming/SHA256.partial    what a cut left of a file, gone on with by the next call; renamed when its hash is right
    runtime/ID/                one virtual environment; `.complete` in it is written last, without it it is made anew
    runtime/current            link to the one that is used, moved by one rename after the new one has passed its test

Needs Python 3.11; an older one must still be able to run `look`, so that the message is clear.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

UNIT = "fieldvit-agent.service"  # as `fieldvit-device setup` writes it
PATIENCE_S = 30.0  # for an agent that ends, and for the word of one that systemd has seen start


def look(root, names, **_):
    """What is there: Python, runtime, hashes of the files in question, what waits in `incoming`."""
    incoming = os.path.join(root, "incoming")
    partials = {}
    if os.path.isdir(incoming):
        for name in os.listdir(incoming):
            partials[name] = os.path.getsize(os.path.join(incoming, name))
    link = os.path.join(root, "runtime", "current")
    texts = {}
    for name in ("agent.toml", "root.json"):
        if os.path.exists(os.path.join(root, name)):
            with open(os.path.join(root, name), encoding="utf-8") as file:
                texts[name] = file.read()
    existing = root
    while not os.path.isdir(existing):
        existing = os.path.dirname(existing)
    return {
        "python": list(sys.version_info[:3]),
        "machine": os.uname().machine,
        "runtime": os.readlink(link) if os.path.islink(link) else "",
        "incoming": partials,
        "texts": texts,
        "hashes": {name: sha256_of(os.path.join(root, name)) for name in names},
        "updates": sorted(files_below(os.path.join(root, "updates"))),
        "is_writable": os.access(existing, os.W_OK),
        "free_bytes": shutil.disk_usage(existing).free,
    }


def receive(root, sha256, size, offset, **_):
    """Append standard input to a partial file; a whole one with the right hash gets its name."""
    incoming = os.path.join(root, "incoming")
    os.makedirs(incoming, exist_ok=True)
    final = os.path.join(incoming, sha256)
    partial = final + ".partial"
    with open(partial, "ab") as file:
        lock(file)
        file.seek(0, os.SEEK_END)
        if file.tell() < offset:
            raise SystemExit("error: the board lost a part of the file; flash again")
        file.truncate(offset)
        file.seek(offset)
        while True:
            chunk = sys.stdin.buffer.read1(1 << 16)
            if not chunk:
                break
            file.write(chunk)
            file.flush()  # what has come is kept when the connection is cut
        os.fsync(file.fileno())
    if os.path.getsize(partial) < size:
        return {"is_whole": False}
    if sha256_of(partial) != sha256:
        os.remove(partial)
        raise SystemExit("error: the file arrived damaged and was removed; flash again")
    os.replace(partial, final)
    sync(incoming)
    return {"is_whole": True}


def place(root, files, expected, frames, **_):
    """Put received files where they belong: `updates` is exchanged as a whole, the others one by one.

    `files` are all names with their hashes; what is there already with that hash is kept.
    """
    updates = os.path.join(root, "updates")
    partial, old = updates + ".partial", updates + ".old"
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    is_changed = sorted(name for name in files if name.startswith("updates/")) != sorted(
        "updates/" + name for name in files_below(updates)
    )
    is_changed = is_changed or any(expected[name] != sha for name, sha in files.items() if name.startswith("updates/"))
    if is_changed:
        for name, sha in files.items():
            if name.startswith("updates/"):
                target = partial + name[len("updates") :]
                os.makedirs(os.path.dirname(target), exist_ok=True)
                is_kept = expected[name] == sha
                copy_synced(os.path.join(root, name) if is_kept else os.path.join(root, "incoming", sha), target)
        if os.path.exists(updates):
            os.replace(updates, old)
        os.replace(partial, updates)
        sync(root)
        shutil.rmtree(old, ignore_errors=True)
    for name, sha in files.items():
        if not name.startswith("updates/") and expected[name] != sha:
            is_changed = True
            copy_synced(os.path.join(root, "incoming", sha), os.path.join(root, name + ".tmp"))
            os.replace(os.path.join(root, name + ".tmp"), os.path.join(root, name))
            sync(root)
    os.makedirs(os.path.join(root, frames), exist_ok=True)
    return {"is_changed": is_changed}


def install(root, identity, wheel, constraints, wheels, pip_arguments, **_):
    """Make the environment of a runtime, test it, and point `current` at it; keep the one before."""
    runtime = os.path.join(root, "runtime")
    home, link = os.path.join(runtime, identity), os.path.join(runtime, "current")
    os.makedirs(runtime, exist_ok=True)
    program = os.path.join(home, "bin", "python")
    before = os.readlink(link) if os.path.islink(link) else ""
    if not os.path.exists(os.path.join(home, ".complete")):
        shutil.rmtree(home, ignore_errors=True)
        say("making an environment in " + home)
        run([sys.executable, "-m", "venv", home], "python3 -m venv failed; install python3-venv on the board")
        folder = os.path.join(root, "incoming", "wheels")
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        for name, sha in [*wheels.items(), wheel]:
            os.link(os.path.join(root, "incoming", sha), os.path.join(folder, name))
        command = [program, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--no-cache-dir", "-q"]
        command += ["-c", os.path.join(root, "incoming", constraints)]
        command += ["--no-index", "--find-links", folder] if wheels else []
        say("installing the runtime" + (" from the wheels that were sent" if wheels else ""))
        target = "fieldvit[device] @ file://" + os.path.join(folder, wheel[0]).replace(" ", "%20")
        run([*command, *pip_arguments, target], "pip could not install the runtime")
        shutil.rmtree(folder)
        with open(os.path.join(home, ".complete"), "w"):
            pass
        sync(home)
    say("testing the runtime")
    run([program, "-c", "import device.app"], "the new runtime cannot be loaded")
    if os.path.exists(os.path.join(root, "current")):
        run(
            [program, "-m", "device.cli", "selftest", "--root", root],
            "the model does not pass its test with the new runtime",
        )
    if before != identity:
        point(link, identity)
    for name in os.listdir(runtime):
        if name not in (identity, before, "current") and before != identity:
            shutil.rmtree(os.path.join(runtime, name), ignore_errors=True)
    return {"is_changed": before != identity}


def restart(root, **_):
    """Have an agent that runs from another of our runtimes go on with the current one, through its service if it has one.

    `agent` in the answer is "" (none runs, or nothing to do), "restarted", "stopped" (nobody starts it again), "kept" (it
    may not be restarted; `reason` says why) or "elsewhere" (it runs from an environment that is not ours). One that does
    not come up gets the runtime back from which it ran.
    """
    link = os.path.join(root, "runtime", "current")
    pid = agent_of(root)
    served = runtime_of(pid, root) if pid else os.readlink(link)
    if served in ("", os.readlink(link)):
        return {"agent": "" if served else "elsewhere"}
    if main_process(UNIT) != pid:
        return stop(root, pid)
    say("restarting " + UNIT)
    reason = restart_unit()
    if agent_of(root) == pid:
        return {"agent": "kept", "reason": reason}
    if wait(lambda: is_up(root, pid)):
        return {"agent": "restarted"}
    kept = os.path.isdir(os.path.join(root, "runtime", served))
    if kept:
        point(link, served)
        restart_unit()
    outcome = "it has the one before again" if kept else "the one before is gone"
    raise SystemExit(f"error: the agent does not start with the new runtime, {outcome}; see journalctl -u {UNIT}")


def stop(root, pid):
    """End an agent that no service would start again: the new runtime installs the bundle, and then somebody starts it."""
    say(f"stopping the agent, process {pid}")
    try:
        os.kill(pid, signal.SIGTERM)
    except PermissionError:
        return {"agent": "kept", "reason": f"process {pid} belongs to another user"}
    if wait(lambda: agent_of(root) != pid):
        return {"agent": "stopped"}
    return {"agent": "kept", "reason": f"process {pid} does not stop"}


def agent_of(root):
    """The process of the agent that runs on this data directory; 0 without one."""
    try:
        with open(os.path.join(root, "agent.lock"), encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = re.match(r"'fieldvit-device run' \(process (\d+)\)", file.read())
                return int(owner[1]) if owner else 0
    except FileNotFoundError:
        pass
    return 0


def is_up(root, old):
    """Whether another agent than the old one has said that it runs."""
    pid = agent_of(root)
    try:
        with open(os.path.join(root, "agent.json"), encoding="utf-8") as file:
            return pid not in (0, old) and json.load(file)["pid"] == pid
    except (OSError, ValueError, KeyError):
        return False


def runtime_of(pid, root):
    """The runtime from which a process has loaded its libraries; "" if it is none of ours."""
    prefix = os.path.realpath(os.path.join(root, "runtime")) + "/"
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
            paths = [line.rstrip("\n").partition("/")[2] for line in file]
    except OSError:
        return ""
    ours = [path for path in paths if ("/" + path).startswith(prefix)]
    return ours[0][len(prefix) - 1 :].partition("/")[0] if ours else ""


def main_process(unit):
    """The main process of a service; 0 where systemd does not run it."""
    try:
        done = subprocess.run(
            ["systemctl", "show", "--property=MainPID", "--value", unit], capture_output=True, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        return 0
    text = done.stdout.decode().strip()
    return int(text) if text.isdigit() else 0


def restart_unit():
    """Restart the service, by sudo where this user may not; returns why not."""
    for prefix in ([], ["sudo", "-n"]):
        try:
            done = subprocess.run(
                [*prefix, "systemctl", "--no-ask-password", "restart", UNIT],
                capture_output=True,
                stdin=subprocess.DEVNULL,
            )
        except FileNotFoundError:  # no sudo
            continue
        if done.returncode == 0:
            return ""
        reason = " ".join(done.stderr.decode(errors="replace").split())[-200:]
    return reason


def wait(is_true):
    """Wait until something is so; returns whether it is."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def point(link, identity):
    """Move a link by one rename."""
    temporary = link + ".tmp"
    if os.path.islink(temporary):
        os.remove(temporary)
    os.symlink(identity, temporary)
    os.replace(temporary, link)
    sync(os.path.dirname(link))


def update(root, **_):
    """Have the agent take the bundle: a running one is asked, else it is installed here and now."""
    shutil.rmtree(os.path.join(root, "incoming"), ignore_errors=True)
    program = os.path.join(root, "runtime", "current", "bin", "python")
    done = subprocess.run([program, "-m", "device.cli", "update", "--root", root, "--json"], capture_output=True)
    errors = done.stderr.decode(errors="replace").splitlines()
    lines = [line[len("error: ") :] for line in errors if line.startswith("error: ")]
    answer = {"code": done.returncode, "error": lines[-1] if lines else "\n".join(errors[-5:])}
    if done.returncode == 0:
        answer["model"] = json.loads(done.stdout)
    return answer


def bench(root, files, **_):
    """Measure with the runtime that is installed: `files` are names with hashes, gone again afterwards."""
    program = os.path.join(root, "runtime", "current", "bin", "python")
    if not os.path.exists(program):
        raise SystemExit("error: no runtime in " + root + "; flash a bundle there first, it brings the runtime")
    folder = tempfile.mkdtemp(prefix="bench-", dir=root)
    try:
        for name, sha in files.items():
            shutil.copyfile(os.path.join(root, "incoming", sha), os.path.join(folder, name))
        say("measuring")
        done = subprocess.run([program, os.path.join(folder, "bench.pyz"), folder], stdout=subprocess.PIPE)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for sha in files.values():
            remove(os.path.join(root, "incoming", sha))
    if done.returncode:
        raise SystemExit(1)
    return json.loads(done.stdout)


def give(root, **_):
    """What root wrote belongs to the directory's owner; the agent may have to replace it."""
    owner = os.stat(root)
    if os.geteuid() == 0 and owner.st_uid != 0:
        for folder, folders, files in os.walk(root):
            for name in [*folders, *files]:
                os.chown(os.path.join(folder, name), owner.st_uid, owner.st_gid, follow_symlinks=False)
    return {}


def lock(file):
    """Wait for the receiver of a transfer that was cut: it may not have noticed yet, and writes what it still has."""
    for _ in range(100):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.3)
        else:
            return
    raise SystemExit("error: the same file is being sent by somebody else; flash again when that is done")


def remove(path):
    if os.path.exists(path):
        os.remove(path)


def files_below(directory):
    for folder, _, files in os.walk(directory):
        for name in files:
            yield os.path.relpath(os.path.join(folder, name), directory)


def sha256_of(path):
    if not os.path.isfile(path):
        return ""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while True:
            chunk = file.read(1 << 20)
            if not chunk:
                return digest.hexdigest()
            digest.update(chunk)


def copy_synced(source, target):
    shutil.copyfile(source, target)
    with open(target, "rb+") as file:
        os.fsync(file.fileno())


def sync(directory):
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def say(text):
    print(text, file=sys.stderr, flush=True)


def run(command, complaint):
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        said = " ".join(done.stdout.decode(errors="replace").split())[-400:]
        raise SystemExit("error: " + complaint + ": " + said)


if __name__ == "__main__":
    VERBS = {verb.__name__: verb for verb in (look, receive, place, install, restart, update, bench, give)}
    try:
        print(json.dumps(VERBS[sys.argv[1]](**json.loads(sys.argv[2]))))
    except OSError as error:
        raise SystemExit("error: {}: {}".format(error.filename or "the board", error.strerror)) from error
