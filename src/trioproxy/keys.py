"""Client keys: who asks, and for what they may ask. Pure: the time of day is an argument.

Knows nothing of scheduling: what a key may have of a pool at once is the scheduler's business.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Final
from urllib.parse import parse_qs

from trioproxy import errors
from trioproxy.config import KeySettings
from trioproxy.errors import ProxyError
from trioproxy.request import KEY_SUBPROTOCOL, OTHER_CREDENTIALS, Head

PREFIX: Final = "sk-trioproxy-"
"""What new keys begin with: some clients insist on `sk-`, and a lost key can be told from OpenAI's."""

_RANDOM_BYTES: Final = 32


def new_key() -> str:
    """A key that nobody can guess (256 random bits)."""
    return PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)


def digest(key: str) -> str:
    """What a configuration file has in place of the key: its SHA-256, in hexadecimal digits."""
    return hashlib.sha256(key.encode()).hexdigest()


class KeyRing:
    """All client keys of one configuration. If there are none, everybody may ask for everything."""

    def __init__(self, keys: Sequence[KeySettings]) -> None:
        self._by_digest = [(bytes.fromhex(key.sha256), key) for key in keys]

    def identify(self, head: Head, subprotocols: Iterable[str]) -> KeySettings | None:
        """Whose key a request came with, expired or not; None if there are no keys.

        It stands in `Authorization` (RFC 6750 section 2.1), or, of some clients, in `api-key`, `x-api-key` or a
        WebSocket subprotocol. Raises `ProxyError`: INVALID_API_KEY.
        """
        if not self._by_digest:
            return None
        said = set(_credentials(head, subprotocols))
        if not said:
            raise ProxyError(errors.INVALID_API_KEY, reason="The request has no API key, and this proxy asks for one.")
        if len(said) > 1:
            raise ProxyError(errors.INVALID_API_KEY, reason="The request has more than one API key.")
        key = self._find(hashlib.sha256(said.pop()).digest())
        if key is None:
            raise ProxyError(errors.INVALID_API_KEY, reason="The request's API key is not one of this proxy's.")
        return key

    def _find(self, wanted: bytes) -> KeySettings | None:
        found = None
        for known, key in self._by_digest:  # all of them, so that the time tells nothing
            if hmac.compare_digest(known, wanted):
                found = key
        return found


def _credentials(head: Head, subprotocols: Iterable[str]) -> Iterator[bytes]:
    for name, value in head.headers:
        lower = name.lower()
        if lower == b"authorization":
            scheme, _, token = value.strip().partition(b" ")
            found = token.strip() if scheme.lower() == b"bearer" else b""
        else:
            found = value.strip() if lower in OTHER_CREDENTIALS else b""
        if found:
            yield found
    for subprotocol in subprotocols:
        if subprotocol.startswith(KEY_SUBPROTOCOL):
            yield subprotocol.removeprefix(KEY_SUBPROTOCOL).encode()


def check_expiry(key: KeySettings | None, now: datetime) -> None:
    """Whether the key may still be used. Raises `ProxyError`: INVALID_API_KEY."""
    if key is not None and key.expires is not None and now >= key.expires:
        reason = f"The API key {key.name!r} has expired, on {key.expires.astimezone(UTC):%Y-%m-%d at %H:%M} UTC."
        raise ProxyError(errors.INVALID_API_KEY, reason=reason)


def check_model(key: KeySettings | None, model: str | None) -> None:
    """Whether the key may be used for this model; None stands for a request that names none, or not legibly.

    Raises `ProxyError`: MODEL_NOT_ALLOWED.
    """
    if key is None or key.models is None or any(fnmatchcase(model or "", glob) for glob in key.models):
        return
    shown = "a request that does not name one model" if model is None else f"the model {model!r}"
    raise ProxyError(errors.MODEL_NOT_ALLOWED, param="model", key=key.name, model=shown, allowed=", ".join(key.models))


def queried_model(head: Head) -> str | None:
    """The model that a realtime session's handshake names in its query; None if it is not exactly one.

    Other WebSockets (`/v1/responses`) name it in their messages, which nobody here reads.
    """
    if head.rest.strip(b"/") != b"realtime":
        return None
    models = parse_qs(head.query.decode("latin-1"), keep_blank_values=True).get("model", [])
    return models[0] if len(models) == 1 and b";" not in head.query else None  # to some, ";" separates as "&" does
