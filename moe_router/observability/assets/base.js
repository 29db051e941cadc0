// What all parts share: the data, elements, numbers, the tooltip, the theme.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function make(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key in node && key !== "role") node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// base64 of little-endian uint16
function unpack16(text) {
  const raw = atob(text);
  const out = new Uint16Array(raw.length / 2);
  for (let i = 0; i < out.length; i++) out[i] = raw.charCodeAt(2 * i) | (raw.charCodeAt(2 * i + 1) << 8);
  return out;
}

function compact(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  for (const [unit, name] of [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit * 0.99999) return trim(value / unit) + name;
  }
  return size < 1e-3 ? value.toExponential(1).replace("e-", "e−") : trim(value);
}

const trim = (value) => String(Number(value.toPrecision(3)));
const fixed = (value) => (Math.abs(value) >= 1000 || (value !== 0 && Math.abs(value) < 0.01) ? compact(value) : value.toFixed(Math.abs(value) < 10 ? 3 : 1));
const percent = (value) => `${trim(value)}%`;
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

const tip = {
  box: byId("tip"),
  show(text, x, y) {
    this.box.textContent = text;
    this.box.hidden = false;
    const { width, height } = this.box.getBoundingClientRect();
    const left = Math.min(Math.max(8, x + 14), innerWidth - width - 8);
    const above = y - height - 14;
    this.box.style.left = `${left}px`;
    this.box.style.top = `${above < 8 ? y + 18 : above}px`;
  },
  hide() {
    this.box.hidden = true;
  },
};
addEventListener("scroll", () => tip.hide(), { passive: true });
addEventListener("keydown", (event) => event.key === "Escape" && tip.hide());

// Everything that must be drawn again when the colours or the width change.
const drawers = [];
const redraw = () => drawers.forEach((again) => again());
let lastWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === lastWidth) return;
  lastWidth = innerWidth;
  requestAnimationFrame(redraw);
});

const theme = {
  system: matchMedia("(prefers-color-scheme: dark)"),
  choice: new URLSearchParams(location.hash.slice(1)).get("theme") || "auto",
  apply() {
    const dark = this.choice === "dark" || (this.choice === "auto" && this.system.matches);
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    byId("theme").textContent = `Theme: ${this.choice}`;
    redraw();
  },
  start() {
    const order = ["auto", "light", "dark"];
    byId("theme").hidden = false;
    byId("theme").addEventListener("click", () => {
      this.choice = order[(order.indexOf(this.choice) + 1) % order.length];
      this.apply();
    });
    this.system.addEventListener("change", () => this.apply());
    this.apply();
  },
};
