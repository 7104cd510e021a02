"""A plan as a link: the planner's web page, with the settings behind the `#`.

    fragment_of({"stage": "sft", "model": "tiny", "gpus": 8})     # stage=sft&model=tiny&gpus=8
    settings_of("https://…/planner/#stage=sft&gpus=8")            # {"stage": "sft", "gpus": 8}

What stands behind `#` is never sent to the page's host. A link can come from anybody: what it says
is a name, a number, a switch, a list of those, or the figures of a device, and it opens no file of
data or of figures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, metadata
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from ..cost.device import is_finite
from ..cost.hardware import Hardware, hardware, in_catalogue
from ..models.load import Model
from ..stages import Setting, Settings

FILES = ("data", "output_dir", "model_name_or_path")
"""Settings that a link may not give: they name what is on a disk."""


def page_address() -> str:
    """Where the planner's page is: the GitHub Pages of the repository, the one setting of
    pyproject.toml; "" where the package is not installed."""
    try:
        urls = metadata("rlhf-lab").get_all("Project-URL") or []
    except PackageNotFoundError:
        return ""
    (repository,) = (url.split(", ")[1] for url in urls if url.startswith("Repository, "))
    owner, name = urlsplit(repository).path.strip("/").split("/")
    return f"https://{owner}.github.io/{name}/planner/"


def fragment_of(settings: Settings) -> str:
    """Settings of a planner as what stands behind the `#` of its page. "here" becomes the figures
    of this machine, which the reader's browser does not know."""
    own = dict(settings)
    model, device = own["model"], own["hardware"]
    if isinstance(model, Model):
        own |= {"model": model.name, **model.others}
    if device == "here":
        own["hardware"] = hardware(device)
    pairs = {name: _text(value) for name, value in own.items()}
    return urlencode(pairs, quote_via=quote, safe="/,")


def settings_of(link: str) -> dict[str, Setting]:
    """The settings of a link, of its part behind `#`, or of such a part alone. Raises ValueError,
    one line, for what is no such link."""
    text = link.partition("#")[2] or ("" if "://" in link else link)
    try:
        pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text))
    except ValueError:
        raise ValueError(f"no link of the planner: {link[:80]!r}") from None
    settings = {name: _value(name, value) for name, value in pairs}
    device = settings.get("hardware", "here")
    if isinstance(device, Mapping):
        settings["hardware"] = Hardware.from_dict(dict(device))
    elif device != "here" and in_catalogue(str(device)) is None:
        hardware(str(device) + " ")  # raises ValueError; a name with a space behind it is no file
    return settings


def _text(value: Setting) -> str:
    """A value in a link: a name as it is, anything else as JSON."""
    if isinstance(value, str):
        return value if _parsed(value) is value else json.dumps(value)
    return json.dumps(value.to_dict() if isinstance(value, Hardware) else value)


def _value(name: str, text: str) -> Setting:
    value = _parsed(text)
    parts = value if isinstance(value, list) else [value]
    plain = all(part is None or isinstance(part, (str, bool)) or is_finite(part) for part in parts)
    if name in FILES or not (plain or name == "hardware" and isinstance(value, dict)):
        raise ValueError(f"a link of the planner cannot give {name[:40]}={text[:40]!r}")
    return value


def _parsed(text: str) -> Setting:
    """What a text is in JSON; the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
