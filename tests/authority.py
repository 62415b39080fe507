"""A CA for tests: certificates as files for the proxy's settings, and contexts for the other sides."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import trustme


class Authority:
    """One CA, whose files are in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        self._folder = folder
        self._count = 0
        self.file = folder / "ca.pem"
        """The CA's own certificate."""
        self._ca.cert_pem.write_to_path(str(self.file))

    def issue(self, name: str = "127.0.0.1") -> dict[str, str]:
        """A certificate for that name and its key, in files: what `server.tls` takes."""
        issued = self._ca.issue_cert(name)
        self._count += 1
        cert, key = (str(self._folder / f"{self._count}.{kind}") for kind in ("pem", "key"))
        issued.cert_chain_pems[0].write_to_path(cert)
        issued.private_key_pem.write_to_path(key)
        return {"cert": cert, "key": key}

    def serving(
        self, name: str = "127.0.0.1", *, expires: datetime | None = None, asks_clients: bool = False
    ) -> ssl.SSLContext:
        """What a server of that name needs; `asks_clients`: for a certificate of this CA."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._ca.issue_cert(name, not_after=expires).configure_cert(context)
        if asks_clients:
            self._ca.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def trusting(self, *protocols: str) -> ssl.SSLContext:
        """What a client needs that trusts this CA alone, and speaks these protocols (ALPN)."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._ca.configure_trust(context)
        if protocols:
            context.set_alpn_protocols(protocols)
        return context

    def settings(self, **server: Any) -> dict[str, Any]:
        """The section `server` of a proxy that is served over TLS at 127.0.0.1."""
        return {"tls": self.issue()} | server


EXPIRED = datetime(2020, 1, 2, tzinfo=UTC)
