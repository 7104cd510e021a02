"""What a stored picture shows: the SVG inside its image."""

from __future__ import annotations

import base64
import re


def svg_of(bundle: dict[str, str]) -> str:
    """The SVG text inside the image of an output's bundle."""
    found = re.search('src="data:image/svg\\+xml;base64,([^"]+)"', bundle["text/html"])
    assert found, bundle["text/html"][:200]
    return base64.b64decode(found[1]).decode()
