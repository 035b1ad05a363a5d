"""Listening, answering, and ending in order."""

from __future__ import annotations

import logging
import socket
import sys

import uvicorn

from edgellm.errors import ArgumentError
from edgellm.server.app import Access, app
from edgellm.server.log import Lines
from edgellm.server.security import Protocol
from edgellm.server.service import Service

MOST_CONNECTIONS = 1000
BACKLOG = 128


def listen(host: str, port: int) -> socket.socket:
    """Raises ArgumentError where that is not possible; port 0 takes one that is free."""
    try:
        (family, _, _, _, address), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise ArgumentError(
            f"{host} port {port} cannot be listened at: {error.strerror}; expected a free port and an address of this "
            "machine: choose others with --host and --port"
        ) from error


def run(service: Service, access: Access, at: socket.socket, grace: int, has_page: bool = True) -> None:
    """Answer until SIGINT or SIGTERM; what is under way then has `grace` seconds to come to its end."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    # asyncio warns of every client that has gone.
    levels = {"edgellm.server": logging.INFO, "uvicorn": logging.WARNING, "asyncio": logging.ERROR}
    for name, level in levels.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    config = uvicorn.Config(
        app(service, access, has_page),
        http=Protocol,
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=grace,
    )
    uvicorn.Server(config).run(sockets=[at])
