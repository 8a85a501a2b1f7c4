"""The worker's self-signed certificate. The chain stores its fingerprint, SHA-256 of the DER; nothing else in it is
trusted.
"""

import datetime
import hashlib
import os
import secrets
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from worker.errors import UnpinnedCertificate

# Rationale: peers are known by fingerprint, not by name; one fixed alternative name lets every client override the
# target's name with it. The subject is unique all the same: TLS looks a root up by its subject, so two pinned
# certificates of one subject would hide each other.
PEER_NAME = "worker.plumb"

LIFETIME_DAYS = 3650  # a pinned certificate is replaced by registering another, not by expiry

MAX_PEM_BYTES = 16_384


def create(certificate: Path, key: Path) -> bytes:
    """Writes a new P-256 key (mode 0600) and its self-signed certificate, both PEM. Returns the fingerprint. Never
    overwrites: raises FileExistsError.
    """
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{secrets.token_hex(16)}.{PEER_NAME}")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=LIFETIME_DAYS))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(PEER_NAME)]), critical=False)
        # SAFETY: not an authority, so a pinned peer can't vouch for further certificates
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(private.public_key()), critical=False)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .sign(private, hashes.SHA256())
    )
    for path in (certificate, key):
        path.parent.mkdir(parents=True, exist_ok=True)
    pem_key = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem_key)
    with certificate.open("xb") as file:
        file.write(signed.public_bytes(serialization.Encoding.PEM))
    return hashlib.sha256(signed.public_bytes(serialization.Encoding.DER)).digest()


def fingerprint(pem: bytes) -> bytes:
    """SHA-256 of the DER of the one certificate in `pem`. Raises ValueError if there isn't exactly one."""
    return hashlib.sha256(_only(pem).public_bytes(serialization.Encoding.DER)).digest()


def pinned(pem: bytes, expected: bytes, sender: str) -> bytes:
    """The certificate in `pem`, encoded anew (so nothing else rides along), if its fingerprint is `expected`. Raises
    UnpinnedCertificate, ValueError.
    """
    certificate = _only(pem)
    actual = hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).digest()
    if actual != expected:
        raise UnpinnedCertificate(sender, expected, actual)
    return certificate.public_bytes(serialization.Encoding.PEM)


def _only(pem: bytes) -> x509.Certificate:
    if len(pem) > MAX_PEM_BYTES:
        raise ValueError(f"expected a certificate of at most {MAX_PEM_BYTES} bytes, came {len(pem)}")
    try:
        certificates = x509.load_pem_x509_certificates(pem)
        for certificate in certificates:
            # SAFETY: names are decoded when asked for. gRPC reads roots up to the first that it can't, and shuts out
            # all peers behind that one.
            certificate.subject, certificate.issuer  # noqa: B018
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(f"not a PEM certificate: {error}") from error
    if len(certificates) != 1:
        raise ValueError(f"expected one certificate, came {len(certificates)}")
    return certificates[0]
