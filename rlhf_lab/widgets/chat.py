"""Models asked the same thing, side by side: a prompt, a button, and an answer of each.

    chat = Chat({"sft": answer_of_sft, "ppo": answer_of_ppo}, examples, note)
    chat.ask("Write a sad story about …")        # as the button does

The answers are an output of the cell, so a stored notebook shows them without a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeAlias

import ipywidgets as w

from ..charts.tokens_view import STYLE, plain
from ..display import Listed, escape, format_number
from ..runs.progress import DisplayHandle, notebook_display
from .labeller import shown
from .live import UNLOADED

Answer: TypeAlias = Callable[..., tuple[str, float | None]]
"""(prompt, temperature=, max_new_tokens=, seed=) → text, and its gold reward where that is known"""


class Chat:
    """Asks `models` (name → what answers). `examples`: prompts to choose from; `note(prompt)`: what
    there is to say of a prompt, "" for nothing. The controls are plain ipywidgets, to be set from
    Python too: `example`, `prompt`, `temperature`, `max_new_tokens`, `seed`, `button`."""

    def __init__(
        self, models: Mapping[str, Answer], examples: Sequence[str], note: Callable[[str], str]
    ) -> None:
        self.models, self._note = dict(models), note
        self.rows: list[dict[str, str]] = []
        self._status = "Not asked yet."
        self._output: DisplayHandle | None = None

        def control(kind: type[w.Widget], name: str, width: str, **traits: object) -> w.Widget:
            layout, style = {"width": width, "max_width": "620px"}, {"description_width": "initial"}
            return kind(description=name, layout=layout, style=style, **traits)

        choices = [("–", ""), *((" ".join(text.split())[:90], text.strip()) for text in examples)]
        first, text, whole = choices[min(1, len(examples))][1], w.BoundedFloatText, w.BoundedIntText
        self.example = control(w.Dropdown, "Example", "auto", options=choices, value=first)
        self.prompt = control(w.Textarea, "Prompt", "auto", value=first)
        self.temperature = control(text, "Temperature", "170px", value=1, max=5, step=0.1)
        self.max_new_tokens = control(whole, "New tokens", "170px", value=64, min=1, max=1024)
        self.seed = control(whole, "Seed", "170px", max=2**31 - 1)
        self.button = w.Button(description=f"Ask {' and '.join(self.models)}"[:60])
        self.button.layout.width = "auto"
        self.button.on_click(self._clicked)
        self.example.observe(self._use_example, "value")
        settings = [self.temperature, self.max_new_tokens, self.seed, self.button]
        row = w.HBox(settings, layout={"flex_flow": "row wrap", "grid_gap": "4px 10px"})
        self.widget = w.VBox([*[self.example] * bool(examples), self.prompt, row])

    def _use_example(self, _: object) -> None:
        self.prompt.value = self.example.value or self.prompt.value

    def _clicked(self, _: object) -> None:
        with suppress(OSError, ValueError):  # it stands below the answers
            self.ask()

    def ask(self, prompt: str | None = None) -> Listed[dict[str, str]]:
        """Ask every model what stands in the prompt box, or this. → a row for each."""
        self.prompt.value = prompt = self.prompt.value if prompt is None else prompt
        settings = {n: getattr(self, n).value for n in ("temperature", "max_new_tokens", "seed")}
        self.rows, self.button.disabled = [], True
        try:
            for name, answer in self.models.items():
                self._show(f"Asking {name} …")
                text, gold = answer(prompt, **settings)
                reward = {} if gold is None else {"gold reward": format_number(gold)}
                self.rows.append({"model": name, "answer": text, **reward})
            self._show(self._note(prompt))
        except (OSError, ValueError) as error:
            self._show(str(error))
            raise
        finally:
            self.button.disabled = False
        return Listed(self.rows, list)

    def _show(self, status: str) -> None:
        self._status = status
        if self._output:
            self._output.update(self._bundle(), raw=True)

    def _bundle(self) -> dict[str, str]:
        """The answers as a notebook shows and stores them: what models wrote is text."""

        def part(kind: str, text: str) -> str:
            return f'<div class="{kind}" tabindex="0">{escape(shown(text))}</div>' * bool(text)

        cards = "".join(
            f'<div class="card"><h4>{escape(plain(row["model"]))}</h4>'
            + part("text", row["answer"] or "(empty)")
            + part("strip", "gold reward " * ("gold reward" in row) + row.get("gold reward", ""))
            + "</div>"
            for row in self.rows
        )
        asked = part("prompt", self.prompt.value * bool(self.rows))
        html = f'<div class="lab-tk lab-still lab-chat">{asked}<div class="cards">{cards}</div>'
        html += f'<div class="note" role="status">{escape(shown(self._status))}</div></div>'
        return {"text/html": STYLE + UNLOADED + html, "text/plain": repr(self)}

    def __repr__(self) -> str:
        answers = [f"{row['model']}: {shown(row['answer'])}" for row in self.rows]
        return "\n".join(filter(None, [f"Chat({', '.join(self.models)})", *answers, self._status]))

    def _ipython_display_(self) -> None:
        display = notebook_display()
        if display is None:
            print(repr(self))
            return
        display(self.widget)
        self._output = display(self._bundle(), raw=True, display_id=True)
