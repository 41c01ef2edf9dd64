"""A site's certificate authority: ECDSA P-256 throughout, the key readable by its owner only.

Device certificates may only be used by clients, the broker's only by servers, and the authority can make no further
authority. The list of revoked certificates has no early end: OpenSSL refuses every client once the list at hand has
expired, and the only reader is the broker beside which it lies.
"""

import ipaddress
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from device.contract.files import write_atomic
from host.errors import FleetError

AUTHORITY_DAYS = 20 * 365
BROKER_DAYS = 10 * 365
CLOCK_SLACK = timedelta(days=1)
"""Certificates begin so much before they are made: clocks differ."""
MAX_REQUEST_BYTES = 16 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """One certificate, PEM; its serial number as hex."""

    pem: str
    serial: str
    starts: datetime
    expires: datetime

    @classmethod
    def read(cls, path: Path) -> "Issued":
        """A stored one; FleetError names a missing or damaged file."""
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, ValueError) as error:
            raise FleetError(f"{path}: no usable certificate ({error}); restore it from your backup") from error
        return cls(
            pem=certificate.public_bytes(serialization.Encoding.PEM).decode(),
            serial=f"{certificate.serial_number:x}",
            starts=certificate.not_valid_before_utc,
            expires=certificate.not_valid_after_utc,
        )


class Authority:
    """The certificate and key of one site."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate, self._key = certificate, key

    @classmethod
    def create(cls, directory: Path, site: str) -> "Authority":
        """Make and store `ca.pem` and `ca.key`."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(site, f"{site} FieldViT authority")
        now = datetime.now(UTC).replace(microsecond=0)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - CLOCK_SLACK)
            .not_valid_after(now + timedelta(days=AUTHORITY_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
            .add_extension(identifier, critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
            .sign(key, hashes.SHA256())
        )
        write_private(directory / "ca.key", private_pem(key))
        write_atomic(directory / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM))
        return cls(certificate, key)

    @classmethod
    def load(cls, directory: Path) -> "Authority":
        """Read what `create` stored; FleetError names a missing or damaged file."""
        path = directory / "ca.key"
        try:
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
            path = directory / "ca.pem"
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
        except (OSError, ValueError, TypeError) as error:
            raise FleetError(f"{path}: no usable authority ({error}); restore it from your backup") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise FleetError(f"{path}: does not belong to ca.key; restore both from your backup")
        return cls(certificate, key)

    @property
    def pem(self) -> str:
        return self._certificate.public_bytes(serialization.Encoding.PEM).decode()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, in hex."""
        return self._certificate.fingerprint(hashes.SHA256()).hex()

    def issue_client(self, public_key: object, site: str, name: str, *, days: float, now: datetime) -> Issued:
        """A certificate that lets `name` log in at the broker."""
        return self._issue(public_key, _name(site, name), days, now, ExtendedKeyUsageOID.CLIENT_AUTH, alternatives=())

    def issue_server(
        self, public_key: object, site: str, hostnames: Sequence[str], *, days: float, now: datetime
    ) -> Issued:
        """A certificate for a server that is reached by these names and addresses."""
        alternatives = [_alternative(hostname) for hostname in hostnames]
        name = _name(site, hostnames[0][:64])
        return self._issue(public_key, name, days, now, ExtendedKeyUsageOID.SERVER_AUTH, alternatives=alternatives)

    def revocation_list(self, serials: Iterable[tuple[str, datetime]], *, now: datetime) -> bytes:
        """PEM of the list of revoked serial numbers (hex) and when."""
        builder = x509.CertificateRevocationListBuilder(
            self._certificate.subject, now - CLOCK_SLACK, self._certificate.not_valid_after_utc
        ).add_extension(self._issuer_identifier(), critical=False)
        builder = builder.add_extension(x509.CRLNumber(int(now.timestamp() * 1000)), critical=False)
        for serial, moment in serials:
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder(int(serial, 16), moment.replace(microsecond=0)).build()
            )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _issue(
        self,
        public_key: object,
        name: x509.Name,
        days: float,
        now: datetime,
        purpose: x509.ObjectIdentifier,
        *,
        alternatives: Sequence[x509.GeneralName],
    ) -> Issued:
        starts = (now - CLOCK_SLACK).replace(microsecond=0)
        expires = min((now + timedelta(days=days)).replace(microsecond=0), self._certificate.not_valid_after_utc)
        serial = x509.random_serial_number()
        key = _require_public_key(public_key)
        builder = (
            x509.CertificateBuilder(self._certificate.subject, name, key, serial)
            .not_valid_before(starts)
            .not_valid_after(expires)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(self._issuer_identifier(), critical=False)
        )
        if alternatives:
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        pem = certificate.public_bytes(serialization.Encoding.PEM).decode()
        return Issued(pem=pem, serial=f"{serial:x}", starts=now.replace(microsecond=0), expires=expires)

    def _issuer_identifier(self) -> x509.AuthorityKeyIdentifier:
        identifier = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as unencrypted PEM."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def read_private(path: Path) -> ec.EllipticCurvePrivateKey:
    """A stored key; FleetError names a missing or damaged file."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise FleetError(f"{path}: no usable key ({error}); restore it from your backup") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise FleetError(f"{path}: is no P-256 key; restore it from your backup")
    return key


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read; FleetError if it is there already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise FleetError(f"{path}: is there already and is not overwritten; choose another directory") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_request(text: str) -> object:
    """The public key of a certificate request that proves to have the private one.

    Raises:
        FleetError: no request, too large, a weak key, or its own signature is wrong.
    """
    if len(text) > MAX_REQUEST_BYTES:
        raise FleetError(f"the certificate request has {len(text)} characters, the limit is {MAX_REQUEST_BYTES}")
    try:
        request = x509.load_pem_x509_csr(text.encode())
        is_signed = request.is_signature_valid
    except (ValueError, TypeError, InvalidSignature) as error:
        raise FleetError(f"the certificate request cannot be read ({type(error).__name__})") from error
    if not is_signed:
        raise FleetError("the certificate request is not signed by its own key")
    return _require_public_key(request.public_key())


def public_digest(public_key: object) -> str:
    """What names a public key: SHA-256 of its DER form, in hex."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(
        _require_public_key(public_key).public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return digest.finalize().hex()


PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey


def _require_public_key(key: object) -> PublicKey:
    is_curve = isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in ("secp256r1", "secp384r1")
    is_long = isinstance(key, rsa.RSAPublicKey) and 2048 <= key.key_size <= 4096
    if is_curve or is_long or isinstance(key, ed25519.Ed25519PublicKey):
        return key  # type: ignore[return-value]
    raise FleetError("the certificate request's key must be P-256, P-384, Ed25519, or RSA of 2048 to 4096 bits")


def _name(site: str, common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, site),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64]),
        ]
    )


def _alternative(hostname: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(hostname))
    except ValueError:
        return x509.DNSName(hostname)


def _usage(**allowed: bool) -> x509.KeyUsage:
    names = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
        *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in names})
