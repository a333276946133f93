// The page: which view is shown, who is logged in, and the one stream of the fleet that all views read.
import { logIn, logOut, stream, who } from "./api.js";
import { byId, fill, h, toast } from "./dom.js";
import { fleetView } from "./fleet.js";
import { modelView } from "./model.js";
import { setClock } from "./words.js";

const state = { models: new Map(), me: null, view: null, close: null };

function show() {
  state.view?.close?.();
  const found = location.pathname.match(/^\/models\/([^/]+)$/);
  const id = found && decodeURIComponent(found[1]);
  state.view = id ? modelView(id, state.me, navigate) : fleetView();
  document.title = `${id ?? "Fleet"} · vLLM recovery`;
  fill(byId("main"), state.view.element);
  draw();
}

const draw = () => state.view?.update?.([...state.models.values()]);

function navigate(path) {
  history.pushState(null, "", path);
  show();
  byId("main").focus();
  scrollTo(0, 0);
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-link]");
  if (!link || event.metaKey || event.ctrlKey || event.shiftKey || event.button) return;
  event.preventDefault();
  if (state.me) navigate(link.getAttribute("href"));
});
addEventListener("popstate", () => state.me && show());

function linked(there) {
  fill(byId("link"), there ? "live" : "reconnecting");
  byId("link").className = `link ${there ? "there" : "gone"}`;
}

function follow() {
  state.close?.();
  state.close = stream("/api/llm/stream", {
    fleet: (told) => { setClock(told.at); state.models = new Map(told.models.map((m) => [m.id, m])); linked(true); draw(); },
    models: (told) => {
      setClock(told.at);
      for (const model of told.models) state.models.set(model.id, model);
      for (const id of told.gone) state.models.delete(id);
      draw();
    },
    lost: () => { fill(byId("link"), "Redis is away"); byId("link").className = "link gone"; },
  }, linked);
}

function loginView() {
  const token = h("input", { type: "password", id: "token", autocomplete: "current-password", required: true, spellcheck: "false" });
  const said = h("p", { class: "error", role: "alert" });
  const form = h("form", { class: "login card", onsubmit: submit },
    h("h1", {}, "Log in"),
    h("p", { class: "dim" }, "With a token of this installation: to look, to operate, or as admin."),
    h("label", { for: "token" }, "Token"), token, said,
    h("button", { class: "main" }, "Log in"));
  async function submit(event) {
    event.preventDefault();
    fill(said);
    try {
      await logIn(token.value.trim());
      token.value = "";
      await begin();
    } catch (problem) {
      fill(said, problem.message);
      token.select();
    }
  }
  setTimeout(() => token.focus());
  return form;
}

async function begin() {
  try {
    state.me = await who();
  } catch (problem) {
    state.me = null;
    state.close?.();
    if (problem.status !== 401) { linked(false); setTimeout(begin, 2000); return; }
    fill(byId("link"));
    byId("link").className = "link";
    fill(byId("who"));
    byId("session").hidden = true;
    state.view?.close?.();
    state.view = null;
    fill(byId("main"), loginView());
    return;
  }
  fill(byId("who"), state.me.secure ? [h("span", { class: "word" }, "role "), state.me.role] : "");
  byId("session").hidden = state.me.by !== "session";
  fill(byId("session"), "Log out");
  follow();
  show();
}

byId("session").addEventListener("click", async () => {
  try { await logOut(); } catch (problem) { toast(problem.message, "bad"); }
  await begin();
});

begin();
