"""The planner's controls as widgets of a notebook (ipywidgets), and a button that copies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ipywidgets as w
import traitlets

from ..stages import Settings
from .live import LabWidget, Quiet, set_visible
from .planner_controls import ALL, CONTROLS, Control, Controls

_HERE = Path(__file__).parent


class CopyButton(LabWidget):
    """Text and a button that copies it; `folded`: behind its label."""

    _esm = _HERE / "copy.js"
    _css = _HERE / "planner.css"
    text = traitlets.Unicode().tag(sync=True)
    label = traitlets.Unicode().tag(sync=True)
    folded = traitlets.Bool(False).tag(sync=True)


class ControlWidgets(Controls):
    """The controls, each with its widget; `box` holds them all. Whichever moves, the widget by hand
    or the value by code, the other follows."""

    def __init__(
        self, settings: Settings, on_change: Callable[[str], None], shown: Settings | None = None
    ) -> None:
        self._quiet = Quiet()
        self.widgets = {name: _widget(control) for name, control in ALL.items()}
        self._titles = {k: w.HTML(f'<div class="lab-group">{k}</div>') for k in CONTROLS}
        parts = []
        for group, controls in CONTROLS.items():
            parts += [self._titles[group], *(self.widgets[k.name] for k in controls)]
        self.extras = w.HBox(layout=w.Layout(flex_flow="row wrap"))
        self.box = w.VBox([*parts, self.extras], layout=w.Layout(width="330px", flex="0 0 auto"))
        self.box.add_class("lab-controls")
        super().__init__(settings, on_change, shown)
        for name, widget in self.widgets.items():
            widget.observe(lambda change, name=name: self._by_hand(name, change["new"]), "value")

    def _by_hand(self, name: str, value: object) -> None:
        if not self._quiet:
            self.move(name, value)

    def _set(self, name: str, value: object) -> None:
        super()._set(name, value)
        widget, options = self.widgets[name], self.options[name]
        with self._quiet, widget.hold_sync():
            if options and list(widget.options) != options:
                widget.options = options
            widget.value = self.values[name]

    def _show_relevant(self) -> None:
        super()._show_relevant()
        for name, matters in self.relevant.items():
            set_visible(self.widgets[name], matters)
        for group, controls in CONTROLS.items():
            set_visible(self._titles[group], any(self.relevant[k.name] for k in controls))
        if [b.description for b in self.extras.children] != list(self.beside.values()):
            self.extras.children = tuple(self._extra(*item) for item in self.beside.items())

    def _extra(self, name: str, text: str) -> w.Button:
        """A setting without a control: a button that takes it back."""
        button = w.Button(description=text, layout=w.Layout(width="auto"))
        set_tooltip(button, f"take {name} back")
        button.on_click(lambda _: self.remove(name))
        return button


def _widget(control: Control) -> w.Widget:
    options = {"description": control.label, "layout": w.Layout(width="322px")}
    options["style"] = {"description_width": "88px"}
    if isinstance(control.start, bool):
        widget = w.Checkbox(value=control.start, indent=True, **options)
    elif not control.choices:
        widget = w.Text(placeholder="folder or owner/name", continuous_update=False, **options)
    else:
        kind = w.SelectionSlider if control.slides else w.Dropdown
        widget = kind(options=control.pairs, value=control.start, **options)
    set_tooltip(widget, control.tip)
    return widget


def set_tooltip(widget: w.Widget, text: str) -> None:
    """What a control means, on hover (ipywidgets 8, then 7)."""
    for name in ("tooltip", "description_tooltip"):
        if text and widget.has_trait(name):
            setattr(widget, name, text)
            return
