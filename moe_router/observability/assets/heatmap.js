// Load per expert over time: one canvas a layer, colour is the logarithm of load over mean load.
const OCTAVES = 2; // the colours end at a quarter of the mean and at four times the mean

const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

function heatColors() {
  const [low, mid, high] = ["--low", "--mid", "--high"].map((name) => rgb(css(name)));
  return (relative) => {
    const t = relative > 0 ? Math.max(-1, Math.min(1, Math.log2(relative) / OCTAVES)) : -1;
    const end = t < 0 ? low : high;
    return mid.map((m, i) => Math.round(m + (end[i] - m) * Math.abs(t)));
  };
}

function heatmaps() {
  const load = data.load;
  if (!load) return;
  byId("maps-card").hidden = false;
  byId("maps").classList.toggle("few", load.layers.length <= 4 && load.layers.length !== 3);
  const names = ["≤ ¼×", "½×", "mean", "2×", "≥ 4×"].map((text) => make("span", { textContent: text }));
  byId("scale").append(make("i", { style: "background: linear-gradient(90deg, var(--low), var(--mid), var(--high))" }), ...names);
  load.layers.forEach((packed, i) => {
    const block = data.moe_layers[i];
    heatmap(block === undefined ? `MoE layer ${i}` : `Layer ${block}`, unpack16(packed), load);
  });
}

function heatmap(title, cells, load) {
  const E = load.experts, C = load.steps.length;
  const canvas = make("canvas", { width: C, height: E, tabIndex: 0, role: "img" });
  const last = cells.slice((C - 1) * E);
  const top = last.reduce((best, value, e) => (value > last[best] ? e : best), 0);
  canvas.setAttribute("aria-label", `${title}: at step ${load.steps[C - 1]} the busiest of ${E} experts is ${top}, ${trim(last[top] / load.scale)} times the mean. Arrow keys read the values.`);
  canvas.style.height = `${Math.max(96, Math.min(256, E * 15))}px`;
  const ys = make("div", { className: "ys" }, ...expertTicks(E).map((e) => make("span", { textContent: e })));
  const xs = make("div", { className: "xs" }, make("span", { textContent: `step ${load.first.toLocaleString("en")}` }), make("span", { textContent: load.steps[C - 1].toLocaleString("en") }));
  byId("maps").append(make("div", {}, make("h4", { textContent: title }), make("div", { className: "map" }, ys, canvas, xs)));
  drawers.push(() => paint(canvas, cells, load));
  explore(canvas, cells, load, title);
}

function expertTicks(E) {
  if (E <= 8) return Array.from({ length: E }, (_, e) => e);
  return [0, 1, 2, 3].map((i) => Math.round((i * (E - 1)) / 3));
}

function paint(canvas, cells, load) {
  const E = load.experts, C = load.steps.length;
  const color = heatColors(), context = canvas.getContext("2d"), image = context.createImageData(C, E);
  cells.forEach((value, i) => {
    const at = 4 * ((i % E) * C + Math.floor(i / E));
    image.data.set([...color(value / load.scale), 255], at);
  });
  context.putImageData(image, 0, 0);
}

function explore(canvas, cells, load, title) {
  const E = load.experts, C = load.steps.length;
  let at = [C - 1, 0];
  const show = (column, expert) => {
    at = [Math.min(Math.max(0, column), C - 1), Math.min(Math.max(0, expert), E - 1)];
    const relative = cells[at[0] * E + at[1]] / load.scale, box = canvas.getBoundingClientRect();
    const text = `${title}, step ${load.steps[at[0]].toLocaleString("en")}\nexpert ${at[1]}: ${relative.toFixed(2)}× the mean (${percent((100 * relative) / E)} of rows)`;
    tip.show(text, box.left + ((at[0] + 0.5) / C) * box.width, box.top + ((at[1] + 0.5) / E) * box.height);
  };
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    show(Math.floor(((event.clientX - box.left) / box.width) * C), Math.floor(((event.clientY - box.top) / box.height) * E));
  });
  for (const end of ["pointerleave", "blur"]) canvas.addEventListener(end, () => tip.hide());
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (move) { event.preventDefault(); show(at[0] + move[0], at[1] + move[1]); }
  });
}
