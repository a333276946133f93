// Numbers and states in words, and everything that moves with the clock.
import { h } from "./dom.js";

let offset = 0; // Redis' clock minus this browser's, in seconds

export const setClock = (at) => { offset = at - Date.now() / 1000; };
export const now = () => Date.now() / 1000 + offset;

export function span(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const s = Math.max(0, Math.floor(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

export function clock(at) {
  const date = new Date(at * 1000);
  const time = date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false });
  const today = new Date().toDateString() === date.toDateString();
  return today ? time : `${date.toLocaleDateString([], { month: "short", day: "numeric" })} ${time}`;
}

export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let n = count, unit = 0;
  while (n >= 1024 && unit < units.length - 1) { n /= 1024; unit += 1; }
  return `${n < 10 && unit ? n.toFixed(1) : Math.round(n)} ${units[unit]}`;
}

export function millis(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
}

// A time that goes on by itself: "since" counts up, "until" counts down.
export const since = (at) => (at ? h("span", { class: "num", dataset: { since: at } }, span(now() - at)) : "–");
export const until = (at) => h("span", { class: "num", dataset: { until: at } }, left(at));
const left = (at) => { const s = at - now(); return s > 0 ? `in ${s < 10 ? s.toFixed(1) : Math.ceil(s)} s` : "now"; };

setInterval(() => {
  for (const each of document.querySelectorAll("[data-since]")) each.textContent = span(now() - Number(each.dataset.since));
  for (const each of document.querySelectorAll("[data-until]")) each.textContent = left(Number(each.dataset.until));
}, 250);

const TONE = {
  healthy: "good", unhealthy: "bad", failed: "bad",
  starting: "busy", restarting: "busy", recycling: "busy", releasing: "busy", draining: "busy", stopping: "busy",
  stopped: "idle", completed: "idle",
};
export const tone = (model) => (model.hosts_away?.length || model.host_alive === false ? "bad" : TONE[model.state] ?? "idle");

export function badge(each) {
  const away = each.hosts_away?.length || each.host_alive === false;
  const partial = each.replicas > 1 && each.ready > 0 && each.ready < each.replicas;
  const kind = partial ? "warn" : tone(each);
  const text = away && !partial ? "host away" : each.state;
  return h("span", { class: `badge ${kind}` }, h("i", { "aria-hidden": "true" }), text);
}

export function cause(model) {
  const exit = model.last_exit;
  if (!exit) return "";
  return exit.cause === "exit" ? (exit.signal ? `signal ${exit.signal}` : `exit code ${exit.code ?? "unknown"}`) : exit.cause.replaceAll("_", " ");
}
