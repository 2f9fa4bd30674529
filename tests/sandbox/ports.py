"""Ports of this machine: a free one, or a given one that may be taken."""

from __future__ import annotations

import errno
import socket

BACKLOG = 2048


class PortTaken(OSError):
    """Somebody else has the port; says which one, and what to do."""


def listen(port: int, whose: str, option: str) -> socket.socket:
    """A socket that listens on this port, 0: on a free one. PortTaken if it cannot; `option` is the command's for it."""
    # TCP is named: only then does asyncio switch delays off.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        why = "is in use" if exc.errno == errno.EADDRINUSE else f"cannot be had ({exc.strerror})"
        raise PortTaken(f"port {port} {why}: choose another one for {whose} ({option}), or 0 for a free one") from exc
    return listener
