// One line chart in SVG: curves with their range, points, marks, a reference line and a crosshair.
const EDGE = { left: 46, right: 14, top: 14, bottom: 26 };

// options: title, note, height, format, floor, ceiling, curves [{name, color, data, dash}],
// points {name, color, x, y, notes}, marks [{x, text}], level {y, name}
function chart(host, options) {
  const keys = make("div", { className: "keys" });
  const head = make("div", { className: "head" }, make("h3", { textContent: options.title }), keys);
  if (options.note) head.append(make("p", { textContent: options.note }));
  const slot = make("div");
  host.replaceChildren(head, slot);
  fillKeys(keys, options);
  const again = () => slot.replaceChildren(plot(slot.clientWidth || 320, options));
  drawers.push(again);
}

function fillKeys(keys, options) {
  const line = (color, dash) => draw("svg", { width: 18, height: 8 }, draw("line", { x1: 0, x2: 18, y1: 4, y2: 4, stroke: `var(${color})`, "stroke-width": 2.4, "stroke-dasharray": dash || "none" }));
  const add = (picture, name) => keys.append(make("span", {}, picture, name));
  const many = options.curves.length > 1 || options.points || options.level;
  if (!many) return;
  for (const curve of options.curves) add(line(curve.color, curve.dash), curve.name);
  if (options.points) add(draw("svg", { width: 12, height: 12 }, draw("circle", { cx: 6, cy: 6, r: 4, fill: `var(${options.points.color})` })), options.points.name);
  if (options.level) add(line("--faint", "2 4"), options.level.name);
  if (options.marks?.length) add(draw("svg", { width: 12, height: 12 }, draw("path", { d: "M6 0l6 6-6 6-6-6z", fill: "var(--mark)" })), "actor lost, recovered");
}

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((m) => m * power >= rough) * power;
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) out.push(i * step);
  return out;
}

function bounds(options) {
  const ys = options.curves.flatMap((curve) => curve.data.low.concat(curve.data.high));
  if (options.points) ys.push(...options.points.y);
  if (options.level) ys.push(options.level.y);
  let low = ys.reduce((a, b) => Math.min(a, b), Infinity);
  let high = ys.reduce((a, b) => Math.max(a, b), -Infinity);
  if (options.floor !== undefined) low = Math.min(low, options.floor);
  if (options.ceiling !== undefined) high = Math.max(high, options.ceiling);
  const room = high > low ? (high - low) * 0.04 : Math.abs(high) * 0.1 || 1;
  return [low === options.floor ? low : low - room, high === options.ceiling ? high : high + room];
}

function plot(width, options) {
  const height = options.height || 210;
  const xs = options.curves.flatMap((curve) => curve.data.x).concat(options.points?.x || []);
  const first = Math.min(...xs, 1), last = Math.max(...xs, first + 1);
  const [low, high] = bounds(options);
  const X = (x) => EDGE.left + ((x - first) / (last - first)) * (width - EDGE.left - EDGE.right);
  const Y = (y) => height - EDGE.bottom - ((y - low) / (high - low)) * (height - EDGE.top - EDGE.bottom);
  const svg = draw("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, height, tabindex: 0, role: "img", "aria-label": describe(options) });
  for (const y of ticks(low, high, height / 48)) {
    svg.append(draw("line", { class: "gridline", x1: EDGE.left, x2: width - EDGE.right, y1: Y(y), y2: Y(y) }));
    svg.append(draw("text", { x: EDGE.left - 8, y: Y(y) + 4, "text-anchor": "end" }, (options.axis || compact)(y)));
  }
  for (const x of ticks(first, last, Math.max(2, width / 110)).filter(Number.isInteger)) {
    svg.append(draw("text", { x: X(x), y: height - 6, "text-anchor": "middle" }, compact(x)));
  }
  svg.append(draw("line", { class: "axis", x1: EDGE.left, x2: width - EDGE.right, y1: height - EDGE.bottom, y2: height - EDGE.bottom }));
  if (options.level) svg.append(draw("line", { x1: EDGE.left, x2: width - EDGE.right, y1: Y(options.level.y), y2: Y(options.level.y), stroke: "var(--faint)", "stroke-width": 1.5, "stroke-dasharray": "2 4" }));
  for (const curve of options.curves) drawCurve(svg, curve, X, Y);
  if (options.points) {
    options.points.x.forEach((x, i) => svg.append(draw("circle", { cx: X(x), cy: Y(options.points.y[i]), r: 4, fill: `var(${options.points.color})`, stroke: "var(--card)", "stroke-width": 1.5 })));
  }
  for (const mark of options.marks || []) drawMark(svg, mark, X(mark.x), height);
  crosshair(svg, options, X, Y, height);
  return svg;
}

function drawCurve(svg, curve, X, Y) {
  const { x, y, low, high, smooth } = curve.data;
  const path = (ys) => ys.map((v, i) => `${i ? "L" : "M"}${X(x[i]).toFixed(1)} ${Y(v).toFixed(1)}`).join("");
  const stroke = `var(${curve.color})`;
  if (x.length === 1) {
    svg.append(draw("circle", { cx: X(x[0]), cy: Y(y[0]), r: 3.5, fill: stroke }));
    return;
  }
  const noisy = curve.smooth && x.length >= 40;
  if (low.some((v, i) => v < high[i])) {
    const back = x.map((_, i) => x.length - 1 - i).map((i) => `L${X(x[i]).toFixed(1)} ${Y(low[i]).toFixed(1)}`).join("");
    svg.append(draw("path", { d: `${path(high)}${back}Z`, fill: stroke, opacity: 0.16 }));
  } else if (noisy) {
    svg.append(draw("path", { d: path(y), fill: "none", stroke, "stroke-width": 1, opacity: 0.32 }));
  }
  svg.append(draw("path", { d: path(noisy ? smooth : y), fill: "none", stroke, "stroke-width": 2, "stroke-linejoin": "round", "stroke-dasharray": curve.dash || "none" }));
}

function drawMark(svg, mark, x, height) {
  svg.append(
    draw("line", { x1: x, x2: x, y1: EDGE.top, y2: height - EDGE.bottom, stroke: "var(--mark)", "stroke-width": 1.5, "stroke-dasharray": "4 3" }),
    draw("path", { d: `M${x} ${EDGE.top - 7}l6 6-6 6-6-6z`, fill: "var(--mark)" }, draw("title", {}, mark.text)),
  );
}

function describe(options) {
  const parts = options.curves.map(({ name, data }) => `${name}: from ${fixed(data.y[0])} to ${fixed(data.y.at(-1))}`);
  return `${options.title}. ${parts.join("; ")}. Left and right arrow keys read the values.`;
}

function crosshair(svg, options, X, Y, height) {
  const main = options.curves[0].data;
  const rule = draw("line", { y1: EDGE.top, y2: height - EDGE.bottom, stroke: "var(--soft)", opacity: 0 });
  const dots = options.curves.map((curve) => draw("circle", { r: 4, fill: `var(${curve.color})`, stroke: "var(--card)", "stroke-width": 1.5, opacity: 0 }));
  svg.append(rule, ...dots);
  let at = main.x.length - 1;
  const hide = () => [rule, ...dots].forEach((node) => node.setAttribute("opacity", 0)) || tip.hide();
  const show = (i) => {
    at = Math.min(Math.max(0, i), main.x.length - 1);
    const step = main.x[at], x = X(step), box = svg.getBoundingClientRect();
    rule.setAttribute("x1", x); rule.setAttribute("x2", x); rule.setAttribute("opacity", 0.5);
    options.curves.forEach((curve, c) => {
      const j = nearest(curve.data.x, step);
      dots[c].setAttribute("cx", X(curve.data.x[j])); dots[c].setAttribute("cy", Y(curve.data.y[j])); dots[c].setAttribute("opacity", 1);
    });
    tip.show(readout(options, step, (main.x[1] ?? 1) - main.x[0]), box.left + x, box.top + EDGE.top + 30);
  };
  svg.addEventListener("pointermove", (event) => {
    const local = event.clientX - svg.getBoundingClientRect().left;
    show(nearest(main.x.map(X), local));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9 }[event.key];
    if (move) { event.preventDefault(); show(at + move); }
  });
}

function readout(options, step, near) {
  const lines = [`step ${step.toLocaleString("en")}`];
  for (const { name, data } of options.curves) lines.push(`${name}: ${(options.format || fixed)(data.y[nearest(data.x, step)])}`);
  const points = options.points;
  if (points?.x.length) {
    const i = nearest(points.x, step);
    if (Math.abs(points.x[i] - step) <= near) lines.push(points.notes[i]);
  }
  for (const mark of options.marks || []) if (Math.abs(mark.x - step) <= near) lines.push(mark.text);
  return lines.join("\n");
}

function nearest(xs, x) {
  let best = 0;
  for (let i = 1; i < xs.length; i++) if (Math.abs(xs[i] - x) < Math.abs(xs[best] - x)) best = i;
  return best;
}
