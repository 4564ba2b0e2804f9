import { bytes, counted, element, graph, moment, number, place, rate, span, table } from "./view.js";

const main = document.getElementById("main");
const dialog = document.getElementById("dialog");
const views = ["overview", "batches", "locks", "sessions", "doctor", "log"];
const PAUSE = 2000;
let writable = false;
let filter = "";
let timer = null;
let turn = 0;

async function ask(path, body) {
  const options = { headers: {}, cache: "no-store" };
  if (body) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    options.headers = { "content-type": "application/json", authorization: `Bearer ${sessionStorage.getItem("token") || ""}` };
  }
  const reply = await fetch(`api/${path}`, options);
  const found = await reply.json().catch(() => ({ error: `the page's server answers ${reply.status}` }));
  if (!reply.ok) throw Object.assign(new Error(found.error), { status: reply.status });
  return found;
}

function state(name) { return element("span", { class: name }, name); }
function short(id) { return element("code", { title: id }, id.slice(0, 8)); }
function link(name, token) {
  return element("button", { class: "link", type: "button", onclick: () => showResource(name, token) }, name);
}
function acting(...buttons) { return writable ? buttons : ""; }
function button(label, kind, run) { return element("button", { class: kind, type: "button", onclick: run }, label); }

// Dialogs

function open(...content) {
  dialog.firstElementChild.replaceChildren(...content.flat(Infinity));
  if (!dialog.open) dialog.showModal();
}

function say(text) {
  const said = document.getElementById("said");
  said.textContent = text;
  said.hidden = false;
  clearTimeout(said.timer);
  said.timer = setTimeout(() => { said.hidden = true; }, 12000);
}

function confirmAct(act, question, label, body) {
  const input = sessionStorage.getItem("token") ? null : element("input", { type: "password", id: "token", autocomplete: "off", required: true, "aria-label": "Token" });
  open(
    element("h2", {}, question),
    input ? element("p", {}, "The token that this page was started with: ", input) : "",
    element("menu", {},
      element("button", { value: "no", autofocus: true }, "Cancel"),
      button(label, act === "replay" ? "main" : "danger", async () => {
        if (input) sessionStorage.setItem("token", input.value);
        try {
          say((await ask(`act/${act}`, body)).said);
        } catch (error) {
          if (error.status === 401) sessionStorage.removeItem("token");
          say(error.message);
        }
        dialog.close();
        refresh();
      })));
}

async function showResource(name, token) {
  const query = new URLSearchParams({ name });
  if (token) query.set("token", token);
  let found;
  try { found = await ask(`resource?${query}`); } catch (error) { say(error.message); return; }
  open(
    element("h2", {}, name),
    table(found.members, [
      ["member", ([id]) => short(id)], ["where", ([, host, pid]) => place(host, pid)], ["since", (m) => moment(m[3])],
      ["modified", ([id]) => number(found.modifications[id] || 0), "number"],
    ], "No process is a member."),
    found.batches.filter((b) => b.error).map((b) => element("p", { class: "error" }, `${b.token}: ${b.error}`)),
    element("h2", {}, token ? `Data of batch ${token}` : "Data of the open session"),
    found.content.length ? found.content.map((p) => element("div", {},
      element("small", {}, `${p.class_name || "unknown class"}, ${bytes(p.bytes)}`),
      p.error ? element("p", { class: "error" }, p.error)
        : element("pre", {}, JSON.stringify({ id: p.id, spec: p.spec, doc: p.doc, ...p.state }, null, 1)))) : element("p", { class: "empty" }, "Nothing is stored."),
    element("menu", {}, element("button", { value: "close", autofocus: true }, "Close")));
}

// Views

const show = {
  async overview() {
    const found = await ask("overview");
    const s = found.sample;
    const dead = found.processes.filter((p) => p.state !== "alive");
    const wrong = [];
    if (found.parked) wrong.push(`${counted(found.parked, "batch is", "batches are")} parked`);
    if (found.waiting) wrong.push(`${counted(found.waiting, "batch waits", "batches wait")} for a class or a survivor`);
    if (dead.length) wrong.push(`${counted(dead.length, "process is", "processes are")} late or dead, of ${number(found.processes.length)}`);
    if (!found.processes.length) wrong.push("no process runs");
    return [
      element("div", { class: wrong.length ? "verdict bad" : "verdict", id: "verdict" },
        wrong.length ? "Something needs you" : `All is well: ${counted(found.processes.length, "process", "processes")} at work`,
        wrong.length ? element("ul", {}, wrong.map((text) => element("li", {}, text.includes("batch") ? element("a", { href: "#batches" }, text) : text))) : ""),
      element("div", { class: "cards" }, [
        ["Processes", number(found.processes.length), ""], ["Open sessions", number(s.sessions), "once for each member"],
        ["Parked", number(s.parked), "dead letters"], ["Backlog", number(s.backlog), "unfinished"],
        ["Calls a second", rate(s.calls), s.messages === null ? "" : `${rate(s.messages)} messages a second`],
        ["Oldest session", found.oldest ? span(found.oldest.age) : "–", found.oldest ? found.oldest.resource : ""],
      ].map(([title, figure, small]) => element("div", { class: "card" }, element("h2", {}, title), element("b", {}, figure), element("small", {}, small)))),
      element("div", { class: "graphs" }, graph("Calls a second", found.history, "calls"), graph("Open sessions", found.history, "sessions"), graph("Backlog", found.history, "backlog")),
      element("section", {}, element("h2", {}, "Processes"), table(found.processes, [
        ["process", (p) => short(p.id)], ["state", (p) => state(p.state)], ["where", (p) => place(p.host, p.pid)],
        ["last beat", (p) => span(p.lag), "number"], ["members", (p) => number(p.memberships), "number"], ["locks", (p) => number(p.locks), "number"],
        ["batches", (p) => number(p.batches), "number"], ["backlog", (p) => number(p.backlog), "number"],
        ["", (p) => acting(button("Expire", "danger", () => confirmAct("expire", `Declare process ${p.id} at ${place(p.host, p.pid)} dead?`, "Declare dead", { resource: p.id }))), "acts"],
      ], "No process runs in this namespace.")),
      found.sources.length ? element("section", {}, element("h2", {}, "Sources"), table(found.sources, [
        ["source", (s) => s.name], ["kind", (s) => s.kind], ["process", (s) => short(s.process)],
        ["position", (s) => s.position, "number"], ["waiting", (s) => number(s.lag), "number"],
      ], "")) : "",
    ];
  },
  async batches() {
    return [filterBar(), table(await ask(`batches?${new URLSearchParams({ prefix: filter })}`), [
      ["resource", (b) => link(b.resource, b.token === "0" ? null : b.token)], ["state", (b) => state(b.state)],
      ["error", (b) => (b.error ? element("span", { class: "error" }, b.error.split("\n")[0].slice(0, 200)) : b.class_name)],
      ["tries", (b) => number(b.attempts), "number"], ["age", (b) => span(b.age), "number"], ["partials", (b) => number(b.partials), "number"],
      ["", (b) => (b.state !== "parked" ? "" : acting(
        button("Replay", "", () => confirmAct("replay", `Execute batch ${b.token} of ${b.resource} again?`, "Replay", b)),
        button("Discard", "danger", () => confirmAct("discard", `Delete batch ${b.token} of ${b.resource}, with its ${b.partials} partials?`, "Discard", b)))), "acts"],
    ], "No batch runs, waits or is parked.")];
  },
  async locks() {
    const now = Date.now() / 1000;
    return [filterBar(), table(await ask(`locks?${new URLSearchParams({ prefix: filter })}`), [
      ["lock", (l) => l.name], ["mode", (l) => l.mode],
      ["held by", (l) => l.holders.map((g) => element("div", {}, short(g.process), ` ${place(g.host, g.pid)} ${g.thread}, ${span(Math.max(0, now - g.since))}`))],
      ["queue", (l) => (l.waiting ? element("ol", { class: "queue" }, l.waiters.map((w) => element("li", {}, short(w.process), ` ${place(w.host, w.pid)} ${w.mode}`)), l.waiting > l.waiters.length ? element("li", {}, `and ${l.waiting - l.waiters.length} more`) : "") : "")],
      ["", (l) => acting(l.holders.slice(0, 3).map((g) => button("Break", "danger", () => confirmAct("unlock", `Release ${l.name}, which ${g.process} at ${place(g.host, g.pid)} holds? It goes on believing that it holds it until it checks.`, "Break", { resource: l.name, token: g.token, semaphore: l.mode === "semaphore" })))), "acts"],
    ], "Nothing is locked, and nobody waits.")];
  },
  async sessions() {
    return [filterBar(), table(await ask(`sessions?${new URLSearchParams({ prefix: filter })}`), [
      ["resource", (s) => link(s.resource)], ["age", (s) => span(s.age), "number"], ["members", (s) => number(s.members), "number"],
      ["modified", (s) => number(s.modifications), "number"], ["partials", (s) => number(s.partials), "number"], ["memory", (s) => bytes(s.bytes), "number"],
    ], "No session is open.")];
  },
  async doctor() {
    return table(await ask("doctor"), [
      ["", (f) => state(f.level)], ["what", (f) => f.subject], ["found", (f) => f.text], ["remedy", (f) => f.remedy],
    ], "Nothing was looked at.");
  },
  async log() {
    return table(await ask("acts"), [
      ["when", (a) => moment(a.at)], ["who", (a) => a.who], ["act", (a) => a.act], ["what", (a) => a.resource], ["detail", (a) => a.detail],
    ], "Nobody has done anything by hand.");
  },
};

function filterBar() {
  const old = document.getElementById("filter");
  if (old) return old.parentElement;
  const input = element("input", { id: "filter", type: "search", placeholder: "Name begins with …  ( / )", "aria-label": "Filter by the beginning of the name" });
  input.value = filter;
  input.addEventListener("input", () => { filter = input.value; clearTimeout(timer); timer = setTimeout(refresh, 250); });
  return element("div", { class: "bar" }, input);
}

// The loop

const current = () => (views.includes(location.hash.slice(1)) ? location.hash.slice(1) : "overview");

async function refresh() {
  clearTimeout(timer);
  const mine = ++turn;
  const view = current();
  const status = document.getElementById("status");
  try {
    const [content, overview] = await Promise.all([show[view](), ask("overview")]);
    if (mine !== turn) return;
    if (writable !== overview.writable) { writable = overview.writable; return refresh(); }
    // The place of the filter must not be lost while somebody types, nor the focus of a button.
    const focused = document.activeElement;
    const key = focused && main.contains(focused) ? [...main.querySelectorAll("button, input")].indexOf(focused) : -1;
    const parts = [content].flat();
    main.replaceChildren(...parts);
    if (key >= 0) main.querySelectorAll("button, input")[key]?.focus({ preventScroll: true });
    document.getElementById("namespace").textContent = overview.namespace;
    document.getElementById("mode").textContent = writable ? "" : "Read-only.";
    const badge = document.getElementById("parked-badge");
    badge.hidden = !overview.parked;
    badge.textContent = overview.parked;
    document.title = `${overview.parked ? `(${overview.parked}) ` : ""}Phonon ${overview.namespace}`;
    status.textContent = overview.address;
    status.className = "ok";
  } catch (error) {
    if (mine !== turn) return;
    status.textContent = error.message;
    status.className = "bad";
  }
  if (!document.hidden) timer = setTimeout(refresh, current() === "doctor" ? 10 * PAUSE : PAUSE);
}

function go() {
  for (const a of document.querySelectorAll("nav a")) {
    if (a.dataset.view === current()) a.setAttribute("aria-current", "page");
    else a.removeAttribute("aria-current");
  }
  main.replaceChildren();
  refresh();
}

addEventListener("hashchange", go);
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || dialog.open || event.target.matches("input")) return;
  if (event.key === "/") { document.getElementById("filter")?.focus(); event.preventDefault(); }
  const view = views[Number(event.key) - 1];
  if (view) location.hash = view;
});
go();
