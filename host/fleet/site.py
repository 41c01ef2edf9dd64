"""A site: its authority, its broker's files, and who was let in. One directory, `SITES/SITE/`.

site.json            where broker and enrolment service are
site.sqlite          tokens (hashes only) and certificates, with what was used and revoked
ca.key, ca.pem       the authority; the key is the site: back it up, show it to nobody
broker/              all that mosquitto needs, and nothing else
identities/          monitor.pem and operator.pem: key and certificate for this machine's own connections

Every rule is decided here, in one transaction each; `enrolment.py` only carries requests.
"""

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import signal
import sqlite3
import tempfile
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import urlsplit

from device.contract.errors import DeviceError
from device.contract.files import write_atomic
from device.contract.records import from_table, to_table
from device.contract.topics import DeviceId
from host.errors import FleetError
from host.fleet.authority import (
    BROKER_DAYS,
    Authority,
    Issued,
    new_key,
    private_pem,
    public_digest,
    read_private,
    read_request,
    write_private,
)
from host.fleet.broker_files import HOME_ASSISTANT, MONITOR, OPERATOR, PID_FILE, access_rules, mosquitto_config

DEVICE_DAYS = 365.0
TOKEN_HOURS = 72.0
TOKEN_PREFIX = "fv1."
IDENTITIES = {"monitor": MONITOR, "operator": OPERATOR, "home-assistant": HOME_ASSISTANT}
_SCHEMA = """
CREATE TABLE IF NOT EXISTS token (hash TEXT PRIMARY KEY, device TEXT NOT NULL, expires REAL NOT NULL,
    key TEXT, certificate TEXT);               -- the key that it was used for, and what was given for it
CREATE TABLE IF NOT EXISTS certificate (serial TEXT PRIMARY KEY, name TEXT NOT NULL, starts REAL NOT NULL,
    expires REAL NOT NULL, revoked REAL);
CREATE INDEX IF NOT EXISTS certificate_by_name ON certificate (name);
"""

Clock = Callable[[], datetime]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSettings:
    """Where a site's broker and enrolment service are, and how long a device's certificate lives.

    `broker_files` is where the directory `broker/` will lie on the broker's machine; empty: where it is now.
    """

    site: str
    broker_hostname: str
    broker_port: int = 8883
    enrol_hostname: str = ""
    enrol_port: int = 8443
    device_days: float = DEVICE_DAYS
    broker_files: str = ""

    def __post_init__(self) -> None:
        DeviceId(self.site, "any")
        for name in ("broker_port", "enrol_port"):
            if not 1 <= getattr(self, name) <= 65535:
                raise FleetError(f"site: {name} must be 1..65535, got {getattr(self, name)}")
        for hostname in (self.broker_hostname, self.enrol_hostname or self.broker_hostname):
            if not _is_hostname(hostname):
                raise FleetError(f"site: {hostname!r} is no host name; name the machine as the boards reach it")
        if not 0 < self.device_days <= 3650:
            raise FleetError(
                f"site: device certificates may live for more than 0 and up to 3650 days, got {self.device_days:g}"
            )

    @property
    def enrol_url(self) -> str:
        return f"https://{_bracket(self.enrol_hostname or self.broker_hostname)}:{self.enrol_port}"

    @property
    def hostnames(self) -> list[str]:
        return list(dict.fromkeys([self.broker_hostname, self.enrol_hostname or self.broker_hostname]))


class Site:
    """One site's directory, opened."""

    def __init__(self, directory: Path, *, clock: Clock = lambda: datetime.now(UTC)) -> None:
        """Open what `create_site` made; FleetError if there is none."""
        self.directory, self._clock = directory, clock
        path = directory / "site.json"
        try:
            table = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            reason = "no such site" if missing else str(error)
            raise FleetError(
                f"{path}: {reason}; make it with 'fieldvit fleet init SITE', or name the directory where it is"
            ) from error
        self.settings: SiteSettings = from_table(SiteSettings, table, where=str(path), error=FleetError)
        self._authority = Authority.load(directory)

    @property
    def name(self) -> str:
        return self.settings.site

    @property
    def authority_pem(self) -> str:
        return self._authority.pem

    def make_token(self, device: str, *, hours: float = TOKEN_HOURS) -> str:
        """A one-time token for one device; only its hash is kept, and one that the device had before is void.

        Raises:
            FleetError: the device's id is malformed, or `hours` is out of range.
        """
        _require_device(self.name, device)
        if not 0 < hours <= 24 * 366:
            raise FleetError(f"token: it may live for more than 0 and up to 8784 hours, a year, got {hours:g}")
        secret = secrets.token_urlsafe(18)
        expires = self._clock() + timedelta(hours=hours)
        with self._transaction() as db:
            db.execute("DELETE FROM token WHERE device = ? AND key IS NULL", (device,))
            db.execute("DELETE FROM token WHERE expires < ?", (self._clock().timestamp(),))
            row = (_hash(secret), device, expires.timestamp())
            db.execute("INSERT INTO token (hash, device, expires) VALUES (?, ?, ?)", row)
        return encode_token(self.settings.enrol_url, self._authority.fingerprint, secret)

    def enrol(self, device: str, secret: str, request: str) -> dict[str, Any]:
        """Trade a token for a certificate. The same token and key get the same answer again: the first may be lost.

        Raises:
            FleetError: the token is unknown, used for another key, expired or another device's; or a bad request.
        """
        _require_device(self.name, device)
        public_key = read_request(request)
        digest, hashed = public_digest(public_key), _hash(secret)
        with self._transaction() as db:
            row = db.execute("SELECT device, expires, key, certificate FROM token WHERE hash = ?", (hashed,)).fetchone()
            if row is None or not hmac.compare_digest(row[0], device):
                raise FleetError(
                    f"{self.name}/{device}: the token is not known here; make one with 'fieldvit fleet token'"
                )
            if row[1] <= self._clock().timestamp():
                raise FleetError(
                    f"{self.name}/{device}: the token has expired; make another with 'fieldvit fleet token'"
                )
            if row[2] is not None:
                if row[2] != digest:
                    raise FleetError(f"{self.name}/{device}: the token was used already; make another")
                return json.loads(row[3])  # type: ignore[no-any-return]
            answer = self._answer(self._issue(db, public_key, device, days=self.settings.device_days))
            query = "UPDATE token SET key = ?, certificate = ? WHERE hash = ?"
            db.execute(query, (digest, json.dumps(answer), hashed))
            was_known = db.execute("SELECT count(*) FROM certificate WHERE name = ?", (device,)).fetchone()[0] > 1
        if was_known:  # it may have been shut out
            self.write_broker_rules()
            self.reload_broker()
        return answer

    def renew(self, serial: str, device: str, request: str) -> dict[str, Any]:
        """A new certificate for who proved, by TLS, to hold the valid one of this serial number (hex) and name.

        Raises:
            FleetError: that certificate is not this site's, or was revoked; or a bad request.
        """
        _require_device(self.name, device)
        public_key = read_request(request)
        with self._transaction() as db:
            row = db.execute("SELECT name, revoked FROM certificate WHERE serial = ?", (_plain(serial),)).fetchone()
            if row is None or row[0] != device:
                raise FleetError(f"{self.name}/{device}: this certificate was not issued here; enrol with a token")
            if row[1] is not None:
                raise FleetError(f"{self.name}/{device}: this certificate was revoked")
            return self._answer(self._issue(db, public_key, device, days=self.settings.device_days))

    def revoke(self, name: str) -> int:
        """Revoke all certificates and unused tokens of a device (or of `monitor`, `operator`); returns how many.

        The broker's files are written anew; it takes them at its next reload.

        Raises:
            FleetError: there is nothing to revoke.
        """
        name = IDENTITIES.get(name, name)
        now = self._clock().timestamp()
        with self._transaction() as db:
            tokens = db.execute("DELETE FROM token WHERE device = ? AND key IS NULL", (name,)).rowcount
            query = "UPDATE certificate SET revoked = ? WHERE name = ? AND revoked IS NULL"
            count = db.execute(query, (now, name)).rowcount
        if count + tokens == 0:
            raise FleetError(
                f"{self.name}/{name}: has no certificate or token to revoke; 'fieldvit fleet list' shows all"
            )
        self.write_broker_rules()
        return count

    def certificates(self) -> list[dict[str, Any]]:
        """All certificates, newest first: serial, name, starts, expires, revoked (Unix seconds)."""
        columns = ("serial", "name", "starts", "expires", "revoked")
        with self._transaction() as db:
            query = f"SELECT {', '.join(columns)} FROM certificate ORDER BY starts DESC, rowid DESC"
            return [dict(zip(columns, row, strict=True)) for row in db.execute(query)]

    @property
    def broker_certificate(self) -> Issued:
        """What the broker shows to who connects; FleetError if it is missing or damaged."""
        return Issued.read(self.directory / "broker" / "broker.pem")

    def renew_broker(self) -> Issued:
        """Give the broker a new certificate, for the site's names as they are now; it takes it at its next reload.

        It keeps its key: mosquitto reads two files, and two files cannot be exchanged at once.

        Raises:
            FleetError: the broker's key is missing or damaged.
        """
        broker = self.directory / "broker"
        public_key = read_private(broker / "broker.key").public_key()
        issued = self._authority.issue_server(
            public_key, self.name, self.settings.hostnames, days=BROKER_DAYS, now=self._clock()
        )
        write_atomic(broker / "broker.pem", issued.pem.encode())
        _give_to_owner(broker / "broker.pem")
        return issued

    def write_broker_rules(self) -> None:
        """Write `broker/crl.pem` and `broker/acl` from what is known. The revoked are shut out until enrolled anew."""
        with self._transaction() as db:
            revoked = db.execute("SELECT serial, revoked FROM certificate WHERE revoked IS NOT NULL").fetchall()
            names = "SELECT name FROM certificate GROUP BY name HAVING count(revoked) = count(*)"
            shut_out = [row[0] for row in db.execute(names)]
        serials = [(serial, datetime.fromtimestamp(moment, UTC)) for serial, moment in revoked]
        broker = self.directory / "broker"
        crl, rules = broker / "crl.pem", broker / "acl"
        write_atomic(crl, self._authority.revocation_list(serials, now=self._clock()))
        write_atomic(rules, access_rules(self.name, shut_out=shut_out).encode(), mode=0o600)
        _give_to_owner(crl, rules)

    def reload_broker(self) -> bool:
        """Have the site's mosquitto read its files again, if it runs here; else someone must do it there."""
        path = Path(self.settings.broker_files or self.directory / "broker", PID_FILE)
        try:
            number = int(path.read_text())
            if "mosquitto" not in Path(f"/proc/{number}/comm").read_text():
                return False
            os.kill(number, signal.SIGHUP)
        except (OSError, ValueError):
            return False
        return True

    def issue_identity(self, role: str) -> Path:
        """Make a new `identities/ROLE.pem`, key and certificate, for a connection from the host's side."""
        key = new_key()
        with self._transaction() as db:
            issued = self._issue(db, key.public_key(), IDENTITIES[role], days=BROKER_DAYS)
        path = self.directory / "identities" / f"{role}.pem"
        write_private(path, private_pem(key) + issued.pem.encode())
        return path

    def _issue(self, db: sqlite3.Connection, public_key: object, name: str, *, days: float) -> Issued:
        issued = self._authority.issue_client(public_key, self.name, name, days=days, now=self._clock())
        row = (issued.serial, name, issued.starts.timestamp(), issued.expires.timestamp())
        db.execute("INSERT INTO certificate (serial, name, starts, expires) VALUES (?, ?, ?, ?)", row)
        return issued

    def _answer(self, issued: Issued) -> dict[str, Any]:
        return {
            "certificate": issued.pem,
            "broker_hostname": self.settings.broker_hostname,
            "broker_port": self.settings.broker_port,
            "starts": issued.starts.timestamp(),
            "expires": issued.expires.timestamp(),
        }

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        path = self.directory / "site.sqlite"
        try:
            db = sqlite3.connect(path, isolation_level=None, timeout=10)
            try:
                db.execute("PRAGMA synchronous=FULL")
                db.executescript(_SCHEMA)
                db.execute("BEGIN IMMEDIATE")
                with db:
                    yield db
            finally:
                db.close()
        except sqlite3.Error as error:
            raise FleetError(
                f"{path}: cannot be used ({error}); restore it from your backup, or free disk space"
            ) from error


@contextmanager
def hold_identity(directory: Path, role: str) -> Iterator[None]:
    """Wait until no other process here uses a site's identity: a broker lets each connect once, and ends the one before."""
    try:
        with (directory / "identities" / f"{role}.pem").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except FileNotFoundError as error:
        raise FleetError(f"{error.filename}: is missing; restore it from your backup") from error


def create_site(directory: Path, settings: SiteSettings) -> Site:
    """Make a site's directory, whole or not at all.

    Raises:
        FleetError: it is there already.
    """
    if directory.exists() and any(directory.iterdir()):
        raise FleetError(f"{directory}: is there already; a site's authority is made once, choose another name")
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))  # mode 0700
    try:
        _fill_site(partial, settings, PurePath(settings.broker_files or directory.absolute() / "broker"))
        os.replace(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Site(directory)


def _fill_site(directory: Path, settings: SiteSettings, broker_files: PurePath) -> None:
    authority = Authority.create(directory, settings.site)
    write_atomic(directory / "site.json", json.dumps(to_table(settings), indent=1).encode() + b"\n")
    (directory / "site.sqlite").touch(mode=0o600)  # for its owner, also where others may enter the directory
    site = Site(directory)
    for role in IDENTITIES:
        site.issue_identity(role)
    broker = directory / "broker"
    _write_server(authority, broker, settings)
    site.write_broker_rules()
    (broker / "sessions").mkdir()
    write_atomic(broker / "ca.pem", authority.pem.encode())
    write_atomic(broker / "mosquitto.conf", mosquitto_config(broker_files, port=settings.broker_port).encode())


def _give_to_owner(*paths: Path) -> None:
    """New files belong to the owner of their directory, where root gave that to mosquitto."""
    for path in paths:
        owner = path.parent.stat()
        with contextlib.suppress(PermissionError):
            os.chown(path, owner.st_uid, owner.st_gid)


def _write_server(authority: Authority, broker: Path, settings: SiteSettings) -> None:
    key = new_key()
    issued = authority.issue_server(
        key.public_key(), settings.site, settings.hostnames, days=BROKER_DAYS, now=datetime.now(UTC)
    )
    write_private(broker / "broker.key", private_pem(key))
    write_atomic(broker / "broker.pem", issued.pem.encode())


def encode_token(url: str, authority: str, secret: str) -> str:
    """What a device is given; `device/identity.py` reads it."""
    text = json.dumps([url, authority, secret], separators=(",", ":"))
    return TOKEN_PREFIX + urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _require_device(site: str, device: str) -> None:
    try:
        DeviceId(site, device)
    except DeviceError as error:
        raise FleetError(str(error)) from error


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _plain(serial: str) -> str:
    """A serial number as `Issued` writes it: OpenSSL writes capitals and leading zeros."""
    return serial.lower().lstrip("0")


def _is_hostname(text: str) -> bool:
    """Whether a URL can name it: letters, digits, '.', '-' and '_', or an address."""
    is_plain = re.fullmatch(r"[\w.:-]+", text) is not None
    return is_plain and urlsplit(f"https://{_bracket(text)}:1").hostname == text.lower()


def _bracket(hostname: str) -> str:
    return f"[{hostname}]" if ":" in hostname else hostname


def site_directory(sites: Path, site: str) -> Path:
    """Where a site lies; FleetError for a malformed name."""
    _require_device(site, "any")
    return sites / site
