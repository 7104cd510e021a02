"""Models asked the same thing, side by side: a prompt, a button, and an answer of each.

    chat = Chat({"sft": answer_of_sft, "ppo": answer_of_ppo}, examples, note)
    chat                                 # the controls, and the answers below them
    chat.ask("Write a sad story about …") # the same from Python

The answers are an output of the cell, so a stored notebook shows them without a kernel. What models
wrote is text wherever it stands.
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
    there is to say of a prompt before it is asked, "" for nothing.

    The controls are plain ipywidgets, to be set from Python too: `example`, `prompt`,
    `temperature`, `max_new_tokens`, `seed`, `button`.
    """

    def __init__(
        self,
        models: Mapping[str, Answer],
        examples: Sequence[str] = (),
        note: Callable[[str], str] = lambda prompt: "",
    ) -> None:
        self.models, self._note = dict(models), note
        self.rows: list[dict[str, str]] = []
        self._said = "Not asked yet."
        self._output: DisplayHandle | None = None
        style = {"description_width": "initial"}

        def number(kind: type[w.Widget], name: str, **traits: float) -> w.Widget:
            layout = {"width": "170px"}
            return kind(description=name, style=style, layout=layout, **traits)

        self.example = w.Dropdown(
            description="Example",
            options=[("–", ""), *((" ".join(text.split())[:90], text) for text in examples)],
            style=style,
            layout={"width": "auto", "max_width": "620px"},
        )
        self.prompt = w.Textarea(
            description="Prompt",
            value=next(iter(examples), "").strip(),
            style=style,
            layout={"width": "auto", "max_width": "620px"},
        )
        self.temperature = number(
            w.BoundedFloatText, "Temperature", value=1.0, min=0.0, max=5.0, step=0.1
        )
        self.max_new_tokens = number(w.BoundedIntText, "New tokens", value=64, min=1, max=1024)
        self.seed = number(w.BoundedIntText, "Seed", value=0, min=0, max=2**31 - 1)
        self.button = w.Button(description=f"Ask {' and '.join(self.models)}"[:60])
        self.button.layout.width = "auto"
        self.button.on_click(self._clicked)
        self.example.observe(self._chosen, "value")
        settings = [self.temperature, self.max_new_tokens, self.seed, self.button]
        row = w.HBox(settings, layout={"flex_flow": "row wrap", "grid_gap": "4px 10px"})
        self.widget = w.VBox([*[self.example] * bool(examples), self.prompt, row])

    def _chosen(self, _: object) -> None:
        if self.example.value:
            self.prompt.value = self.example.value.strip()

    def _clicked(self, _: object) -> None:
        with suppress(OSError, ValueError):  # said below the answers
            self.ask()

    def ask(self, prompt: str | None = None) -> Listed[dict[str, str]]:
        """Ask every model what stands in the prompt box, or this. → a row for each."""
        if prompt is not None:
            self.prompt.value = prompt
        names = ("temperature", "max_new_tokens", "seed")
        prompt, settings = self.prompt.value, {n: getattr(self, n).value for n in names}
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

    def _show(self, said: str) -> None:
        self._said = said
        if self._output:
            self._output.update(self._bundle(), raw=True)

    def _bundle(self) -> dict[str, str]:
        def card(row: Mapping[str, str]) -> str:
            text = escape(shown(row["answer"])) or "<i>(empty)</i>"
            gold = row.get("gold reward")
            return (
                f'<div class="card"><h4>{escape(plain(row["model"]))}</h4>'
                f'<div class="text" tabindex="0">{text}</div>'
                + f'<div class="strip">gold reward {gold}</div>' * (gold is not None)
                + "</div>"
            )

        cards = "".join(map(card, self.rows))
        prompt = f'<div class="prompt">{escape(shown(self.prompt.value))}</div>' * bool(self.rows)
        html = (
            f'{STYLE}{UNLOADED}<div class="lab-tk lab-still lab-chat">{prompt}<div class="cards">'
            f'{cards}</div><div class="note" role="status">{escape(shown(self._said))}</div></div>'
        )
        return {"text/html": html, "text/plain": repr(self)}

    def __repr__(self) -> str:
        answers = [f"{row['model']}: {shown(row['answer'])}" for row in self.rows]
        return "\n".join(filter(None, [f"Chat({', '.join(self.models)})", *answers, self._said]))

    def _ipython_display_(self) -> None:
        display = notebook_display()
        if display is None:
            print(repr(self))
            return
        display(self.widget)
        self._output = display(self._bundle(), raw=True, display_id=True)
