// One model: what it is, what happened, its log, and the buttons.
import { ask, post, stream } from "./api.js";
import { byId, fill, h, refresh, toast } from "./dom.js";
import { memory, meter, uptime } from "./fleet.js";
import { logPanel } from "./logs.js";
import { badge, cause, clock, millis, now, since, span, until } from "./words.js";

const KEPT = 200;

export function modelView(id, me, navigate) {
  const path = `/api/llm/models/${encodeURIComponent(id)}`;
  const head = h("div", { class: "title" });
  const notice = h("div");
  const facts = h("dl", { class: "facts card" });
  const buttons = h("div", { class: "buttons", role: "group", "aria-label": "Commands" });
  const instances = h("div", { class: "instances" });
  const timeline = h("ol", { class: "timeline", "aria-label": "Timeline, newest first", reversed: true });
  const log = logPanel(path);
  const element = h("div", { class: "model" },
    h("nav", { "aria-label": "Breadcrumb" }, h("a", { href: "/", "data-link": true }, "← Fleet")),
    h("div", { class: "bar" }, head, buttons), notice,
    h("div", { class: "columns" },
      h("section", { "aria-label": "State" }, facts, instances),
      h("section", { class: "card", "aria-label": "Timeline" }, h("h2", {}, "Timeline"), timeline)),
    log.element);

  let hosts = [], load = null, door = null, model = null, missing = false;
  const close = stream(`${path}/events?follow=true&count=60`, { event: (each) => {
    timeline.prepend(line(each));
    while (timeline.children.length > KEPT) timeline.lastChild.remove();
  } });
  async function readSlow() {
    try {
      [hosts, load, door] = await Promise.all([ask("/api/hosts").then((t) => t.hosts), ask("/api/llm/load").then((t) => t.loads[id]),
        ask("/api/llm/door").then((t) => t.models[id])]);
      draw();
    } catch { /* the stream says that something is wrong */ }
  }
  const timer = setInterval(readSlow, 10000);
  readSlow();
  commands();

  function draw() {
    if (!model) {
      if (missing) refresh(head, "missing", () => [h("h1", {}, id), h("p", { class: "note" }, "There is no such model in the fleet.")]);
      return;
    }
    refresh(head, JSON.stringify([model.state, model.ready, model.hosts_away]), () => [h("h1", {}, id), badge(model),
      model.replicas > 1 ? h("span", { class: "dim num" }, `${model.ready}/${model.replicas} ready`) : null]);
    refresh(notice, JSON.stringify([model.health_message, model.reason, model.next_restart_at, model.last_exit?.advice, model.degraded_since]), () => told(model));
    const gpu = memory(model, hosts);
    const key = JSON.stringify([model.restart_count, model.restarts_total, model.budget_left, model.next_restart_at, model.last_exit, gpu, load, door,
      model.instances.map((x) => x.started_at), model.has_cuda_oom]);
    refresh(facts, key, () => table(model, gpu, load, door));
    refresh(instances, JSON.stringify(model.instances.map((x) => [x.id, x.state, x.host_alive, x.run, x.reason, x.next_restart_at, x.overrides, x.restart_count])),
      () => model.instances.map((each) => card(each, model)));
    log.replicas(model.instances);
  }

  function commands() {
    if (me.role === "read") {
      fill(buttons, h("span", { class: "dim" }, "Your role may look only."));
      return;
    }
    const button = (name, kind, text, question) => h("button", { class: kind, dataset: { command: name }, onclick: (event) => run(event.currentTarget, name, text, question) }, text);
    fill(buttons,
      button("restart", "main", "Restart", `Restart ${id}? Work in flight is finished first.`),
      button("start", "", "Start"),
      button("stop", "danger", "Stop", `Stop ${id}? It stays down until somebody starts it.`),
      button("health-check", "", "Check"),
      button("reset", "", "Reset budget"));
  }

  async function run(button, name, text, question) {
    if (question && !(await confirm(question, text))) return;
    button.disabled = true;
    button.classList.add("working");
    try {
      const answer = await post(`${path}/${name}`);
      toast(answer.message ?? (answer.is_healthy ? `${id} is healthy` : `${id} is not healthy: ${answer.health_message}`), answer.is_healthy === false ? "bad" : "good");
    } catch (problem) {
      toast(problem.message, "bad");
      if (problem.status === 401) navigate("/");
    } finally {
      button.disabled = false;
      button.classList.remove("working");
      button.focus();
    }
  }

  return {
    element,
    update(models) { model = models.find((each) => each.id === id) ?? null; missing = true; draw(); },
    close() { close(); clearInterval(timer); log.close(); },
  };
}

function told(model) {
  const parts = [];
  const kind = model.is_healthy ? "warn" : model.desired === "stopped" ? "idle" : "bad";
  if (model.health_message || !model.is_healthy) {
    const why = model.replicas > 1 ? `${model.health_message}: ${model.reason}` : model.health_message ?? model.reason;
    parts.push(h("p", {}, why, model.next_restart_at ? [" · next start ", until(model.next_restart_at)] : null));
  }
  if (!model.is_healthy && model.desired === "running" && model.last_exit?.advice) parts.push(h("p", {}, h("b", {}, "What helps: "), model.last_exit.advice));
  if (model.degraded_since) parts.push(h("p", {}, "Serves with changed flags since ", clock(model.degraded_since), "; a reset clears them."));
  return parts.length ? h("div", { class: `notice ${model.degraded_since && model.is_healthy ? "warn" : kind}` }, parts) : null;
}

function table(model, gpu, load, door) {
  const fact = (name, ...value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
  const exit = model.last_exit;
  return [
    fact("Uptime", uptime(model)),
    fact("Restarts", h("span", { class: "num" }, model.restart_count), h("span", { class: "dim" }, ` since the last forgiveness, ${model.restarts_total} in all`)),
    fact("Budget", model.budget_left === null ? "no limit" : `${model.budget_left} of ${model.max_restarts} left`),
    fact("Next restart", model.next_restart_at ? until(model.next_restart_at) : "none due"),
    fact("Policy", model.restart_policy),
    exit ? fact("Last end", `${cause(model)}, ${clock(exit.at)}`, exit.evidence ? h("code", { class: "evidence" }, exit.evidence) : null) : fact("Last end", "none known"),
    gpu ? fact("GPU memory", meter(gpu)) : null,
    load ? fact("In the engine", `${load.running} running, ${load.waiting} waiting`) : null,
    load?.kv_cache_usage != null ? fact("KV cache", `${Math.round(load.kv_cache_usage * 100)} %`) : null,
    known(load?.ttft_seconds) ? fact("First token", quantiles(load.ttft_seconds)) : null,
    known(load?.e2e_seconds) ? fact("Whole request", quantiles(load.e2e_seconds)) : null,
    load?.error_rate != null ? fact("No answer", `${(load.error_rate * 100).toFixed(1)} % of the last minutes`) : null,
    door ? fact("Front door", doorText(door)) : null,
    known(door?.ttft_seconds) ? fact("First token there", quantiles(door.ttft_seconds)) : null,
    known(door?.inter_token_seconds) ? fact("Between tokens", quantiles(door.inter_token_seconds)) : null,
  ];
}

const DOOR = [["errors", "without an answer"], ["holding", "waiting now"], ["held", "had to wait"], ["retried", "retried"], ["continued", "continued"],
  ["cut", "cut off"], ["refused", "refused"], ["fallback", "by the fallback"]];
const doorText = (door) => [`${door.requests} requests`, ...DOOR.filter(([name]) => door[name]).map(([name, text]) => `${door[name]} ${text}`)].join(" · ");
const known = (found) => found && Object.keys(found).length > 0;
const quantiles = (found) => ["0.5", "0.95", "0.99"].filter((q) => q in found).map((q) => `p${Math.round(q * 100)} ${millis(found[q])}`).join(" · ");

function card(each, model) {
  return h("article", { class: "card instance" },
    h("header", {}, h("strong", {}, each.id), badge(each), h("span", { class: "dim" }, `${each.host}${each.port ? `:${each.port}` : ""}${each.gpus.length ? ` · GPU ${each.gpus.join(", ")}` : ""}`)),
    h("p", {}, each.health_message ?? each.reason, each.next_restart_at ? [" · next start ", until(each.next_restart_at)] : null),
    h("p", { class: "dim" }, each.started_at ? ["up ", since(each.started_at)] : "not running",
      each.load_seconds ? ` · loaded in ${span(each.load_seconds)}` : null,
      ` · ${each.restart_count} restarts`, each.budget_left !== null ? `, ${each.budget_left} of ${model.max_restarts} left` : null),
    each.overrides.length ? h("p", {}, "Changed: ", each.overrides.map((x) => h("code", {}, [x.flag, x.value].filter(Boolean).join(" "))) ) : null);
}

const TONES = { healthy: "good", failed: "bad", unhealthy: "bad", exited: "bad", killed: "bad", restarting: "busy", spawned: "busy", starting: "busy", stopping: "busy" };

function line(each) {
  return h("li", { class: TONES[each.kind] ?? "idle", dataset: { kind: each.kind } }, h("time", { datetime: new Date(each.at * 1000).toISOString(), title: `${span(now() - each.at)} ago` }, clock(each.at)),
    h("div", {}, h("p", {}, each.text), each.data?.evidence ? h("code", { class: "evidence" }, each.data.evidence) : null));
}

function confirm(question, yes) {
  const dialog = byId("dialog");
  return new Promise((resolve) => {
    const form = h("form", { method: "dialog" }, h("p", {}, question),
      h("div", { class: "buttons" }, h("button", { value: "no" }, "Cancel"), h("button", { value: "yes", class: yes === "Stop" ? "danger" : "main", autofocus: true }, yes)));
    fill(dialog, form);
    dialog.returnValue = "no";
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
    dialog.showModal();
  });
}
