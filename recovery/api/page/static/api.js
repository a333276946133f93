// Talks to the API of this origin. A session lies in a cookie that no script can read; this header shows that we are its page.
const PAGE = { "X-Recovery-Page": "1" };

export class Refused extends Error {
  constructor(status, detail) { super(detail); this.status = status; }
}

export async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { credentials: "same-origin", ...options, headers: { ...PAGE, ...options.headers } });
  } catch {
    throw new Refused(0, "The management API does not answer");
  }
  const body = answer.status === 204 ? null : await answer.json().catch(() => null);
  if (!answer.ok) throw new Refused(answer.status, body?.detail ?? `Status ${answer.status}`);
  return body;
}

export const post = (path) => ask(path, { method: "POST" });
export const who = () => ask("/api/me");
export const logIn = (token) => ask("/api/session", { method: "POST", headers: { Authorization: `Bearer ${token}` } });
export const logOut = () => ask("/api/session", { method: "DELETE" });

// A stream that comes back by itself. `handlers` by event name; `onlink(bool)` tells whether it is there.
export function stream(path, handlers, onlink = () => {}) {
  let source, timer, closed = false, wait = 500;
  const open = () => {
    source = new EventSource(path);
    source.onopen = () => { wait = 500; onlink(true); };
    source.onerror = () => {
      onlink(false);
      if (source.readyState === EventSource.CLOSED && !closed) { timer = setTimeout(open, wait); wait = Math.min(wait * 2, 8000); }
    };
    for (const [name, handle] of Object.entries(handlers)) source.addEventListener(name, (event) => handle(JSON.parse(event.data)));
  };
  open();
  return () => { closed = true; clearTimeout(timer); source.close(); };
}
