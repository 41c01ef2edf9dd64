"""`fieldvit publish`: the keeper of the update repository. Without a verb of its own it adds a bundle."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from host.errors import FleetError
from host.table import print_table

PASSPHRASE = "FIELDVIT_KEY_PASSPHRASE"  # the variable's name, no secret
SOON_DAYS = 14
_ROLES = ("timestamp", "snapshot", "targets", "root")


class _AddByDefault(typer.core.TyperGroup):
    """`publish BUNDLE` is `publish add BUNDLE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["add", *args]
        return super().parse_args(ctx, args)


publish_app = typer.Typer(
    cls=_AddByDefault,
    help="Keep the signed update repository: add bundles, sign, rotate keys, see what expires, prune.",
    epilog="Example: fieldvit publish runs/mine/export/mine-0.1.0.fieldvit --channel stable",
    no_args_is_help=True,
)

RepoOption = Annotated[Path, typer.Option("--repo", help="The update repository.")]
KeysOption = Annotated[Path, typer.Option("--keys", help="The directory of its signing keys. Keep them secret.")]
RootKeyOption = Annotated[
    list[Path] | None,
    typer.Option("--root-key", help="A root key's file, for example on a stick; repeatable.", show_default=False),
]
PassphraseOption = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        help=f"Its first line encrypts new keys and opens encrypted ones; or set {PASSPHRASE}.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]
RoleArgument = Annotated[str, typer.Argument(help=f"One of {', '.join(_ROLES)}.", show_default=False)]
REPO, KEYS = Path("updates"), Path("keys")


@publish_app.command(epilog="Example: fieldvit publish init --repo updates --keys keys --root-keys-to /media/safe/keys")
def init(
    repo: RepoOption = REPO,
    keys: KeysOption = KEYS,
    root_keys_to: Annotated[
        Path | None,
        typer.Option(help="Another directory for the root keys, for example on a stick.", show_default=False),
    ] = None,
    root_keys: Annotated[int, typer.Option(min=1, help="How many root keys there are.")] = 3,
    root_threshold: Annotated[int, typer.Option(min=1, help="How many of them must sign.")] = 2,
    passphrase_file: PassphraseOption = None,
) -> None:
    """Make an empty repository and its keys. Boards are given its first root metadata, once."""
    from host.fleet.repository import UpdateRepository

    UpdateRepository.create(
        repo,
        keys,
        root_directory=root_keys_to,
        root_keys=root_keys,
        root_threshold=root_threshold,
        passphrase=read_passphrase(passphrase_file),
    )
    print(f"{repo} is a repository; {root_threshold} of {root_keys} root keys replace any key")
    print(f"move root-*.pem out of {root_keys_to or keys} to places of their own; publishing does not need them")


@publish_app.command(epilog="Example: fieldvit publish add runs/mine/export/mine-0.1.0.fieldvit --channel stable")
def add(
    bundle: Annotated[Path, typer.Argument(help="A bundle, NAME-VERSION.fieldvit.", show_default=False)],
    channel: Annotated[str, typer.Option(help="The channel that will point at the bundle.")] = "stable",
    repo: RepoOption = REPO,
    keys: KeysOption = KEYS,
    passphrase_file: PassphraseOption = None,
) -> None:
    """Sign a bundle into the repository, which is made if it is not there, and point a channel at it."""
    from host.fleet.repository import publish_bundle

    passphrase = read_passphrase(passphrase_file)
    manifest = publish_bundle(bundle, channel, directory=repo, keys=keys, passphrase=passphrase)
    print(f"{manifest.name} {manifest.version} (release {manifest.release}) is signed into {repo}, channel {channel}")


@publish_app.command(epilog="Example: fieldvit publish sign root --root-key /media/usb/root-1.pem")
def sign(
    roles: Annotated[
        list[str] | None,
        typer.Argument(help="timestamp (when none is given), snapshot, targets, root.", show_default=False),
    ] = None,
    root_key: RootKeyOption = None,
    repo: RepoOption = REPO,
    keys: KeysOption = KEYS,
    passphrase_file: PassphraseOption = None,
) -> None:
    """Renew metadata for another lifetime. 'root' collects signatures, over several calls, until they are enough."""
    from host.fleet.keys import ONLINE_ROLES
    from host.fleet.repository import UpdateRepository
    from host.fleet.root import RootChange

    asked = roles or (["root"] if root_key else ["timestamp"])
    for role in asked:
        _require_role(role)
    passphrase = read_passphrase(passphrase_file)
    online = [role for role in asked if role != "root"]
    places = [keys, *(root_key or [])] if online or keys.exists() else root_key or []  # a root key signs anywhere
    needed = ONLINE_ROLES if online else ()
    repository = UpdateRepository.open(repo, places, roles=needed, passphrase=passphrase)
    if online:
        print(f"signed anew: {', '.join(repository.renew(online))}")
    if "root" in asked:
        with repository.locked():
            change = RootChange(repo)
            if change.new is None:
                change.propose(change.begin())
            _sign_root(change, repository.keys)


@publish_app.command(epilog="Example: fieldvit publish rotate timestamp --root-key /media/a/root-1.pem")
def rotate(
    role: RoleArgument,
    replace: Annotated[
        str, typer.Option(help="The first digits of the old key's id; needed where a role has several keys.")
    ] = "",
    new_key_to: Annotated[
        Path | None, typer.Option(help="The directory for the new key, if not --keys.", show_default=False)
    ] = None,
    root_key: RootKeyOption = None,
    repo: RepoOption = REPO,
    keys: KeysOption = KEYS,
    passphrase_file: PassphraseOption = None,
) -> None:
    """Replace a key by a new one, through a new root version. Boards follow it; the old key is worth nothing then."""
    from host.fleet.keys import add_key
    from host.fleet.repository import UpdateRepository
    from host.fleet.root import RootChange

    _require_role(role)
    passphrase = read_passphrase(passphrase_file)
    repository = UpdateRepository.open(repo, [keys, *(root_key or [])], passphrase=passphrase)
    with repository.locked():
        change = RootChange(repo)
        root = change.begin()
        old = _key_to_replace(root.roles[role].keyids, replace, role)
        path, signer = add_key(new_key_to or keys, role, passphrase=passphrase)
        root.revoke_key(old, role)
        root.add_key(signer.public_key, role)
        change.propose(root)
        print(f"{path} takes the place of the {role} key {old[:8]}")
        _sign_root(change, repository.keys | {signer.public_key.keyid: signer})


@publish_app.command(epilog="Example: fieldvit publish expire --renew")
def expire(
    renew: Annotated[bool, typer.Option("--renew", help="Sign anew what runs out within --within days.")] = False,
    within: Annotated[int, typer.Option(min=0, help="Days ahead to look.")] = SOON_DAYS,
    repo: RepoOption = REPO,
    keys: KeysOption = KEYS,
    passphrase_file: PassphraseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what runs out when and who signs it; with --renew, from a timer, keep the repository alive."""
    from host.fleet.repository import UpdateRepository
    from host.fleet.root import RootChange
    from host.fleet.status import COLUMNS, ends_within, role_rows

    soon = ends_within(repo, within, now=datetime.now(UTC))
    if renew and (online := [role for role in soon if role != "root"]):
        passphrase = read_passphrase(passphrase_file)
        UpdateRepository.open(repo, [keys], passphrase=passphrase).renew(online)
    rows = role_rows(repo, now=datetime.now(UTC))
    waiting = RootChange(repo).missing()
    record = {"roles": [row._asdict() for row in rows], "pending_root": waiting}
    print_table(COLUMNS, [tuple(map(str, row)) for row in rows], record if as_json else None)
    if as_json:
        return
    if "root" in soon:
        print(
            "the root metadata ends soon: 'fieldvit publish sign root --root-key FILE', with keys enough of it, renews it"
        )
    for line in waiting:
        print(f"a new root waits: {line}; 'fieldvit publish sign root --root-key FILE' adds one")


@publish_app.command(epilog="Example: fieldvit publish prune --keep 2 --dry-run")
def prune(
    keep: Annotated[
        int, typer.Option(min=0, help="Releases to keep of each name, beside those channels point at.")
    ] = 2,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    repo: RepoOption = REPO,
    keys: KeysOption = KEYS,
    passphrase_file: PassphraseOption = None,
) -> None:
    """Remove bundles that no channel points at, metadata of long ago, and what interrupted calls have left."""
    from host.fleet.repository import UpdateRepository

    repository = UpdateRepository.open(repo, [keys], passphrase=read_passphrase(passphrase_file))
    gone = repository.prune(keep=keep, dry_run=dry_run)
    for name in gone:
        print(f"{'would remove' if dry_run else 'removed'} {name}")
    if not gone:
        print("every bundle is pointed at, or among those to keep")


def read_passphrase(path: Path | None) -> bytes | None:
    """The passphrase of the keys: a file's first line, else the environment's; FleetError where the file has none."""
    if path is None:
        return os.environ.get(PASSPHRASE, "").encode() or None
    lines = path.read_bytes().splitlines()
    if not lines or not lines[0]:
        raise FleetError(f"{path}: its first line is empty; write the passphrase there")
    return lines[0]


def _sign_root(change: Any, keys: Any) -> None:
    """Sign with what is at hand, and make it valid if that is enough."""
    for keyid in change.sign(keys):
        print(f"signed by root key {keyid[:8]}")
    if missing := change.missing():
        for line in missing:
            print(f"root {change.new.version} has {line}")
        print("add them with 'fieldvit publish sign root --root-key FILE'; until then boards see no change")
        return
    root = change.activate(keys)
    print(f"root {root.version} is valid until {root.expires:%Y-%m-%d}; keys that it does not name can be deleted")


def _key_to_replace(keyids: list[str], prefix: str, role: str) -> str:
    found = [keyid for keyid in keyids if keyid.startswith(prefix)]
    if len(found) != 1:
        shown = ", ".join(keyid[:8] for keyid in keyids)
        raise FleetError(f"--replace {prefix!r} names {len(found)} of the {role} keys; they are {shown}")
    return found[0]


def _require_role(role: str) -> None:
    if role not in _ROLES:
        raise FleetError(f"role {role!r} is unknown; it is one of {', '.join(_ROLES)}")
