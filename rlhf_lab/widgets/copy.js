// Text with a button that copies it; `folded` puts it behind a summary that opens it.

function render({ model, el }) {
  const make = (parent, name, attributes = {}) =>
    parent.appendChild(Object.assign(document.createElement(name), attributes));
  const folded = model.get("folded");
  const root = make(el, folded ? "details" : "div", { className: "lab-copy" });
  if (folded) make(root, "summary", { textContent: model.get("label") });
  const row = make(root, "div", { className: "lab-copy-row" });
  const text = make(row, "pre", { tabIndex: 0 });
  const button = make(row, "button", { type: "button" });
  text.setAttribute("aria-label", model.get("label"));
  button.setAttribute("aria-label", `Copy ${model.get("label")}`);
  const spoken = make(row, "span", { className: "lab-copy-spoken" });
  spoken.setAttribute("role", "status");
  let timer = 0;

  function say(words) {
    button.textContent = spoken.textContent = words;
    clearTimeout(timer);
    timer = setTimeout(() => { button.textContent = "Copy"; spoken.textContent = ""; }, 2500);
  }

  // A page that is not served over https, or that may not touch the clipboard, selects instead.
  async function copy() {
    try {
      await navigator.clipboard.writeText(model.get("text"));
      return say("Copied");
    } catch { /* the next best */ }
    getSelection().selectAllChildren(text);
    let done = false;
    try { done = document.execCommand("copy"); } catch { /* nor that */ }
    say(done ? "Copied" : "Selected: press Ctrl+C");
  }

  const write = () => { text.textContent = model.get("text"); };
  button.textContent = "Copy";
  button.addEventListener("click", copy);
  model.on("change:text", write);
  write();
  return () => { clearTimeout(timer); model.off("change:text", write); };
}

export default { render };
