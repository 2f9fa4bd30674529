"""Listening on a port of this machine: a free one, or a given one that may be taken."""

from __future__ import annotations

import errno
import socket

BACKLOG = 2048


class PortTaken(OSError):
    """Another process has the port; the message names it and says what to do."""


def listen(port: int, whose: str, option: str) -> socket.socket:
    """Return a socket that listens on `port` (0: a free one).

    Raises PortTaken if it cannot; its message names `whose` port it is and the command's `option`.
    """
    # With the protocol given, asyncio sets TCP_NODELAY; without it, small packets are delayed.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)

    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        raise PortTaken(port_error(port, whose, option, exc)) from exc
    return listener


def port_error(port: int, whose: str, option: str, error: OSError) -> str:
    """Say why the port cannot be used, and what to do about it."""
    problem = f"cannot be had ({error.strerror})"
    if error.errno == errno.EADDRINUSE:
        problem = "is in use"
    return f"port {port} {problem}: choose another one for {whose} ({option}), or 0 for a free one"
