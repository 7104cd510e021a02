"""The planner's controls as widgets: they show what matters, and give a plan's settings.

What has no control is kept beside them (`other`), so that every setting of a plan can be given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ipywidgets as w

from ..cost.hardware import CATALOGUE, Hardware, hardware, in_catalogue
from ..display import format_bytes
from ..models.load import BUNDLED, Model, presets
from ..stages import STAGES
from .planner_options import (
    ALL,
    ANOTHER,
    CONTROLS,
    PRECISIONS,
    SETTINGS_OF_PRECISION,
    Control,
    Values,
    model_name,
)


class Controls:
    """The widgets, the settings that they show, and those that were given beside them (`other`).

    `box`: the widget that holds them all. `on_change` is called with a control's name after a
    person moved it. Raises ValueError, one line, for a setting that no control can show.
    """

    def __init__(self, settings: Values, on_change: Callable[[str], None]) -> None:
        self.other: dict[str, object] = {}
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
            self._set_all(settings)
            self._show_relevant()
        for name, widget in self.widgets.items():
            widget.observe(lambda change, name=name: self._moved(name), names="value")

    # ------------------------------------------------------------------------------------- reading

    @property
    def values(self) -> Values:
        """Every control's value, whether it matters or not."""
        return {name: widget.value for name, widget in self.widgets.items()}

    @property
    def model(self) -> str | Model:
        """The model's name (or the handle that was given)."""
        v = self.values
        model: str | Model = v["model"]
        return v["path"].strip().removesuffix("/config.json") if model == ANOTHER else model

    def settings(self) -> dict[str, object]:
        """The arguments of `lab.plan`: controls that matter and are not off, and `other`."""
        v = self.values
        settings = {
            name: v[name]
            for name, control in ALL.items()
            if control.when(v) and (control.off is None or v[name] != control.off)
        }
        settings.pop("path", None)
        settings["model"] = self.model
        settings |= PRECISIONS[settings.pop("precision", "auto")][1]
        if v["gpus"] > 1 and "sharding" not in settings:
            alone = self.other.get("tensor_parallel") == v["gpus"]
            settings["sharding"] = "none" if alone else "ddp"
        spec = STAGES[v["stage"]]
        if spec.trainable and not spec.online:  # the trainer cuts where the plan ends
            settings["max_length"] = v["prompt_length"] + v["response_length"]
        return {**settings, **self.other}

    def apply(self, settings: Values) -> None:
        """Move the controls to these settings, without a call of `on_change`. Nothing moves where
        a setting cannot be shown: then it raises ValueError, one line."""
        before, other = self.values, dict(self.other)
        with self._quietly():
            try:
                self._set_all(settings)
            except ValueError:
                self.other = other
                for name, value in before.items():
                    self._set(ALL[name], value)
                raise
            finally:
                self._show_relevant()

    def remove(self, name: str) -> None:
        """Take back a setting that has no control."""
        self.other.pop(name, None)
        with self._quietly():
            self._show_relevant()
        self._on_change(name)

    # ------------------------------------------------------------------------------------- writing

    def _set_all(self, settings: Values) -> None:
        rest = dict(settings)
        precision = {k: rest.pop(k) for k in SETTINGS_OF_PRECISION if k in rest}
        if precision:
            self._set(ALL["precision"], _precision(precision))
        if "max_completion_length" in rest:  # TRL's name of it
            rest["response_length"] = rest.pop("max_completion_length")
        if rest.get("sharding") in ("none", "ddp"):
            rest["sharding"] = "copies"
        for name in [n for n in rest if n in ALL and n not in ("path", "precision")]:
            self._set(ALL[name], rest.pop(name))
        lengths = self.widgets["prompt_length"].value + self.widgets["response_length"].value
        if rest.get("max_length") == lengths:
            del rest["max_length"]
        self.other |= rest

    def _set(self, control: Control, value: object) -> None:
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

    def _list_models(self, value: object) -> None:
        """Choose a model: of the list, a handle, or a name for the text field."""
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

    def _list_hardware(self, value: object) -> None:
        """Choose a device: of the catalogue, "here", or a `Hardware` of one's own."""
        field = self.widgets["hardware"]
        if isinstance(value, str):
            here = value.strip().lower() == "here"
            if not here and in_catalogue(value) is None:
                hardware(value)  # raises, with what it may be
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
                self._set_nodes()
            self._show_relevant()
        self._on_change(name)

    def _set_nodes(self) -> None:
        """As many nodes as the devices need."""
        gpus = self.widgets["gpus"].value
        try:
            each = hardware(self.widgets["hardware"].value).devices_per_node
        except ValueError:  # a damaged calibration: the plan raises it
            return
        nodes = -(-gpus // each)
        if gpus % nodes == 0:
            self._set(ALL["nodes"], nodes)

    def _show_relevant(self) -> None:
        """Show what matters now, and nothing else."""
        v = self.values
        if v["gpus"] == 1 and v["nodes"] != 1:
            self._set(ALL["nodes"], 1)
        for group, controls in CONTROLS.items():
            relevant = [k.when(v) for k in controls]
            for control, matters in zip(controls, relevant):
                set_visible(self.widgets[control.name], matters)
            set_visible(self._titles[group], any(relevant))
        texts = {name: f"{name}={value!r}  ✕" for name, value in self.other.items()}
        if [b.description for b in self.extras.children] != list(texts.values()):
            self.extras.children = tuple(self._extra(*item) for item in texts.items())

    def _extra(self, name: str, text: str) -> w.Button:
        """A setting without a control: a button that takes it back."""
        button = w.Button(description=text, layout=w.Layout(width="auto"))
        set_tooltip(button, f"take {name} back")
        button.on_click(lambda _: self.remove(name))
        return button


# ------------------------------------------------------------------------------------ their making

_STYLE = {"description_width": "88px"}


def _widget(control: Control) -> w.Widget:
    room = w.Layout(width="322px")
    options = {"description": control.label, "layout": room, "style": _STYLE}
    if isinstance(control.start, bool):
        widget = w.Checkbox(value=control.start, indent=True, **options)
    elif control.slides:
        widget = w.SelectionSlider(options=control.pairs, value=control.start, **options)
    elif control.name == "path":
        widget = w.Text(placeholder="folder or owner/name", continuous_update=False, **options)
    else:
        widget = w.Dropdown(options=control.pairs, **options)
    set_tooltip(widget, control.tip)
    return widget


def _title(text: str) -> w.HTML:
    return w.HTML(f'<div class="lab-group">{text}</div>')


def _precision(settings: Values) -> str:
    """The choice of `PRECISIONS` that `dtype`, `bf16` and `fp16` amount to."""
    dtype: str = settings.get("dtype") or "float32"
    autocast = [name for name in ("bf16", "fp16") if settings.get(name)]
    if dtype == "float32":
        off = "bf16" in settings or "fp16" in settings
        return autocast[0] if autocast else "float32" if off else "auto"
    if autocast:
        raise ValueError(
            f"bf16/fp16 autocast works on fp32 weights: leave it out with dtype={dtype!r}"
        )
    return dtype


def set_tooltip(widget: w.Widget, text: str) -> None:
    """What a control means, on hover (ipywidgets 8, then 7)."""
    for name in ("tooltip", "description_tooltip"):
        if text and widget.has_trait(name):
            setattr(widget, name, text)
            return


def set_visible(widget: w.Widget, visible: bool) -> None:
    display = None if visible else "none"
    if widget.layout.display != display:
        widget.layout.display = display
