// Shows a chart that Python drew, and says the values under the pointer or the arrow keys.
// The drawing is `chart.py`'s: here are only the hair line, the dots on it and the box beside it.

const SVG = "http://www.w3.org/2000/svg";
const SHAPES = new Set(["svg", "g", "path", "line", "rect", "circle", "text", "title"]);

async function inflate(bytes) {
  const packed = new Blob([bytes]).stream();
  return new Response(packed.pipeThrough(new DecompressionStream("deflate"))).text();
}

// Python escapes what people and models write. This is the second wall: a parser that runs
// nothing, and only the elements and attributes that a chart needs.
function adopt(text) {
  const svg = new DOMParser().parseFromString(text, "image/svg+xml").documentElement;
  if (svg.namespaceURI !== SVG || svg.localName !== "svg") throw new Error("not an SVG");
  for (const node of [svg, ...svg.querySelectorAll("*")]) {
    if (node.namespaceURI !== SVG || !SHAPES.has(node.localName)) node.remove();
    for (const { name, value } of [...node.attributes]) {
      const asks = name === "style" && /url|image|\\/i.test(value); // may name another host
      if (asks || /^on|href$/i.test(name)) node.removeAttribute(name);
    }
  }
  // The browser's own tooltips come late and would lie over ours.
  for (const title of svg.querySelectorAll("title")) {
    title.parentNode.dataset.label = title.textContent;
    title.remove();
  }
  return document.importNode(svg, true);
}

const numbers = (text) => (text ? text.split(" ").map((n) => Number(n.replaceAll(",", ""))) : []);

// One chart of the picture: its axes, its curves, or the blocks of its bars, and its stops: the
// places that the arrow keys visit.
function readPlot(node) {
  const [left, top, right, bottom] = numbers(node.dataset.box);
  const [x0, x1] = numbers(node.dataset.xs);
  const [y0, y1] = numbers(node.dataset.ys);
  const curves = [...node.querySelectorAll(".curve")].map(({ dataset: d }) => ({
    name: d.name, colour: d.colour, xs: numbers(d.x), ys: numbers(d.y),
    xTexts: (d.x ?? "").split(" "), yTexts: (d.y ?? "").split(" "),
  }));
  const blocks = curves.length ? [] : [...node.ownerSVGElement.querySelectorAll(".block")]
    .filter((b) => b.ownerSVGElement === node.ownerSVGElement);
  const stops = blocks.length ? blocks
    : [...new Set(curves.flatMap((c) => c.xs))].sort((a, b) => a - b);
  return {
    node, left, top, right, bottom, curves, stops, bars: blocks.length > 0,
    xLabel: node.dataset.xLabel,
    x: (v) => left + ((v - x0) / (x1 - x0)) * (right - left),
    y: (v) => bottom - ((v - y0) / (y1 - y0)) * (bottom - top),
    value: (px) => x0 + ((px - left) / (right - left)) * (x1 - x0),
  };
}

function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const mid = (low + high) >> 1;
    if (sorted[mid] < value) low = mid + 1; else high = mid;
  }
  return low > 0 && value - sorted[low - 1] <= sorted[low] - value ? low - 1 : low;
}

function make(parent, name, attributes, text = "") {
  const node = parent.namespaceURI === SVG
    ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text) node.textContent = text;
  return parent.appendChild(node);
}

function render({ model, el }) {
  const root = make(el, "div", {
    class: "lab-chart", tabindex: "0", role: "group",
    "aria-label": "Chart: the arrow keys read its values",
    "data-lm-suppress-shortcuts": "true", // JupyterLab's own arrow keys would move to another cell
  });
  const canvas = make(root, "div", {});
  const box = make(root, "div", { class: "lab-box", "aria-hidden": "true" });
  const spoken = make(root, "span", { class: "lab-spoken", role: "status" });
  box.hidden = true;
  let plots = [], here = null, turn = 0;

  async function paint() {
    const mine = ++turn;
    const bytes = model.get("svg");
    if (!bytes || !bytes.byteLength) return;
    const svg = adopt(await inflate(bytes));
    if (mine !== turn) return; // a later picture has overtaken this one
    canvas.replaceChildren(svg);
    plots = [...svg.querySelectorAll("g.plot")].map(readPlot).filter((p) => p.stops.length);
    if (here) go(here.plot, stopNear(plots[here.plot], here.place));
  }

  const stopNear = (plot, place) =>
    !plot ? -1 : plot.bars ? Math.min(place, plot.stops.length - 1) : nearest(plot.stops, place);

  function clear() {
    for (const mark of canvas.querySelectorAll(".lab-mark")) mark.remove();
    for (const lit of canvas.querySelectorAll(".lab-lit")) lit.classList.remove("lab-lit");
    box.hidden = true;
  }

  function leave() {
    here = null;
    spoken.textContent = "";
    clear();
  }

  // Reads stop number `stop` of a plot: marks it, fills the box, and returns what it says.
  function go(number, stop) {
    const plot = plots[number];
    if (!plot || stop < 0) return leave();
    clear();
    box.replaceChildren();
    const at = plot.stops[stop];
    here = { plot: number, stop, place: plot.bars ? stop : at };
    return plot.bars ? readBlock(plot, at) : readCurves(plot, at);
  }

  function readBlock(plot, block) {
    block.classList.add("lab-lit");
    const x = block.x.baseVal.value + block.width.baseVal.value;
    return put(plot, x, block.y.baseVal.value, [[block.style.fill, block.dataset.label, ""]]);
  }

  function readCurves(plot, at) {
    const marks = make(plot.node, "g", { class: "lab-mark" });
    const x = plot.x(at);
    make(marks, "line", { class: "lab-hair", x1: x, x2: x, y1: plot.top, y2: plot.bottom });
    const rows = [];
    let label = "";
    for (const { name, colour, xs, ys, xTexts, yTexts } of plot.curves) {
      if (!xs.length) continue;
      const i = nearest(xs, at);
      // A curve with no point at the hair line says where its nearest one is.
      const elsewhere = xs[i] === at ? "" : ` (${plot.xLabel} ${xTexts[i]})`;
      if (!elsewhere) label = `${plot.xLabel} ${xTexts[i]}`;
      const dot = { cx: plot.x(xs[i]), cy: plot.y(ys[i]), r: 3.4 };
      make(marks, "circle", { class: "lab-dot", ...dot }).style.fill = colour;
      rows.push([colour, name, yTexts[i] + elsewhere]);
    }
    make(box, "div", {}, label);
    return put(plot, x, plot.top, rows, label);
  }

  // Puts the box beside a place of the plot, on the side where there is room.
  function put(plot, x, y, rows, label = "") {
    for (const [colour, name, value] of rows) {
      const row = make(box, "div", {});
      make(row, "i", {}).style.background = colour;
      make(row, "span", {}, name);
      row.append(" ");
      if (value) make(row, "b", {}, value);
    }
    box.hidden = false;
    const place = new DOMPoint(x, y).matrixTransform(plot.node.getScreenCTM());
    const frame = root.getBoundingClientRect();
    const px = place.x - frame.left, py = place.y - frame.top;
    const fits = px + 12 + box.offsetWidth <= frame.width;
    box.style.left = `${Math.max(0, fits ? px + 12 : px - 12 - box.offsetWidth)}px`;
    box.style.top = `${Math.max(0, Math.min(py, frame.height - box.offsetHeight))}px`;
    const words = rows.map(([, name, value]) => `${name} ${value}`.trim());
    return [label, ...words].filter(Boolean).join("; ");
  }

  function point(event) {
    const label = event.target.dataset?.label;
    for (const [number, plot] of plots.entries()) {
      const at = new DOMPoint(event.clientX, event.clientY)
        .matrixTransform(plot.node.getScreenCTM().inverse());
      const inside = at.x > plot.left - 6 && at.x < plot.right + 6
        && at.y > plot.top && at.y < plot.bottom;
      if (!inside) continue;
      const stop = plot.bars ? plot.stops.indexOf(event.target)
        : nearest(plot.stops, plot.value(at.x));
      if (stop >= 0) return go(number, stop);
    }
    leave();
    if (!label) return;
    const frame = root.getBoundingClientRect();
    box.replaceChildren(label);
    box.hidden = false;
    const room = frame.width - box.offsetWidth;
    box.style.left = `${Math.max(0, Math.min(event.clientX - frame.left, room))}px`;
    box.style.top = `${event.clientY - frame.top + 14}px`;
  }

  function press(event) {
    if (event.ctrlKey || event.altKey || event.metaKey || !plots.length) return;
    const { plot, stop } = here ?? { plot: 0, stop: null };
    const last = plots[plot]?.stops.length - 1;
    const other = (by) => {
      const next = Math.min(Math.max(plot + by, 0), plots.length - 1);
      return [next, plots[next].stops.length - 1];
    };
    const moves = {
      ArrowLeft: () => [plot, stop === null ? last : Math.max(stop - 1, 0)],
      ArrowRight: () => [plot, stop === null ? 0 : Math.min(stop + 1, last)],
      ArrowUp: () => other(here ? -1 : 0),
      ArrowDown: () => other(here ? 1 : 0),
      Home: () => [plot, 0],
      End: () => [plot, last],
    };
    if (event.key === "Escape") {
      leave();
      root.blur();
    } else if (moves[event.key]) spoken.textContent = go(...moves[event.key]()) ?? "";
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  root.addEventListener("pointermove", point);
  root.addEventListener("pointerdown", point);
  root.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && leave());
  root.addEventListener("keydown", press);
  root.addEventListener("blur", leave);
  model.on("change:svg", paint);
  paint();
  return () => model.off("change:svg", paint);
}

export default { render };
