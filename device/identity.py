"""Who this board is: its private key, made here and never sent, and the certificate that its site gives for it.

Everything lies in `ROOT/identity/`: `device.pem` (key and certificate in one file, so that one rename replaces both; mode
0600), `ca.pem` (the site's authority, the only one that the board trusts) and `enrolment.json` (where to renew, and when).
`enrol` trades a one-time token of `fieldvit fleet token` for the first certificate; `renew_if_due` asks for the next one
with the one at hand, with a new key, from half of its life on. A token holds the address of the site's enrolment service
and the SHA-256 of the authority's certificate, so nothing is trusted that was not named by whoever gave the token.

Why the `openssl` program: a board needs two things that Python's `ssl` does not do, a key and a certificate request, twice
a year. The package `cryptography` does them for 17 MB (with cffi and pycparser), which would use up what the 170 MB of the
device environment leave; `openssl` has 2 MB, and Debian's and Raspberry Pi OS's `ca-certificates` bring it. macOS has it too.
"""

import base64
import binascii
import hashlib
import http.client
import json
import logging
import re
import shutil
import ssl
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from device.contract.errors import EnrolmentError, MessageError
from device.contract.files import write_atomic
from device.contract.record import record
from device.contract.records import from_table, to_table
from device.contract.topics import DeviceId

DIRECTORY = "identity"
CERTIFICATE, AUTHORITY, RECORD = "device.pem", "ca.pem", "enrolment.json"
_PENDING_KEY = "pending.key"
_USED_TOKEN = "token.sha256"
TOKEN_PREFIX = "fv1."
TIMEOUT_S = 20.0
MAX_ANSWER_BYTES = 64 << 10
_PEM_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----\s*")

log = logging.getLogger(__name__)


@record(frozen=True, slots=True, kw_only=True)
class Token:
    """What `fieldvit fleet token` gives: the service's address, the authority's SHA-256 in hex, and a secret."""

    url: str
    authority: str
    secret: str


@record(frozen=True, slots=True, kw_only=True)
class Enrolment:
    """What a board knows of its certificate; times are Unix seconds."""

    site: str
    device: str
    url: str
    authority: str
    broker_hostname: str
    broker_port: int
    starts: float
    expires: float

    @property
    def renew_after(self) -> float:
        return (self.starts + self.expires) / 2

    def broker_table(self) -> dict[str, Any]:
        """The `[broker]` table of `agent.toml`; its paths start at the data directory."""
        return {
            "hostname": self.broker_hostname,
            "port": self.broker_port,
            "ca_file": f"{DIRECTORY}/{AUTHORITY}",
            "cert_file": f"{DIRECTORY}/{CERTIFICATE}",
        }


def decode_token(text: str) -> Token:
    """Read a token; EnrolmentError does not repeat it, it is a secret."""
    body = text.strip().removeprefix(TOKEN_PREFIX)
    try:
        parts = json.loads(base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True))
        url, authority, secret = (str(part) for part in parts)
        token = Token(url=url, authority=authority, secret=secret)
        is_good = text.strip().startswith(TOKEN_PREFIX) and re.fullmatch("[0-9a-f]{64}", authority) is not None
        is_good = is_good and bool(_address(url).hostname)
    except (ValueError, TypeError, binascii.Error, RecursionError):
        is_good = False
    if not is_good:
        raise EnrolmentError("the token cannot be read; copy all of what 'fieldvit fleet token' printed")
    return token


def enrol(root: Path, device: DeviceId, token: str) -> Enrolment:
    """Get this board's first certificate; it replaces one that is there. A lost answer may be asked for again.

    With the token that brought the certificate at hand, that one stays.

    Args:
        root: the data directory; `ROOT/identity` is written, whole or not at all.
        device: who the token was made for.
        token: as `fieldvit fleet token` printed it.

    Raises:
        EnrolmentError: the token is damaged, used, expired or another board's, the service cannot be reached or is not
            the one that the token names, or there is no `openssl`.
    """
    known = decode_token(token)
    directory = root / DIRECTORY
    digest = hashlib.sha256(known.secret.encode()).hexdigest()
    if (present := _enrolled_with(root, device, digest)) is not None:
        log.info("enrolled as %s with this token before, until %s", device, _day(present.expires))
        return present
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority = _fetch_authority(known)
    key = _pending_key(directory)
    request = {"site": device.site, "device": device.device, "token": known.secret, "csr": _request(key, device)}
    answer = _ask(known.url, "/enrol", request, _client_context(authority))
    enrolment = _accept(directory, device, answer, key, authority, url=known.url)
    write_atomic(directory / _USED_TOKEN, digest.encode())
    log.info("enrolled as %s until %s", device, _day(enrolment.expires))
    return enrolment


def _enrolled_with(root: Path, device: DeviceId, digest: str) -> Enrolment | None:
    """What this board got for the same token before: a set-up may be repeated, a token is good for once."""
    directory = root / DIRECTORY
    try:
        is_same = (directory / _USED_TOKEN).read_text(encoding="ascii") == digest
    except (OSError, ValueError):
        return None
    present = read_enrolment(root) if is_same and (directory / CERTIFICATE).exists() else None
    return present if present and (present.site, present.device) == (device.site, device.device) else None


def renew_if_due(root: Path, *, clock: Callable[[], float] = time.time) -> Enrolment | None:
    """Replace the certificate from half of its life on; None where there is nothing to do, or nothing to do it with.

    Raises:
        EnrolmentError: it is due and could not be renewed; the one at hand stays.
    """
    enrolment = read_enrolment(root)
    if enrolment is None or clock() < enrolment.renew_after:
        return None
    return renew(root, enrolment)


def renew(root: Path, enrolment: Enrolment) -> Enrolment:
    """Replace key and certificate now; see `renew_if_due`."""
    directory = root / DIRECTORY
    device = DeviceId(enrolment.site, enrolment.device)
    authority = _read_authority(directory, enrolment.authority)
    key = _make_key()
    context = _client_context(authority)
    try:
        context.load_cert_chain(directory / CERTIFICATE)
    except (OSError, ssl.SSLError) as error:
        raise EnrolmentError(
            f"{directory / CERTIFICATE}: cannot be used ({error}); enrol again with a token"
        ) from error
    answer = _ask(enrolment.url, "/renew", {"csr": _request(key, device)}, context)
    renewed = _accept(directory, device, answer, key, authority, url=enrolment.url)
    log.info("certificate of %s renewed until %s", device, _day(renewed.expires))
    return renewed


def read_enrolment(root: Path) -> Enrolment | None:
    """What this board knows of its certificate; None if it was not enrolled.

    Raises:
        EnrolmentError: the record is damaged.
    """
    path = root / DIRECTORY / RECORD
    try:
        table = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise EnrolmentError(f"{path}: cannot be read ({error}); enrol again with a token") from error
    return from_table(Enrolment, table, where=str(path), error=EnrolmentError)


def certificate_end(path: Path) -> float:
    """When the certificate in a PEM file expires, in Unix seconds; EnrolmentError where that cannot be told."""
    line = _openssl("x509", "-in", str(path), "-noout", "-enddate").decode("ascii", "replace").strip()
    try:
        moment = datetime.strptime(line.removeprefix("notAfter="), "%b %d %H:%M:%S %Y GMT")
    except ValueError as error:
        raise EnrolmentError(f"{path}: openssl answered {line[:80]!r}, not when it expires") from error
    return moment.replace(tzinfo=UTC).timestamp()


def _accept(
    directory: Path, device: DeviceId, answer: dict[str, Any], key: bytes, authority: str, *, url: str
) -> Enrolment:
    """Check an answer and store what it brings. The record comes last: without it nothing is renewed, with it all is there."""
    certificate = answer.pop("certificate", None)
    if not isinstance(certificate, str) or not _PEM_CERTIFICATE.fullmatch(certificate):
        raise EnrolmentError(f"{url}: answered without a certificate; look at the service's log")
    known = {"site": device.site, "device": device.device, "url": url, "authority": _fingerprint(authority)}
    enrolment = from_table(Enrolment, answer | known, where=f"{url}: answer", error=EnrolmentError)
    _require_pair(key, certificate, authority, device, moment=enrolment.starts)
    write_atomic(directory / AUTHORITY, authority.encode())
    write_atomic(directory / CERTIFICATE, key + certificate.encode(), mode=0o600)
    write_atomic(directory / RECORD, json.dumps(to_table(enrolment), indent=1).encode())
    (directory / _PENDING_KEY).unlink(missing_ok=True)
    return enrolment


def _require_pair(key: bytes, certificate: str, authority: str, device: DeviceId, *, moment: float) -> None:
    """The certificate is the authority's, for this board and this key: else the board would cut itself off."""
    with tempfile.TemporaryDirectory() as scratch:  # mode 0700
        pair, issuer, leaf = (Path(scratch, name) for name in ("pair.pem", "ca.pem", "leaf.pem"))
        pair.write_bytes(key + certificate.encode())
        issuer.write_text(authority)
        leaf.write_text(certificate)
        try:
            _client_context(authority).load_cert_chain(pair)
        except ssl.SSLError as error:
            raise EnrolmentError(f"the certificate for {device} does not belong to its key; enrol again") from error
        _openssl("verify", "-attime", str(int(moment)), "-CAfile", str(issuer), str(leaf))
        subject = _openssl("x509", "-in", str(leaf), "-noout", "-subject").decode("utf-8", "replace")
    names = re.findall(r"CN\s*=\s*([^,/\n]+)", subject)
    if [name.strip() for name in names] != [device.device]:
        raise EnrolmentError(f"the certificate is for {subject.strip()[:120]!r}, not for {device}; ask for a new token")


def _pending_key(directory: Path) -> bytes:
    """The key of an enrolment that was begun, so that a lost answer can be asked for again; else a new one."""
    path = directory / _PENDING_KEY
    if not path.exists():
        write_atomic(path, _make_key(), mode=0o600)
    return path.read_bytes()


def _make_key() -> bytes:
    return _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")


def _request(key: bytes, device: DeviceId) -> str:
    """A certificate request for the key; the name in it is for readers, the service goes by token or certificate."""
    with tempfile.NamedTemporaryFile() as file:  # mode 0600; a pipe would do, but LibreSSL reads keys from files only
        file.write(key)
        file.flush()
        subject = f"/O={device.site}/CN={device.device}"
        return _openssl("req", "-new", "-key", file.name, "-subj", subject, "-sha256").decode("ascii")


def _openssl(*arguments: str) -> bytes:
    program = shutil.which("openssl")
    if program is None:
        raise EnrolmentError("the program openssl is not installed; install it (apt install openssl)")
    done = subprocess.run([program, *arguments], stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    if done.returncode:
        said = " ".join(done.stderr.decode("utf-8", "replace").split())[-200:]
        raise EnrolmentError(f"openssl {arguments[0]} failed ({said}); is the file damaged?")
    return done.stdout


def _fetch_authority(token: Token) -> str:
    """The authority's certificate, over a connection that proves nothing: its hash in the token does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    body = _exchange(token.url, "GET", "/ca.pem", None, context).decode("ascii", "replace")
    found = _PEM_CERTIFICATE.fullmatch(body)
    if found is None or _fingerprint(body) != token.authority:
        raise EnrolmentError(
            f"{token.url}: its authority is not the one that the token names; ask who runs the site for a new token"
        )
    return body


def _read_authority(directory: Path, fingerprint: str) -> str:
    path = directory / AUTHORITY
    try:
        text = path.read_text(encoding="ascii")
        if _fingerprint(text) == fingerprint:
            return text
        reason = "it is not the authority that this board enrolled with"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise EnrolmentError(f"{path}: cannot be used ({reason}); enrol again with a token")


def _fingerprint(certificate: str) -> str:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.strip())).hexdigest()


def _client_context(authority: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=authority)
    return context


def _ask(url: str, path: str, table: dict[str, Any], context: ssl.SSLContext) -> dict[str, Any]:
    body = _exchange(url, "POST", path, json.dumps(table).encode(), context)
    try:
        answer = json.loads(body)
    except ValueError as error:
        raise EnrolmentError(f"{url}: answered no JSON; is it the enrolment service?") from error
    if not isinstance(answer, dict):
        raise EnrolmentError(f"{url}: answered no table; is it the enrolment service?")
    return answer


def _exchange(url: str, method: str, path: str, body: bytes | None, context: ssl.SSLContext) -> bytes:
    address = _address(url)
    connection = http.client.HTTPSConnection(
        address.hostname or "", address.port or 443, timeout=TIMEOUT_S, context=context
    )
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        response = connection.getresponse()
        answer = response.read(MAX_ANSWER_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        is_time = "not yet valid" in str(error) or "expired" in str(error)
        advice = "set this board's clock" if is_time else "try again later"
        raise EnrolmentError(f"{url}: cannot be reached ({error or type(error).__name__}); {advice}") from error
    finally:
        connection.close()
    if len(answer) > MAX_ANSWER_BYTES:
        raise EnrolmentError(f"{url}: answered more than {MAX_ANSWER_BYTES} bytes; is it the enrolment service?")
    if response.status != http.HTTPStatus.OK:
        raise EnrolmentError(f"{url}: refused ({response.status}): {_said(answer)}")
    return answer


def _said(answer: bytes) -> str:
    try:
        reason = json.loads(answer)["error"]
    except (ValueError, KeyError, TypeError):
        reason = answer.decode("utf-8", "replace")
    return " ".join(str(reason).split())[:300]


def _address(url: str) -> SplitResult:
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname or parts.port == 0:
        raise MessageError(f"{url!r} is no https address")
    return parts


def _day(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d")
