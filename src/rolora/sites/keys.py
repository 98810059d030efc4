"""Keys and certificates of a federation: its CA, the server's certificate, a key for each site."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from rolora.errors import ConfigError
from rolora.files import write_file

VALID_FOR = datetime.timedelta(days=3650)
OWNER = 0o600  # the mode of a secret: only its owner may read it
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def is_loopback(host: str) -> bool:
    """Whether this name or address can only be this machine's."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host in LOOPBACK


def make_authority(folder: Path, name: str) -> None:
    """Write ``ca.key`` and ``ca.crt``, a certificate authority."""
    key, subject = ec.generate_private_key(ec.SECP384R1()), _name(f"{name} CA")
    only_certificates = x509.KeyUsage(
        key_cert_sign=True,
        crl_sign=True,
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _certificate(subject, subject, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(only_certificates, critical=True)
        .sign(key, hashes.SHA384())
    )
    _write_pair(folder / "ca", key, certificate)


def make_server(folder: Path, host: str) -> None:
    """Write ``server.key`` and ``server.crt`` for this name or address, and for loopback.

    The authority in the same folder signs them.
    """
    authority, signer = read_certificate(folder / "ca.crt"), read_private_key(folder / "ca.key")
    key = ec.generate_private_key(ec.SECP384R1())
    names = [_alternative(name) for name in dict.fromkeys((host, *LOOPBACK))]
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    certificate = (
        _certificate(_name(host), authority.subject, key)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(issuer, critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(signer, hashes.SHA384())
    )
    _write_pair(folder / "server", key, certificate)


def make_site(folder: Path, name: str) -> None:
    """Write a site's keys: ``NAME.key`` is for the site, ``NAME.pub`` is registered."""
    key = ec.generate_private_key(ec.SECP384R1())
    write_file(folder / f"{name}.key", _private_pem(key), OWNER)
    ssh = key.public_key().public_bytes(Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    write_file(folder / f"{name}.pub", ssh + b"\n")


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """An elliptic-curve private key in PEM or OpenSSH form. ConfigError if it is not one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read key {path}: {error.strerror}") from None
    try:
        if b"OPENSSH" in content:
            key: object = serialization.load_ssh_private_key(content, None)
        else:
            key = serialization.load_pem_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"{path} is not an elliptic-curve private key without a passphrase; "
            "rolora federation keys makes one"
        )
    return key


def read_certificate(path: Path) -> x509.Certificate:
    """A certificate in PEM form. ConfigError if it is not one."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read certificate {path}: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{path} is not a certificate in PEM form") from None


def public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The public half of a key, in PEM form."""
    public_format = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(Encoding.PEM, public_format)


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return x509.CertificateBuilder(
        issuer_name=issuer,
        subject_name=subject,
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - datetime.timedelta(hours=1),  # a site's clock may be behind
        not_valid_after=now + VALID_FOR,
    )


def _write_pair(path: Path, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    """Write ``path`` with the suffixes .key and .crt."""
    write_file(path.with_suffix(".key"), _private_pem(key), OWNER)
    write_file(path.with_suffix(".crt"), certificate.public_bytes(Encoding.PEM))


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
