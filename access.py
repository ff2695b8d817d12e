"""Who may ask: API keys, the address that a request comes from, how often an address may be wrong."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import cachetools

WRONG_KEYS = 10  # from one address, each within WRONG_KEYS_S of the last; more are told to wait
WRONG_KEYS_S = 60
ADDRESSES = 10_000  # remembered at once

log = logging.getLogger("speech.access")


class Keys:
    """The keys of TTS_API_KEYS and of the file TTS_API_KEYS_FILE, which is read again when it changes."""

    def __init__(self, keys: Iterable[str], file: Path | None):
        self._fixed, self._file = tuple(keys), file
        self._lock = threading.Lock()
        self._changed_ns, self._fault = -1, ""
        self._read: tuple[str, ...] = ()
        if file:
            self._read_file(file)  # a missing file keeps the server from starting, not from asking for keys

    @property
    def needed(self) -> bool:
        """Whether a request needs a key: a file that was emptied lets nobody in, not everybody."""
        return bool(self._fixed or self._file)

    def accept(self, sent: str) -> bool:
        """Tell whether a key is one of them; the time that takes tells nothing about them."""
        given = sent.encode("latin-1")  # the bytes of the header as they came
        return any([hmac.compare_digest(key.encode(), given) for key in self._current()])  # a list: all are compared

    def _current(self) -> tuple[str, ...]:
        if self._file:
            with self._lock:
                try:
                    if self._file.stat().st_mtime_ns != self._changed_ns:
                        self._read_file(self._file)
                    self._fault = ""
                except (OSError, ValueError) as error:  # being replaced, gone, no UTF-8: the keys known so far stay
                    if self._fault != (fault := str(error)):
                        log.error("the keys file was not read, the keys known so far stay: %s", fault)
                    self._fault = fault
        return (*self._fixed, *self._read)

    def _read_file(self, file: Path) -> None:
        changed_ns = file.stat().st_mtime_ns
        lines = file.read_text(encoding="utf-8-sig").splitlines()
        self._read = tuple(key for line in lines if (key := line.partition("#")[0].strip()))
        self._changed_ns = changed_ns


class WrongKeys:
    """Counts wrong keys by address: whoever guesses is slowed down, whoever has a key never is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: cachetools.TTLCache = cachetools.TTLCache(ADDRESSES, WRONG_KEYS_S)

    def count(self, address: str) -> bool:
        """Count one; tell whether an address, or the /64 that an IPv6 client has to itself, has had too many."""
        parsed = parse_address(address)
        counted = str(ipaddress.ip_network((parsed, 64), strict=False)) if parsed and parsed.version == 6 else address
        with self._lock:
            self._counts[counted] = count = self._counts.get(counted, 0) + 1
        return count > WRONG_KEYS


class ForwardedAddress:
    """Takes the client's address from X-Forwarded-For where a named proxy says it, and from nobody else."""

    def __init__(self, wsgi_app: Callable, proxies: tuple[str, ...]):
        self._wsgi_app, self._proxies = wsgi_app, [ipaddress.ip_network(proxy) for proxy in proxies]

    def __call__(self, environ: dict[str, Any], start_response: Callable) -> Iterable[bytes]:
        address = parse_address(environ.get("REMOTE_ADDR", ""))
        hops = environ.get("HTTP_X_FORWARDED_FOR", "").split(",")
        while hops and address and any(address in proxy for proxy in self._proxies):
            if (before := parse_address(hops.pop())) is None:
                break
            address = before
        environ["REMOTE_ADDR"] = str(address or "-")
        return self._wsgi_app(environ, start_response)


def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return an IP address, None for what is none."""
    try:
        return ipaddress.ip_address(text.strip())
    except ValueError:
        return None
