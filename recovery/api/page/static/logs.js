// The live log of one replica.
import { ask, stream } from "./api.js";
import { fill, h, refresh } from "./dom.js";
import { clock } from "./words.js";

const KEPT = 3000;
const PROBE = /"GET \/(health|metrics|ping|load|v1\/models|is_paused)\S* HTTP/;

export function logPanel(path) {
  const pre = h("pre", { class: "log", tabindex: "0", "aria-label": "Log" });
  const said = h("p", { class: "dim", role: "status" });
  const replica = h("select", { "aria-label": "Replica", onchange: restart });
  const run = h("select", { "aria-label": "Run", onchange: restart }, h("option", { value: "" }, "live"));
  const only = h("input", { type: "search", placeholder: "only lines with…", "aria-label": "Only lines with", oninput: filter });
  const probes = h("input", { type: "checkbox", checked: true, onchange: filter });
  const element = h("section", { class: "card logs", "aria-label": "Log" },
    h("div", { class: "bar" }, h("h2", {}, "Log"), h("div", { class: "tools" }, h("label", {}, probes, "hide probes"), replica, run, only)), said, pre);
  let close = () => {}, begun = false;

  function put(lines) {
    const low = pre.scrollHeight - pre.scrollTop - pre.clientHeight < 40;
    pre.append(...lines.map((text) => { const each = h("span", { class: kind(text) }, text); each.hidden = !fits(text); return each; }));
    while (pre.childElementCount > KEPT) pre.firstElementChild.remove();
    if (low) pre.scrollTop = pre.scrollHeight;
  }
  const fits = (text) => !(probes.checked && PROBE.test(text)) && (!only.value || text.toLowerCase().includes(only.value.toLowerCase()));
  function filter() { for (const each of pre.children) each.hidden = !fits(each.textContent); pre.scrollTop = pre.scrollHeight; }
  const query = () => (replica.value === "" ? "" : `&replica=${replica.value}`);

  async function runs() {
    try {
      const told = await ask(`${path}/logs?lines=1${query()}`);
      const chosen = run.value;
      fill(run, h("option", { value: "" }, "live"), told.runs.toReversed().map((token) => h("option", { value: token }, `run of ${clock(token / 1e6)}`)));
      run.value = chosen;
    } catch { /* said below */ }
  }

  async function restart() {
    close();
    fill(pre);
    fill(said, "Reading the log…");
    await runs();
    if (run.value) {
      try { put((await ask(`${path}/logs?lines=2000&run=${run.value}${query()}`)).lines); fill(said); } catch (problem) { fill(said, problem.message); }
      return;
    }
    let seen = null;
    close = stream(`${path}/logs?follow=true&lines=200${query()}`, {
      lines: (told) => {
        if (seen !== null && seen !== told.run) { put([`— run ${told.run} —\n`]); runs(); }
        seen = told.run;
        fill(said, told.source === "redis" ? `The host is away; these are its last lines, kept at ${clock(told.at)}.` : "");
        put(told.lines);
      },
      away: (told) => fill(said, told.detail),
    }, (there) => { if (!there && !pre.childElementCount) ask(`${path}/logs?lines=1${query()}`).catch((problem) => fill(said, problem.message)); });
  }

  return {
    element,
    replicas(instances) {
      const before = replica.value;
      refresh(replica, instances.map((each) => each.id).join(), () => instances.map((each) => h("option", { value: each.replica }, each.id)));
      if (before) replica.value = before;
      replica.hidden = instances.length < 2;
      if (!begun) { begun = true; restart(); }
    },
    close() { close(); },
  };
}

function kind(text) {
  if (/\bERROR\b|\bCRITICAL\b|Traceback|Error:/.test(text)) return "err";
  return /\bWARNING\b/.test(text) ? "wrn" : text.startsWith("—") ? "mark" : "";
}
