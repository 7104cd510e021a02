"""The planner's controls as widgets: they show what matters, and say a plan's settings.

What has no control is kept beside them (`other`), so that every setting of a plan can be given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ipywidgets as w

from ..cost.hardware import CATALOGUE, Hardware, hardware, in_catalogue
from ..display import format_bytes
from ..models.load import BUNDLED, presets
from .planner_options import (
    ALL,
    ANOTHER,
    CONTROLS,
    OFFLINE,
    PRECISIONS,
    SETTINGS_OF_PRECISION,
    Control,
    Values,
    model_name,
)


class Controls:
    """The widgets, what they say, and what was said beside them.

    `box`: the widget that holds them all. `on_change` is called with a control's name after a
    person moved it. Raises ValueError, one line, for a setting that no control can show.
    """

    def __init__(self, said: Values, on_change: Callable[[str], None]):
        self.other: dict[str, Any] = {}
        self._on_change, self._writing = on_change, False
        self.widgets = {name: _widget(control) for name, control in ALL.items()}
        self._titles = {group: _title(group) for group in CONTROLS}
        parts = []
        for group, controls in CONTROLS.items():
            parts += [self._titles[group], *(self.widgets[k.name] for k in controls)]
        self.extras = w.HBox(layout=w.Layout(flex_flow="row wrap"))
        self.box = w.VBox([*parts, self.extras], layout=w.Layout(width="330px", flex="0 0 auto"))
        self.box.add_class("lab-controls")
        with self._quietly():
            self._list_models(None)
            self._list_hardware(None)
            for control in ALL.values():
                self._set(control, control.start)
            self._write(said)
            self._settle()
        for name, widget in self.widgets.items():
            widget.observe(lambda change, name=name: self._moved(name), names="value")

    # ------------------------------------------------------------------------------- what they say

    @property
    def values(self) -> dict[str, Any]:
        """Every control's value, whether it matters or not."""
        return {name: widget.value for name, widget in self.widgets.items()}

    @property
    def model(self) -> Any:
        """The model's name (or the handle that was given)."""
        v = self.values
        if v["model"] != ANOTHER:
            return v["model"]
        return v["path"].strip().removesuffix("/config.json")

    def said(self) -> dict[str, Any]:
        """The arguments of `lab.plan`: what matters and is not off, and what was said beside."""
        v, made = self.values, {}
        for control in ALL.values():
            value = v[control.name]
            if (
                control.name != "path"
                and control.when(v)
                and not (control.off is not None and value == control.off)
            ):
                made[control.name] = value
        made["model"] = self.model
        made |= PRECISIONS[made.pop("precision", "auto")][1]
        if v["gpus"] > 1 and "sharding" not in made:
            alone = self.other.get("tensor_parallel") == v["gpus"]
            made["sharding"] = "none" if alone else "ddp"
        if v["stage"] in OFFLINE:  # the trainer cuts where the plan ends
            made["max_length"] = v["prompt_length"] + v["response_length"]
        return {**made, **self.other}

    def apply(self, settings: Values) -> None:
        """Move the controls to these settings, without a call of `on_change`. Nothing moves where
        a setting cannot be shown: then it raises ValueError, one line."""
        before, other = self.values, dict(self.other)
        with self._quietly():
            try:
                self._write(settings)
            except ValueError:
                self.other = other
                for name, value in before.items():
                    self._set(ALL[name], value)
                raise
            finally:
                self._settle()

    def forget(self, name: str) -> None:
        """Take back a setting that has no control."""
        self.other.pop(name, None)
        with self._quietly():
            self._settle()
        self._on_change(name)

    # ------------------------------------------------------------------------------------- writing

    def _write(self, settings: Values) -> None:
        left = dict(settings)
        self._write_precision(left)
        if "max_completion_length" in left:  # TRL's name of it
            left["response_length"] = left.pop("max_completion_length")
        if left.get("sharding") in ("none", "ddp"):
            left["sharding"] = "copies"
        for name in [n for n in left if n in ALL and n not in ("path", "precision")]:
            self._set(ALL[name], left.pop(name))
        lengths = self.widgets["prompt_length"].value + self.widgets["response_length"].value
        if left.get("max_length") == lengths:
            del left["max_length"]
        self.other |= left

    def _write_precision(self, left: dict[str, Any]) -> None:
        """The three settings of precision as one choice."""
        said = {k: left.pop(k) for k in SETTINGS_OF_PRECISION if k in left}
        if not said:
            return
        key = said.get("dtype") or "float32"
        if key == "float32":
            key = next(
                (k for k in ("bf16", "fp16") if said.get(k)),
                "float32" if "bf16" in said or "fp16" in said else "auto",
            )
        elif said.get("bf16") or said.get("fp16"):
            raise ValueError(
                f"bf16/fp16 autocast works on fp32 weights: leave it out with dtype={key!r}"
            )
        self._set(ALL["precision"], key)

    def _set(self, control: Control, value: Any) -> None:
        widget = self.widgets[control.name]
        if control.name == "model":
            self._list_models(value)
        elif control.name == "hardware":
            self._list_hardware(value)
        elif isinstance(widget, w.Checkbox):
            if not isinstance(value, bool):
                raise ValueError(f"{control.name} must be True or False, got {value!r}")
            widget.value = value
        elif isinstance(widget, w.Text):
            widget.value = str(value)
        else:
            pair = control.pair(value)
            with widget.hold_sync():
                if pair not in widget.options:
                    widget.options = sorted([*widget.options, pair], key=lambda o: o[1])
                widget.value = pair[1]

    def _list_models(self, value: Any) -> None:
        """Choose a model: of the list, a handle, or a name for the field."""
        field, names = self.widgets["model"], [*BUNDLED, *presets()]
        short = {n.split("/")[-1].lower(): n for n in names}
        if isinstance(value, str):
            value = value if value in names else short.get(value.lower(), value)
        handles = [] if value is None or isinstance(value, str) else [(model_name(value), value)]
        options = [*handles, *((n, n) for n in names), (ANOTHER, ANOTHER)]
        if list(field.options) != options:
            field.options = options
        if isinstance(value, str) and value not in (*names, ANOTHER):
            self.widgets["path"].value, value = value, ANOTHER
        if value is not None:
            field.value = value

    def _list_hardware(self, value: Any) -> None:
        """Choose a device: of the catalogue, "here", or a `Hardware` of one's own."""
        field = self.widgets["hardware"]
        if isinstance(value, str):
            here = value.strip().lower() == "here"
            if not here and in_catalogue(value) is None:
                hardware(value)  # says in one line what it may be
            value = "here" if here else in_catalogue(value)
        own = [(f"{value.name} (yours)", value)] if isinstance(value, Hardware) else []
        options = [("this machine (here)", "here"), *own]
        options += [(f"{h.name} · {format_bytes(h.memory)}", key) for key, h in CATALOGUE.items()]
        if list(field.options) != options:
            field.options = options
        if value is not None:
            field.value = value

    # ------------------------------------------------------------------------------- moved by hand

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        self._writing, before = True, self._writing
        try:
            yield
        finally:
            self._writing = before

    def _moved(self, name: str) -> None:
        if self._writing:
            return
        with self._quietly():
            if name in ("gpus", "hardware"):
                self._spread()
            self._settle()
        self._on_change(name)

    def _spread(self) -> None:
        """As many nodes as the devices need."""
        gpus = self.widgets["gpus"].value
        try:
            each = hardware(self.widgets["hardware"].value).devices_per_node
        except ValueError:  # a damaged calibration: the plan says so
            return
        nodes = -(-gpus // each)
        if gpus % nodes == 0:
            self._set(ALL["nodes"], nodes)

    def _settle(self) -> None:
        """Show what matters now, and nothing else."""
        v = self.values
        if v["gpus"] == 1 and v["nodes"] != 1:
            self._set(ALL["nodes"], 1)
        for group, controls in CONTROLS.items():
            shown = [_display(self.widgets[k.name], k.when(v)) for k in controls]
            _display(self._titles[group], any(shown))
        texts = {name: f"{name}={value!r}  ✕" for name, value in self.other.items()}
        if [b.description for b in self.extras.children] != list(texts.values()):
            self.extras.children = tuple(self._extra(*item) for item in texts.items())

    def _extra(self, name: str, text: str) -> w.Button:
        """The sign of a setting without a control: a button that takes it back."""
        button = w.Button(description=text, layout=w.Layout(width="auto"))
        tip(button, f"take {name} back")
        button.on_click(lambda _: self.forget(name))
        return button


# ------------------------------------------------------------------------------------ their making

_STYLE = {"description_width": "88px"}


def _widget(control: Control) -> Any:
    room = w.Layout(width="322px")
    said = {"description": control.label, "layout": room, "style": _STYLE}
    if isinstance(control.start, bool):
        made = w.Checkbox(value=control.start, indent=True, **said)
    elif control.slides:
        made = w.SelectionSlider(options=control.pairs, value=control.start, **said)
    elif control.name == "path":
        made = w.Text(placeholder="folder or owner/name", continuous_update=False, **said)
    else:
        made = w.Dropdown(options=control.pairs, **said)
    tip(made, control.tip)
    return made


def _title(text: str) -> w.HTML:
    return w.HTML(f'<div class="lab-group">{text}</div>')


def tip(widget: Any, text: str) -> None:
    """What a control means, on hover (ipywidgets 8, then 7)."""
    for name in ("tooltip", "description_tooltip"):
        if text and widget.has_trait(name):
            setattr(widget, name, text)
            return


def _display(widget: Any, shown: bool) -> bool:
    display = None if shown else "none"
    if widget.layout.display != display:
        widget.layout.display = display
    return shown
