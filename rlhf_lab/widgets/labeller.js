// Two responses side by side: a click or a key says which is better. The kernel keeps the state in
// one trait, `view`, so that a reload shows it; what we do goes there as a message and counts when
// `view` has come back. Every text is set as text.

const KEYS = {
  ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", t: "tie", ArrowUp: "skip", s: "skip",
  Backspace: "undo", z: "undo",
};
const PATIENCE = 1500; // ms without an answer of the kernel before we say so

function element(tag, className, text = "") {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

function render({ model, el }) {
  const root = element("div", "rlhf-labeller");
  root.tabIndex = 0;
  root.setAttribute("role", "group");
  root.setAttribute("aria-label", "Which response is better?");

  const buttons = {};
  const button = (action, label, keys) => {
    const node = element("button", `act ${action}`, label);
    node.type = "button";
    if (keys) node.setAttribute("aria-keyshortcuts", keys);
    node.addEventListener("click", () => act(action));
    buttons[action] = node;
    return node;
  };

  const head = element("div", "head");
  const place = element("strong", "place");
  const counts = element("span", "counts");
  head.append(place, counts);
  const bar = element("div", "bar");
  bar.setAttribute("role", "progressbar");
  bar.setAttribute("aria-label", "pairs labelled");
  const fill = element("div", "fill");
  bar.append(fill);

  const prompt = element("div", "prompt");
  const sides = element("div", "sides");
  const texts = {};
  for (const [side, label, key] of [
    ["left", "Left is better (←)", "ArrowLeft"], ["right", "Right is better (→)", "ArrowRight"],
  ]) {
    const panel = element("div", `panel ${side}`);
    texts[side] = element("div", "text");
    texts[side].setAttribute("role", "region");
    texts[side].setAttribute("aria-label", `${side} response`);
    panel.append(texts[side], button(side, label, key));
    sides.append(panel);
  }
  const more = element("div", "more");
  more.append(
    button("tie", "Tie (t or ↓)", "t ArrowDown"), button("skip", "Skip (s or ↑)", "s ArrowUp"),
    button("undo", "Undo (z or Backspace)", "z Backspace"),
  );
  const note = element("div", "note");
  note.setAttribute("role", "status");
  const hint = element("div", "hint");
  const tally = element("div", "tally");
  root.append(head, bar, prompt, sides, more, note, hint, tally);
  el.replaceChildren(root);

  let waiting = 0; // the timer of an answer that the kernel has not confirmed
  let since = performance.now();
  let id = null;

  function act(action) {
    const view = model.get("view");
    if (waiting || (action in texts || action === "tie" || action === "skip") && !view.id) return;
    const lost = () => {
      note.textContent = "Not saved yet: the kernel is busy, or gone (then run the cell again).";
      root.classList.add("lost");
    };
    waiting = setTimeout(lost, PATIENCE);
    root.classList.add("waiting");
    try {
      model.send({ do: action, pair: view.id, seconds: (performance.now() - since) / 1000 });
    } catch {
      lost();
    }
  }

  function keep(row) {
    // Name, the share on a scale from 0 to 100 %, and its figures.
    const track = element("div", "track");
    track.append(element("div", "half"));
    if (row.low !== null) {
      const span = element("div", "span");
      span.style.left = `${100 * row.low}%`;
      span.style.width = `${100 * (row.high - row.low)}%`;
      track.append(span);
    }
    const dot = element("div", row.low === null ? "dot computed" : "dot");
    dot.style.left = `${100 * row.share}%`;
    track.append(dot);
    track.setAttribute("aria-hidden", "true");
    return [element("div", "name", row.name), track, element("div", "figure", row.full)];
  }

  function draw() {
    const view = model.get("view");
    clearTimeout(waiting);
    waiting = 0;
    root.classList.remove("waiting", "lost");
    if (view.id !== id) since = performance.now();
    id = view.id;
    place.textContent = view.id ? `Pair ${view.done + 1} of ${view.total}`
      : `All ${view.total} pairs are labelled`;
    counts.textContent = `${view.counts}; saved in ${view.file}`;
    fill.style.width = `${100 * view.done / view.total}%`;
    for (const [name, value] of [["min", 0], ["max", view.total], ["now", view.done]]) {
      bar.setAttribute(`aria-value${name}`, value);
    }
    prompt.textContent = view.prompt;
    for (const side of ["left", "right"]) {
      texts[side].textContent = view[side].trim() ? view[side] : "(empty)";
      texts[side].classList.toggle("empty", !view[side].trim());
      texts[side].scrollTop = 0;
      // What is longer than its panel can be scrolled by keyboard too.
      if (texts[side].scrollHeight > texts[side].clientHeight + 1) texts[side].tabIndex = 0;
      else texts[side].removeAttribute("tabindex");
    }
    prompt.hidden = sides.hidden = buttons.tie.hidden = buttons.skip.hidden = !view.id;
    buttons.undo.disabled = !view.undo;
    note.textContent = view.note;
    if (view.revealed) {
      tally.replaceChildren(...view.rows.flatMap(keep));
    } else {
      tally.replaceChildren(
        element("span", "hidden", "How well you agree is hidden until the end."),
        buttons.reveal || button("reveal", "Show it now"),
      );
    }
    tally.classList.toggle("table", view.revealed);
    sayKeys();
  }

  function sayKeys() {
    const here = root.contains(document.activeElement);
    const keys = model.get("view").id ? "← and → choose, t tie, s skip, z undo" : "z undo";
    hint.textContent = here ? `The keys are on: ${keys}.` : "Click here to use the keys.";
    root.classList.toggle("focused", here);
  }

  root.addEventListener("keydown", (event) => {
    // With Ctrl, Alt or Cmd a key is the notebook's (save, ...), and so is Shift+Enter. Any other
    // letter stays here: an x or a dd beside our keys would cut a cell.
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const ours = Object.hasOwn(KEYS, key);
    if (ours || key.length === 1 || (key === "Enter" && !event.shiftKey)) event.stopPropagation();
    if (!ours) return;
    event.preventDefault();
    if (!event.repeat) act(KEYS[key]);
  });
  root.addEventListener("click", (event) => {
    // A selected text is being read or copied; a button keeps the focus that it got.
    if (!event.target.closest("button") && !String(getSelection())) root.focus({ preventScroll: true });
  });
  root.addEventListener("focusin", sayKeys);
  root.addEventListener("focusout", () => setTimeout(sayKeys));
  model.on("change:view", draw);
  draw();
  return () => {
    clearTimeout(waiting);
    model.off("change:view", draw);
  };
}

export default { render };
