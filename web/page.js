// Draws what Python answers (`planner_page.py`) and asks it anew when a control
// moves. No figure is computed here. Whatever an address or an answer says becomes text nodes.

import chart from "./chart.js";
import copy from "./copy.js";

const $ = (id) => document.getElementById(id);
const REST = 150; // ms that the controls rest before the changes are worked out

function make(parent, name, attributes = {}, text = "") {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text) node.textContent = text;
  return parent.appendChild(node);
}

// What chart.js and copy.js, written for a notebook, know of a widget.
function widget(render, el, values) {
  const heard = {};
  const model = {
    get: (name) => values[name],
    on: (event, work) => { (heard[event] ??= []).push(work); },
    off: () => {},
    set(name, value) {
      if (values[name] === value) return;
      values[name] = value;
      for (const work of heard[`change:${name}`] ?? []) work();
    },
  };
  render({ model, el });
  return model;
}

// -- Python ------------------------------------------------------------------------------------
const worker = new Worker("worker.js", { type: "module" });
const waiting = new Map();
let count = 0;

function ask(name, ...values) {
  return new Promise((done, fail) => {
    waiting.set(++count, { done, fail });
    worker.postMessage({ id: count, ask: name, values });
  });
}

worker.onmessage = ({ data }) => {
  if (data.ready) return say("");
  if (data.failed) return giveUp(data.failed);
  const { done, fail } = waiting.get(data.id);
  waiting.delete(data.id);
  if ("error" in data) fail(new Error(data.error)); else done(data.answer);
};
worker.onerror = () => giveUp("this page has to be served, not opened as a file");

function say(words) {
  $("status").textContent = words;
}

// The default plan, where that is painted, stays right; nothing else can be had.
let dead = false;

function giveUp(why) {
  dead = true;
  if (drawn === null) showVerdict("error", "⚠ what the address says cannot be planned");
  say(`⚠ Python did not start, so the controls do nothing: ${why}`);
  $("controls").inert = true;
}

// -- asking: one question at a time; of moves that wait, the last one of each control --------------
const queue = new Map();
let busy = false, timer = 0;

function request(key, name, ...values) {
  queue.delete(key);
  queue.set(key, [name, values]);
  work();
}

async function work() {
  if (busy) return;
  clearTimeout(timer);
  busy = true;
  document.documentElement.dataset.settled = "";
  try {
    while (queue.size) {
      const [key, [name, values]] = queue.entries().next().value;
      queue.delete(key);
      draw(JSON.parse(await ask(name, ...values)));
      document.documentElement.dataset.answered = "yes";
    }
  } catch (error) {
    if (!dead) showVerdict("error", `⚠ ${error.message}`);
  }
  busy = false;
  if (queue.size) work(); else timer = setTimeout(advise, REST);
}

async function advise() {
  busy = true;
  try {
    const advice = JSON.parse(await ask("advice"));
    if (!queue.size) {
      drawAdvice(advice);
      if (drawn !== null) history.replaceState(null, "", `#${drawn}`);
    }
  } catch (error) {
    if (!dead) showVerdict("error", `⚠ ${error.message}`);
  }
  busy = false;
  if (queue.size) work(); else document.documentElement.dataset.settled = location.hash.slice(1);
}

// -- the controls ------------------------------------------------------------------------------
const controls = new Map();
const groups = [];
let extras = null;

function build(described) {
  for (const [title, list] of Object.entries(described)) {
    const group = make($("controls"), "fieldset");
    make(group, "legend", { class: "lab-group" }, title);
    groups.push([group, list.map((k) => k.name)]);
    for (const k of list) controls.set(k.name, buildControl(group, k));
  }
  extras = make($("controls"), "div", { class: "row", "aria-label": "Settings without a control", role: "group" });
}

function buildControl(group, { name, label, tip, kind }) {
  const row = make(group, "div", { class: `control ${kind}` });
  const id = `control-${name}`;
  make(row, "label", { for: id }, label);
  const input = kind === "list" ? make(row, "select", { id })
    : make(row, "input", { id, type: { slider: "range", box: "checkbox", text: "text" }[kind] });
  if (tip) input.title = tip;
  if (kind === "text") input.placeholder = "owner/name";
  const output = kind === "slider" ? make(row, "output", { for: id }) : null;
  const control = { row, input, output, kind, choices: "" };
  const value = () => (kind === "box" ? input.checked : kind === "text" ? input.value : Number(input.value));
  input.addEventListener(kind === "slider" ? "input" : "change", () => {
    if (output) say_value(control);
    request(name, "move", name, value());
  });
  return control;
}

function say_value({ input, output, texts }) {
  output.textContent = texts[input.value] ?? "";
  input.setAttribute("aria-valuetext", output.textContent);
}

function drawControl({ name, kind, choices, value, shown }) {
  const control = controls.get(name);
  const { row, input } = control;
  row.hidden = !shown;
  if (queue.has(name)) return; // it has moved on: Python is asked next
  if (kind === "box") input.checked = value;
  else if (kind === "text") input.value = value;
  else {
    const texts = choices.join("\n");
    if (texts !== control.choices) {
      control.choices = texts;
      control.texts = choices;
      if (kind === "slider") Object.assign(input, { min: 0, max: choices.length - 1, step: 1 });
      else input.replaceChildren(...choices.map((text, i) => new Option(text, i)));
    }
    input.value = value;
    if (kind === "slider") say_value(control);
  }
}

// -- the answer --------------------------------------------------------------------------------
const picture = widget(chart.render, $("chart"), { svg: null });
const code = widget(copy.render, $("code"), { label: "the call that makes this plan", text: "" });
const files = new Map();

function showVerdict(state, text) {
  const node = $("verdict");
  node.className = `lab-verdict ${state}`;
  if (node.textContent !== text) node.textContent = text;
  $("answer").classList.toggle("stale", state === "error");
}

let drawn = "";

function draw(s, first = false) {
  for (const list of Object.values(s.controls)) list.forEach(drawControl);
  for (const [group, names] of groups) group.hidden = names.every((n) => controls.get(n).row.hidden);
  extras.replaceChildren();
  for (const [name, text] of Object.entries(s.extras)) {
    make(extras, "button", { type: "button", title: `take ${name} back` }, text)
      .addEventListener("click", () => request("extra", "remove", name));
  }
  if (s.svg) picture.set("svg", Uint8Array.from(atob(s.svg), (c) => c.charCodeAt(0)));
  if (s.figures.length) drawFigures(s.figures);
  $("undo").hidden = !s.undo;
  code.set("text", s.code);
  $("ledger").disabled = first || !s.figures.length;
  showVerdict(s.state, s.verdict);
  drawn = s.state === "error" ? null : s.fragment;
  $("controls").inert = false;
}

function drawFigures(rows) {
  const table = $("figures");
  table.querySelectorAll("tr").forEach((row) => row.remove());
  const head = make(table, "tr");
  for (const name of Object.keys(rows[0])) make(head, name ? "th" : "td", name ? { scope: "col" } : {}, name);
  for (const row of rows) {
    const line = make(table, "tr");
    Object.values(row).forEach((text, i) => make(line, i ? "td" : "th", i ? {} : { scope: "row" }, text));
  }
}

function drawAdvice({ title, remedies, files: texts }, first = false) {
  $("advice").replaceChildren();
  if (remedies.length) make($("advice"), "h2", { class: "lab-group" }, title);
  remedies.forEach(([text, tip], place) => {
    const button = make($("advice"), "button", { type: "button", class: "lab-remedy", title: tip }, text);
    button.disabled = first;
    button.addEventListener("click", () => request("press", "press", place));
  });
  for (const [name, text] of Object.entries(texts)) {
    if (!files.has(name)) {
      const box = make($("files"), "div", { class: "file" });
      const shown = widget(copy.render, box, { label: name, text: "", folded: true });
      make(box, "button", { type: "button" }, `Download ${name}`)
        .addEventListener("click", () => download(name, shown.get("text")));
      files.set(name, { box, shown });
    }
    files.get(name).shown.set("text", text);
  }
  for (const [name, { box }] of files) box.hidden = !(name in texts);
}

function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
  const link = make(document.body, "a", { href: url, download: name });
  link.click();
  link.remove();
  URL.revokeObjectURL(url);
}

$("undo").addEventListener("click", () => request("press", "press", -1));
$("ledger").addEventListener("click", async () => download("ledger.jsonl", await ask("ledger")));
$("controls").addEventListener("submit", (event) => event.preventDefault());
$("link").addEventListener("click", async (event) => {
  const address = `${location.href.split("#")[0]}#${drawn ?? location.hash.slice(1)}`;
  try {
    await navigator.clipboard.writeText(address);
    event.target.textContent = "Copied";
  } catch {
    event.target.textContent = "It is in the address bar";
  }
  setTimeout(() => { event.target.textContent = "Copy the link"; }, 2500);
});
addEventListener("hashchange", () => {
  if (location.hash.slice(1) !== drawn) open(location.hash.slice(1));
});

// -- the first paint, before Python: the plan that the page was built with ---------------------------
const { state, advice, narrow } = JSON.parse($("first").textContent);
const phone = matchMedia("(max-width: 36rem)").matches;
if (phone) state.svg = narrow;
const open = (fragment) => request("open", "open", fragment, ...(phone ? [376] : []));
build(state.controls);
draw(state, true);
const asked = location.hash.slice(1);
if (asked && asked !== state.fragment) {
  $("controls").inert = true; // they stand where the address does not
  drawn = null;
  showVerdict("error", "… Python starts, and then plans what the address says");
} else drawAdvice(advice, true);
performance.mark("first");
open(asked);
