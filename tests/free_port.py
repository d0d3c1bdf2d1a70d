"""A port for the processes of a test to meet at."""

import contextlib
import random
import socket


def free_port() -> int:
    """Return a port below the range (from 32768) from which the system hands out ports to others meanwhile."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
