// Which charts this run has, and in what order.
const charts = data.charts;
const marks = data.recoveries.map((r) => ({ x: r.step, text: `actor ${r.actor} lost at step ${r.step}${r.seconds === null ? "" : `, recovered in ${r.seconds.toFixed(1)} s`}` }));
const has = (curve) => curve && curve.x && curve.x.length > 0;

function card(parent, options) {
  const host = make("div", { className: "card chart" });
  byId(parent).append(host);
  chart(host, options);
}

function lossChart() {
  const evals = data.eval;
  if (!has(charts.loss)) {
    byId("loss").append(make("p", { className: "hint", textContent: "No step was logged yet." }));
    return;
  }
  const unigram = data.byte_tokens && evals.unigram.length ? evals.unigram.at(-1) : null;
  const unit = data.labels ? "document" : data.byte_tokens ? "byte token" : "token";
  chart(byId("loss"), {
    title: `Loss, bits per ${unit}`,
    height: 320,
    curves: [{ name: "training", color: "--c1", data: charts.loss, smooth: true }],
    points: evals.x.length ? { name: "held out", color: "--c2", x: evals.x, y: evals.y, notes: evals.y.map((y, i) => `held out: ${fixed(y)} (${evals.notes[i]})`) } : undefined,
    marks,
    level: unigram ? { y: unigram, name: `unigram entropy ${unigram.toFixed(2)}` } : undefined,
  });
}

function smallCharts() {
  const one = (title, note, curve, color, more = {}) => has(curve) && card("small", { title, note, curves: [{ name: title.toLowerCase(), color, data: curve, smooth: true }], ...more });
  one("Tokens per second", "Wall-clock of each step, without checkpoints.", charts.speed, "--c3", { floor: 0, marks, format: compact });
  one("Gradient norm", "Global, before clipping.", charts.grad_norm, "--c4", { floor: 0 });
  one("Learning rate", "Of each optimizer step.", charts.lr, "--c1", { floor: 0, format: compact });
  const used = Object.entries(charts.losses).filter(([, curve]) => has(curve));
  const color = ["--c1", "--c2", "--c3", "--c4"];
  for (const [i, [name, curve]] of used.entries()) one(`Routing loss: ${name.replaceAll("_", " ")}`, "Unscaled, mean over MoE layers.", curve, color[i % 4]);
}

function expertCharts() {
  const routed = has(charts.imbalance) || data.load;
  byId("experts-hint").textContent = routed ? "How evenly the router fills its experts. Blue experts are idle, orange ones are crowded; the mean is neutral." : "This run has no experts: every layer is dense.";
  heatmaps();
  if (has(charts.imbalance)) card("balance", { title: "Imbalance", note: "Busiest over mean, worst layer; 1 is perfect.", floor: 1, curves: [{ name: "imbalance", color: "--c2", data: charts.imbalance, smooth: true }], marks });
  if (has(charts.dropped)) {
    const none = charts.dropped.high.every((v) => v === 0);
    card("balance", { title: "Dropped rows", note: none ? "Nothing was dropped." : "Choices that found their expert full.", floor: 0, ceiling: none ? 1 : undefined, curves: [{ name: "dropped", color: "--mark", data: charts.dropped, smooth: true }], format: percent, axis: percent });
  }
  if (has(charts.computed)) card("balance", { title: "Executed compute", note: "FLOPs that ran, of those if every choice had run.", floor: 0, ceiling: 100, curves: [{ name: "executed", color: "--c3", data: charts.computed }], format: percent, axis: percent });
}

function computeBars() {
  const { executed, dense } = data.compute;
  if (!(dense > 0)) return;
  const share = (100 * executed) / dense;
  const bar = (name, width, text, className) => make("div", {}, make("span", { textContent: name }), make("div", { className: "meter" }, make("i", { className, style: `width: ${Math.min(100, width)}%`, textContent: text })));
  const saved = 100 - share;
  byId("compute").hidden = false;
  byId("compute").append(
    make("h3", { textContent: saved > 0.005 ? `Compute: ${percent(saved)} of the routed layers' FLOPs never ran` : "Compute: every choice ran, nothing was saved" }),
    make("div", { className: "compute" }, bar("Executed", share, `${compact(executed)}FLOP`, ""), bar("Dense", 100, `${compact(dense)}FLOP`, "dense")),
    make("p", { textContent: "Counted row by row while it ran (forward, logged steps), not estimated from a mask. Dense is what the same layers cost when every token takes every choice." }),
  );
}

lossChart();
smallCharts();
expertCharts();
computeBars();
startSample();
theme.start();
