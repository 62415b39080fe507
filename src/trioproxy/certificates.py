"""Whether files of certificates and keys can be used for TLS: said before anything starts.

Knows nothing of settings, servers or connections, keeps nothing, and never puts a file's content into a text.
"""

from __future__ import annotations

import ssl
from pathlib import Path


def certificates_complaint(path: Path) -> str:
    """What is wrong with a PEM file of certificates; empty when nothing is."""
    if complaint := _unreadable(path):
        return complaint
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError:  # ssl.SSLError is one
        return "which has no usable certificate in PEM form"
    return ""


def key_complaint(path: Path, certificates: Path) -> str:
    """What is wrong with the PEM file of the first certificate's private key; empty when nothing is.

    The certificates' file must be in order.
    """
    if complaint := _unreadable(path):
        return complaint
    try:
        # Without a password OpenSSL would ask the terminal for one.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificates, path, password="")
    except OSError as error:
        reason = getattr(error, "reason", None)
        if reason == "KEY_VALUES_MISMATCH":
            return f"which is not the key of the certificate in {certificates}"
        if reason is not None:
            return f"which OpenSSL does not take together with {certificates}: {reason.lower().replace('_', ' ')}"
        if b"ENCRYPTED" in path.read_bytes():
            return "which is encrypted: it must be there without a passphrase"
        return "which has no usable private key in PEM form"
    return ""


def _unreadable(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        return f"which cannot be read: {error.strerror}"
    return ""
