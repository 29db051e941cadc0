// Streams a completion and shows, token by token, which blocks and experts computed it.

const at = (id) => document.getElementById(id);
const json = { "Content-Type": "application/json" };

let facts;
let counts = []; // by block, by expert: choices of this text
let tokens = []; // {span, path}: path is known one pass after the token
let chosen = -1; // token that the arrow keys stand on
let running = null; // AbortController of the stream

async function begin() {
  const answer = await fetch("demo/facts");
  if (!answer.ok) throw new Error(`the server says ${answer.status}`);
  facts = await answer.json();
  const experts = facts.experts.filter((n) => n > 0);
  const routed = { "": "", skip: ", tokens skip blocks", halt: ", tokens halt early", leap: ", tokens leap over blocks" }[facts.routing];
  at("about").textContent =
    `${facts.model}: ${facts.experts.length} blocks` +
    (experts.length ? `, ${experts[0]} experts in ${experts.length} of them` : "") +
    `${routed ?? ""}, on ${facts.ranks} shard${facts.ranks > 1 ? "s" : ""}`;
  const by = at("by");
  by.append(new Option("blocks taken", "depth"));
  facts.experts.forEach((n, i) => n && by.append(new Option(`experts of block ${i}`, String(i))));
  by.value = by.options.length > 1 ? by.options[1].value : "depth";
  by.addEventListener("change", () => tokens.forEach(paint));
  if (facts.chaos) offerChaos();
  at("budget-row").hidden = !facts.routing;
  reset();
  const asked = new URLSearchParams(location.search).get("prompt");
  if (asked !== null) at("prompt").value = asked;
}

function offerChaos() {
  at("chaos").hidden = false;
  for (let rank = 0; rank < facts.ranks; rank++) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = `Kill shard ${rank}`;
    button.addEventListener("click", () => kill(rank));
    at("kill").append(button);
  }
}

async function kill(rank) {
  say(`shard ${rank} is killed`);
  const answer = await fetch("demo/kill", { method: "POST", headers: json, body: JSON.stringify({ rank }) });
  if (!answer.ok) return say(await reason(answer));
  mark(rank, true);
  const since = performance.now();
  let lost = false;
  for (;;) {
    await new Promise((done) => setTimeout(done, 250));
    const health = await fetch("health").catch(() => null);
    const waited = ((performance.now() - since) / 1000).toFixed(1);
    if (!health?.ok) lost = true;
    if (health?.ok && (lost || waited > 20)) {
      mark(rank, false);
      return say(`shard ${rank} is back after ${waited} s; no token was lost`);
    }
    say(`shard ${rank} is gone for ${waited} s; the text waits`);
  }
}

function mark(rank, gone) {
  for (const bar of document.querySelectorAll(".bar")) {
    const homes = facts.homes[Number(bar.dataset.expert)] ?? [];
    if (homes.includes(rank)) bar.classList.toggle("gone", gone);
  }
}

function reset() {
  counts = facts.experts.map((n) => new Array(n).fill(0));
  tokens = [];
  chosen = -1;
  at("text").replaceChildren();
  at("saved").textContent = "";
  at("speed").textContent = "";
  drawLoad();
}

at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return;
  reset();
  say("");
  running = new AbortController();
  at("go").disabled = true;
  at("stop").disabled = false;
  try {
    await generate(at("prompt").value, running.signal);
  } catch (problem) {
    if (problem.name !== "AbortError") say(problem.message);
  } finally {
    running = null;
    at("go").disabled = false;
    at("stop").disabled = true;
  }
});
at("stop").addEventListener("click", () => running?.abort());
at("budget").addEventListener("input", () => { at("budget-told").value = at("budget").value; });

async function generate(prompt, signal) {
  const body = { prompt, max_tokens: Number(at("tokens").value), temperature: Number(at("temperature").value) };
  if (at("budget-told").value !== "as trained") body.compute_budget = Number(at("budget").value);
  const answer = await fetch("demo/stream", { method: "POST", headers: json, body: JSON.stringify(body), signal });
  if (!answer.ok) throw new Error(await reason(answer));
  const first = add(prompt, "prompt"); // as one: its tokens have a path each
  const began = performance.now();
  let executed = 0, dense = 0;
  for await (const piece of events(answer.body)) {
    if (piece.error) throw new Error(piece.error.message);
    // a shard that was lost reads the whole text again; its tokens were counted when they were new
    for (const path of piece.paths?.slice(piece.made > 1 ? -1 : 0) ?? []) count(path);
    if (piece.made <= 1 && piece.paths?.length) settle(first, piece.paths.at(-1));
    else if (piece.paths?.length && tokens.length > 1) settle(tokens.at(-1), piece.paths.at(-1));
    executed += piece.executed ?? 0;
    dense += piece.dense ?? 0;
    if (!piece.finish || piece.text) add(piece.text, "token");
    drawLoad();
    const seconds = (performance.now() - began) / 1000;
    at("speed").textContent = `${piece.made} tokens, ${(piece.made / seconds).toFixed(1)}/s`;
    if (dense) at("saved").textContent = `Executed ${(100 * executed / dense).toFixed(0)}% of the dense model's matrix FLOPs.`;
  }
}

async function* events(stream) {
  let held = "";
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
  }
}

function add(text, kind) {
  const span = document.createElement("span");
  span.className = kind;
  span.textContent = text;
  const token = { span, path: null };
  const index = tokens.push(token) - 1;
  span.addEventListener("pointerenter", () => stand(index, false));
  const box = at("text");
  const follows = box.scrollTop + box.clientHeight > box.scrollHeight - 8;
  box.append(span);
  if (follows) box.scrollTop = box.scrollHeight;
  return token;
}

function settle(token, path) {
  token.path = path;
  paint(token);
}

function paint(token) {
  const { span, path } = token;
  if (!path || span.classList.contains("prompt")) return;
  const by = at("by").value;
  span.className = "token";
  if (by === "depth") {
    const taken = path.filter((block) => block !== null).length;
    span.style.setProperty("--hue", String(Math.round((220 * taken) / path.length)));
    return;
  }
  const block = path[Number(by)];
  if (block === null) span.classList.add("passed");
  else if (!block.length) span.classList.add("dense");
  else span.style.setProperty("--hue", String(hue(block[0], facts.experts[Number(by)])));
}

const hue = (expert, experts) => Math.round((360 * expert) / experts);

function count(path) {
  path.forEach((block, i) => block?.forEach((expert) => counts[i][expert]++));
}

function drawLoad() {
  const box = at("load");
  if (box.childElementCount !== counts.length || !tokens.length) {
    box.replaceChildren(...counts.map(blockRow));
  }
  counts.forEach((of, i) => {
    const most = Math.max(1, ...of);
    of.forEach((n, expert) => {
      const bar = box.children[i].querySelector(`[data-expert="${expert}"]`);
      bar.firstChild.style.height = `${(70 * n) / most}%`;
      bar.title = `expert ${expert}: ${n} choices, shard ${facts.homes[expert].join(" and ")}`;
    });
  });
}

function blockRow(of, i) {
  const row = document.createElement("div");
  row.className = "block";
  const name = document.createElement("b");
  name.textContent = `block ${i}`;
  row.append(name);
  if (!of.length) {
    row.append("dense");
    return row;
  }
  const bars = document.createElement("div");
  bars.className = "bars";
  bars.setAttribute("role", "img");
  bars.setAttribute("aria-label", `choices of each expert of block ${i}`);
  of.forEach((_, expert) => {
    const bar = document.createElement("div");
    bar.className = "bar";
    bar.dataset.expert = String(expert);
    bar.style.setProperty("--hue", String(hue(expert, of.length)));
    bar.append(document.createElement("i"), String(expert));
    bars.append(bar);
  });
  row.append(bars);
  return row;
}

at("text").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1, Home: -tokens.length, End: tokens.length }[event.key];
  if (!step || !tokens.length) return;
  event.preventDefault();
  stand(Math.min(tokens.length - 1, Math.max(0, chosen + step)), true);
});

function stand(index, scroll) {
  tokens[chosen]?.span.classList.remove("at");
  chosen = index;
  const { span, path } = tokens[index];
  span.classList.add("at");
  if (scroll) span.scrollIntoView({ block: "nearest" });
  at("detail").textContent = `“${span.textContent}” ` + (path ? path.map(told).join("; ") : "is not computed yet");
}

function told(block, i) {
  if (block === null) return `passes block ${i} by`;
  return block.length ? `block ${i}: experts ${block.join(", ")}` : `block ${i}: dense`;
}

async function reason(answer) {
  const body = await answer.json().catch(() => null);
  return body?.error?.message ?? `the server says ${answer.status}`;
}

const say = (text) => { at("status").textContent = text; };

begin().catch((problem) => say(`The page cannot reach the server: ${problem.message}`));
