// The generated sample: each token in the colour of its experts, the path of one token, the legend.
const sample = data.sample;
const view = { layer: 0, only: null, current: -1, tokens: [] };

function startSample() {
  byId("sample").hidden = !sample;
  if (!sample) {
    document.querySelector('nav a[href="#sample"]').remove();
    return;
  }
  for (const layer of sample.layers) {
    layer.target = unpack16(layer.target);
    layer.weight = unpack16(layer.weight);
  }
  const routed = sample.layers.length > 0;
  byId("sample-hint").textContent = sampleHint(routed);
  makeTokens();
  for (const id of ["layers", "legend", "key", "inspector"]) byId(id).hidden = !routed;
  for (const node of document.querySelectorAll(".legend-head, .switch")) node.hidden = !routed;
  if (!routed) {
    byId("sample-title").textContent = "What it wrote";
    byId("tokens").classList.add("unrouted");
    byId("tokens").parentNode.classList.remove("sample-grid");
    return;
  }
  makeLayers();
  byId("show-numbers").addEventListener("change", (event) => byId("tokens").classList.toggle("numbered", event.target.checked));
  byId("legend-clear").addEventListener("click", () => isolate(null));
  showLayer(sample.layers.length - 1);
  inspect(Math.min(sample.prompt_tokens, sample.ids.length - 1));
}

function sampleHint(routed) {
  const cut = sample.cut ? ` The last ${plural(sample.cut, "token")} are left out here.` : "";
  if (routed) return `Each token wears the colour of its strongest expert; the bar beneath it is the second. Choose a layer, or an expert to see only its tokens.${cut}`;
  return (sample.traced ? "The routing trace belongs to other tokens, so there are no colours." : "No routing was recorded for this sample, so there are no colours.") + cut;
}

// The choices of token t in a layer: {expert, weight, dropped}, the heaviest first.
function choices(layer, t) {
  const out = [];
  for (let k = t * layer.K; k < (t + 1) * layer.K; k++) {
    const code = layer.target[k];
    if (code) out.push({ expert: (code & 0x7fff) - 1, weight: layer.weight[k] / 1000, dropped: code >> 15 === 1 });
  }
  return out;
}

function makeTokens() {
  const box = byId("tokens");
  if (!sample.prompt_tokens) box.append(make("span", { className: "turn", textContent: "PROMPT" }), sample.prompt);
  view.tokens = sample.text.map((text, t) => {
    if (t === 0 && sample.prompt_tokens) box.append(make("span", { className: "turn", textContent: "PROMPT" }));
    if (t === sample.prompt_tokens) box.append(make("span", { className: "turn", textContent: "GENERATED" }));
    const node = make("span", { className: /^[↵⇥⟨]/.test(text) ? "tok plain mark" : "tok plain", textContent: text.replace("\n", ""), tabIndex: -1, role: "img" });
    node.dataset.t = t;
    box.append(node);
    if (text.endsWith("\n")) box.append("\n");
    return node;
  });
  if (!sample.layers.length) return;
  const of = (event) => event.target.closest(".tok");
  box.addEventListener("pointerover", (event) => of(event) && hover(of(event)));
  box.addEventListener("pointerleave", () => tip.hide());
  box.addEventListener("focusin", (event) => of(event) && hover(of(event)));
  box.addEventListener("focusout", () => tip.hide());
  box.addEventListener("click", (event) => of(event) && of(event).focus({ preventScroll: true }));
  box.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -20, ArrowDown: 20, Home: -1e9, End: 1e9 }[event.key];
    if (!move) return;
    event.preventDefault();
    view.tokens[Math.min(Math.max(0, view.current + move), view.tokens.length - 1)].focus();
  });
}

function hover(node) {
  const t = Number(node.dataset.t), box = node.getBoundingClientRect();
  inspect(t);
  tip.show(`${JSON.stringify(sample.text[t].replace("\n", ""))} · token ${t}\n${sentence(sample.layers[view.layer], t)}`, box.left, box.top);
}

function sentence(layer, t) {
  const picks = choices(layer, t).map((c) => `${expertName(c.expert, layer.groups)} ${c.weight.toFixed(2)}${c.dropped ? " (dropped)" : ""}`);
  return `layer ${layer.layer}: ${picks.join(", ") || "not routed: it came out last"}`;
}

function makeLayers() {
  sample.layers.forEach((layer, i) => {
    const input = make("input", { type: "radio", name: "layer", value: i, checked: i === sample.layers.length - 1 });
    input.setAttribute("aria-label", `Layer ${layer.layer}`);
    input.addEventListener("change", () => showLayer(i));
    byId("layers").append(make("label", { className: "pill" }, input, make("span", { textContent: layer.layer })));
  });
}

function showLayer(i) {
  view.layer = i;
  view.only = null;
  const layer = sample.layers[i];
  view.tokens.forEach((node, t) => {
    const picks = choices(layer, t), kept = picks.filter((c) => !c.dropped);
    node.classList.toggle("plain", !kept.length);
    node.classList.toggle("dropped", picks.some((c) => c.dropped));
    node.style.background = kept.length ? expertColor(kept[0].expert, layer.groups) : "";
    node.style.setProperty("--second", kept.length > 1 ? expertColor(kept[1].expert, layer.groups) : "transparent");
    node.style.setProperty("--seam", kept.length > 1 ? "rgb(0 0 0 / .55)" : "transparent");
    node.dataset.n = picks.slice(0, 2).map((c) => (c.expert >= layer.groups ? "∅" : c.expert)).join("·") || "–";
    node.setAttribute("aria-label", `${sample.text[t].trim() || "space"}, ${sentence(layer, t)}`);
  });
  makeLegend(layer);
  isolate(null);
  if (view.current >= 0) inspect(view.current);
}

function makeLegend(layer) {
  const used = new Map();
  let rows = 0, lost = 0, nulls = 0;
  sample.ids.forEach((_, t) => choices(layer, t).forEach((c) => {
    used.set(c.expert, (used.get(c.expert) || 0) + 1);
    rows += 1;
    lost += c.dropped;
    nulls += c.expert >= layer.groups;
  }));
  const many = layer.groups > 16;
  const order = [...used.keys()].sort((a, b) => (many ? used.get(b) - used.get(a) : 0) || a - b);
  byId("legend-title").textContent = `${used.size} of ${plural(layer.groups + (nulls ? used.size - [...used.keys()].filter((e) => e < layer.groups).length : 0), "expert")} at work in layer ${layer.layer}${many ? ", busiest first" : ""}`;
  byId("legend").replaceChildren(...order.map((expert) => {
    const button = make("button", { type: "button" }, expertChip(expert, layer.groups), percent((100 * used.get(expert)) / rows));
    button.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-label", `${expertName(expert, layer.groups)}, ${percent((100 * used.get(expert)) / rows)} of choices: show only its tokens`);
    button.dataset.expert = expert;
    button.addEventListener("click", () => isolate(view.only === expert ? null : expert));
    return button;
  }));
  const notes = ["Percentages are shares of this sample's choices."];
  if (many) notes.push("Experts share sixteen colours; here eight textures tell them apart, in the text the numbers do.");
  if (lost) notes.push(`A line above a token marks a dropped choice: ${lost} of ${rows}.`);
  if (nulls) notes.push("∅ is a null expert: the token skipped this layer's work.");
  byId("key").textContent = notes.join(" ");
}

function isolate(expert) {
  view.only = expert;
  const layer = sample.layers[view.layer];
  view.tokens.forEach((node, t) => node.classList.toggle("dim", expert !== null && !choices(layer, t).some((c) => c.expert === expert)));
  for (const button of byId("legend").children) button.setAttribute("aria-pressed", String(Number(button.dataset.expert) === expert));
  byId("legend-clear").hidden = expert === null;
}

function inspect(t) {
  if (t < 0) return;
  view.tokens[view.current]?.classList.remove("on");
  if (view.tokens[view.current]) view.tokens[view.current].tabIndex = -1;
  view.current = t;
  view.tokens[t].classList.add("on");
  view.tokens[t].tabIndex = 0;
  const origin = t < sample.prompt_tokens ? "prompt" : "generated";
  const glyph = make("div", { className: "glyph" }, make("b", { className: "big", textContent: sample.text[t].replace("\n", "") }), make("small", {}, `token ${t}, ${origin}`, make("br"), `id ${sample.ids[t]}`));
  byId("inspector").replaceChildren(glyph, ...sample.layers.map((layer, i) => hop(layer, i, t)));
}

function hop(layer, i, t) {
  const picks = choices(layer, t), most = Math.max(...picks.map((c) => c.weight), 1e-9);
  const list = picks.slice(0, 16).map((c) => {
    const chip = expertChip(c.expert, layer.groups);
    if (c.dropped) return make("div", { className: "pick lost" }, chip, make("span", { className: "num", textContent: `dropped (${c.weight.toFixed(2)})` }));
    const bar = make("div", { className: "meter" }, make("i", { style: `width: ${(100 * c.weight) / Math.max(1, most)}%` }));
    return make("div", { className: "pick" }, chip, bar, make("span", { className: "num", textContent: c.weight.toFixed(2) }));
  });
  const body = list.length ? list : [make("small", { textContent: "not routed: it came out last" })];
  return make("div", { className: i === view.layer ? "hop now" : "hop" }, make("span", { textContent: `L${layer.layer}` }), make("div", {}, ...body));
}
