"""Keys and certificates of a federation: an own CA, the server's certificate, a key per site."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from rolora.errors import ConfigError
from rolora.files import write_file

YEARS = datetime.timedelta(days=3650)
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def make_authority(folder: Path, name: str) -> None:
    """``ca.key`` and ``ca.crt``: whoever trusts the certificate trusts what the key signs."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _named(f"{name} CA")
    certificate = (
        _certificate(subject, subject, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_usage(sign=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    _write_secret(folder / "ca.key", _private(key))
    write_file(folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))


def make_server(folder: Path, hosts: Sequence[str]) -> None:
    """``server.key`` and ``server.crt``, valid for these host names and addresses and this machine.

    Signed by the authority in the same folder.
    """
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    signer = read_private_key(folder / "ca.key")
    key = ec.generate_private_key(ec.SECP384R1())
    names = [_alternative(host) for host in dict.fromkeys((*hosts, *LOOPBACK))]
    certificate = (
        _certificate(
            _named(hosts[0] if hosts else "localhost"), authority.subject, key.public_key()
        )
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .add_extension(_usage(sign=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(signer, hashes.SHA384())
    )
    _write_secret(folder / "server.key", _private(key))
    write_file(folder / "server.crt", certificate.public_bytes(serialization.Encoding.PEM))


def make_site(private: Path, public: Path) -> None:
    """A site's key pair: the private one stays at the site, the public one with the coordinator."""
    key = ec.generate_private_key(ec.SECP384R1())
    _write_secret(private, _private(key))
    encoding = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    write_file(public, key.public_key().public_bytes(*encoding) + b"\n")


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A private key in PEM or OpenSSH form. ConfigError if it is none, or not of P-384's kind."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"key {path} cannot be read: {error.strerror}") from None
    read = (
        serialization.load_ssh_private_key
        if b"OPENSSH" in content
        else serialization.load_pem_private_key
    )
    try:
        key = read(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"{path} is no private key of an elliptic curve without a passphrase; "
            "rolora federation keys makes one"
        )
    return key


def read_certificate(path: Path) -> x509.Certificate:
    """A certificate in PEM form. ConfigError if it is none."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"certificate {path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{path} is no certificate in PEM form") from None


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # a site's clock may be behind
        .not_valid_after(now + YEARS)
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign,
        key_cert_sign=sign,
        crl_sign=sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write_secret(path: Path, content: bytes) -> None:
    """A file that its owner alone can read, from the first byte on."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(handle)
