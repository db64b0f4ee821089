"""Where the server listens: bound first of all, so that what stands in the way is known before loading."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import stat
import sys
from collections.abc import Iterator
from typing import NoReturn

from server.config import ServerConfig

# A client that takes nothing for so long is gone, as ``sse`` sees it too: the kernel drops what waits for it.
# Without this, a closed connection would wait for ever to send its rest to a client that reads no more.
_UNSENT_TIMEOUT_MS = 30_000
_BACKLOG = 2048


class LaunchError(Exception):
    """The server cannot start; the message says what to change."""


def check_certificate(config: ServerConfig) -> None:
    """Raises LaunchError if there are TLS files that cannot be used, before gigabytes are loaded."""
    if config.ssl_certfile is None:
        return

    def refuse() -> NoReturn:
        raise LaunchError("the private key has a passphrase; --ssl-keyfile takes a key without one")

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, refuse)
    except OSError as error:  # SSLError is one
        files = " and ".join(filter(None, (config.ssl_certfile, config.ssl_keyfile)))
        reason = error.strerror or str(error)
        raise LaunchError(f"no certificate and key can be read from {files}: {reason}") from None


def listen(config: ServerConfig) -> socket.socket:
    """Binds first of all: an address that is taken should be known before gigabytes are loaded.

    Raises:
        LaunchError: the address cannot be had.
    """
    if config.uds is not None:
        return _listen_at(config.uds, 0o660, "--uds")
    return _listen_on(config.host, config.port, "--port", "--host")


def listen_for_admin(config: ServerConfig) -> socket.socket | None:
    """The same for the operator's interface, if there is to be one. Raises LaunchError."""
    if config.admin_uds is not None:
        return _listen_at(config.admin_uds, 0o600, "--admin-uds")
    if config.admin_port is None:
        return None
    return _listen_on(config.admin_host, config.admin_port, "--admin-port", "--admin-host")


def _listen_on(host: str, port: int, port_flag: str, host_flag: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sys.platform == "linux":  # the connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNSENT_TIMEOUT_MS)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise LaunchError(
            f"cannot listen on {host} port {port}: {reason}. Choose another with {port_flag} "
            f"(0 takes a free one) or {host_flag}."
        ) from None
    return listener


def _listen_at(path: str, mode: int, flag: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(path).st_mode) and not _has_listener(path):
                os.unlink(path)  # a server that was killed left it behind
        before = os.umask(0o777 & ~mode)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise LaunchError(f"cannot listen on {path}: {reason}. Choose another with {flag}.") from None
    return listener


def _has_listener(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        return True


@contextlib.contextmanager
def unlinked_at_last(path: str | None) -> Iterator[None]:
    """Removes the socket that ``listen`` made, if it was one in the file system."""
    try:
        yield
    finally:
        if path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def url_of(config: ServerConfig, listener: socket.socket) -> str:
    """Where clients reach a listener."""
    scheme = "http" if config.ssl_certfile is None else "https"
    if listener.family == socket.AF_UNIX:
        return f"{scheme}://localhost"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
