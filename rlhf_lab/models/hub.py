"""Whether the hub of models and data sets can be reached from here."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit


def hub_reachable(seconds: float = 3.0) -> bool:
    """Whether the hub answers, unless HF_HUB_OFFLINE says not to ask."""
    from huggingface_hub import constants

    place = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or not place.hostname:
        return False
    try:
        port = place.port or (80 if place.scheme == "http" else 443)
        socket.create_connection((place.hostname, port), seconds).close()
    except OSError:
        return False
    return True
