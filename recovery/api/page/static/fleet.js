// The fleet at a glance.
import { ask } from "./api.js";
import { fill, h, refresh } from "./dom.js";
import { badge, bytes, cause, millis, since, tone, until } from "./words.js";

const EVERY_MS = 10000;

export function fleetView() {
  const strip = h("div", { class: "strip" });
  const rows = h("div", { class: "rows", role: "list" });
  const element = h("div", {}, h("h1", {}, "Fleet"), strip, rows);
  let hosts = [], loads = {}, models = [];

  async function readSlow() {
    try {
      [hosts, loads] = await Promise.all([ask("/api/hosts").then((t) => t.hosts), ask("/api/llm/load").then((t) => t.loads)]);
      draw();
    } catch { /* the stream says that something is wrong */ }
  }
  const timer = setInterval(readSlow, EVERY_MS);
  readSlow();

  function draw() {
    refresh(strip, JSON.stringify([counts(models), hosts.map((x) => [x.host, x.alive])]), () => summary(models, hosts));
    const key = JSON.stringify(models.map((m) => [m, memory(m, hosts), loads[m.id]].map(still)));
    refresh(rows, key, () => models.length ? models.map((m) => row(m, hosts, loads[m.id])) : nothing());
  }

  return {
    element,
    update(found) { models = found.sort((a, b) => a.id.localeCompare(b.id)); draw(); },
    close() { clearInterval(timer); },
  };
}

// Uptimes move by themselves; they are no reason to draw anew.
function still(value) {
  return JSON.parse(JSON.stringify(value ?? null, (name, v) => (["uptime_seconds", "last_health_check_time", "health_check_seconds"].includes(name) ? undefined : v)));
}

function counts(models) {
  const all = { ready: 0, replicas: 0, busy: 0, bad: 0 };
  for (const model of models) {
    all.replicas += model.instances.filter((x) => x.desired === "running").length;
    all.ready += model.ready;
    for (const each of model.instances) {
      if (tone(each) === "busy") all.busy += 1;
      if (tone(each) === "bad") all.bad += 1;
    }
  }
  return all;
}

function summary(models, hosts) {
  const all = counts(models);
  const tile = (kind, number, text) => h("div", { class: `tile ${kind}` }, h("b", {}, number), h("span", {}, text));
  const up = hosts.filter((x) => x.alive).length;
  return [
    tile(all.ready === all.replicas ? "good" : "warn", `${all.ready}/${all.replicas}`, "ready"),
    tile(all.busy ? "busy" : "", all.busy, "on the move"),
    tile(all.bad ? "bad" : "", all.bad, "in trouble"),
    tile(up < hosts.length ? "bad" : "", hosts.length ? `${up}/${hosts.length}` : "–", hosts.length === 1 ? "host" : "hosts"),
  ];
}

function row(model, hosts, load) {
  const gpu = memory(model, hosts);
  const cell = (name, ...content) => h("div", { class: content[0] === "–" ? "cell none" : "cell" }, h("span", { class: "name" }, name), h("span", { class: "value" }, content));
  return h("a", { class: `row ${tone(model)}`, href: `/models/${encodeURIComponent(model.id)}`, role: "listitem", "data-link": true, dataset: { focus: model.id } },
    h("div", { class: "head" }, h("strong", {}, model.id), badge(model),
      model.replicas > 1 ? h("span", { class: "dim num" }, `${model.ready}/${model.replicas} ready`) : null,
      model.degraded_since ? h("span", { class: "badge warn" }, h("i"), "degraded") : null),
    cell("uptime", uptime(model)),
    cell("restarts", h("span", { class: "num" }, model.restart_count), model.max_restarts ? h("span", { class: "dim" }, ` of ${model.max_restarts}`) : null),
    model.next_restart_at ? cell("next restart", until(model.next_restart_at)) : cell("last cause", cause(model) || "–"),
    cell("GPU memory", gpu ? meter(gpu) : "–"),
    cell("first token p95", load?.ttft_seconds?.["0.95"] !== undefined ? millis(load.ttft_seconds["0.95"]) : "–"),
    model.health_message ? h("p", { class: "why" }, model.health_message) : null);
}

export function uptime(model) {
  const started = model.instances.filter((x) => x.started_at !== null).map((x) => x.started_at);
  return started.length ? since(Math.max(...started)) : "–";
}

// The memory of the cards that this model's instances were given.
export function memory(model, hosts) {
  const cards = new Map();
  for (const each of model.instances)
    for (const gpu of hosts.find((x) => x.host === each.host)?.gpus ?? [])
      if (each.gpus.includes(gpu.index)) cards.set(`${each.host}:${gpu.index}`, gpu);
  if (!cards.size) return null;
  const all = [...cards.values()];
  return { used: all.reduce((n, g) => n + g.used_bytes, 0), total: all.reduce((n, g) => n + g.total_bytes, 0) };
}

export function meter({ used, total }) {
  return h("span", { class: "meter" }, h("meter", { min: 0, max: total, value: used, high: total * 0.97 }), ` ${bytes(used)} of ${bytes(total)}`);
}

function nothing() {
  return h("p", { class: "note" }, "No models yet. They appear when a GPU host's worker has read the fleet file.");
}
