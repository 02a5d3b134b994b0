"""Which text is the address of a server."""

from __future__ import annotations

from ipaddress import IPv4Address
from urllib.parse import urlsplit

_FORBIDDEN = frozenset(" ?#\\")


def is_server_url(url: str) -> bool:
    """Whether a text is http://HOST:PORT or https://HOST:PORT, with a slash at its end at most.

    Paths are appended to it, so that a query or a fragment, an empty one too, would swallow them. What passes is an
    address to the HTTP client and to the look-up of names, too, which end in errors of other kinds otherwise.
    """
    if not (url.isascii() and url.isprintable()) or _FORBIDDEN.intersection(url):
        return False
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")  # empty and overlong labels
        if host.count(".") == 3 and host.replace(".", "").isdigit():
            IPv4Address(host)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(host) and bool(port) and parts.path in ("", "/")
