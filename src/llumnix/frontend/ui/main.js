// Puts the page together: the feed goes into the model, and the model is drawn.

import { Board, looks } from "./board.js";
import { again, ask, follow, setKey } from "./feed.js";
import { apply, className, count, millis, newModel, ordered } from "./model.js";
import { Panel, asking, dialog, el, table } from "./panel.js";
import { Timeline } from "./timeline.js";

const $ = (id) => document.getElementById(id);
const model = newModel();
const board = new Board($("board"), model);
const panel = new Panel(model, act, swatch);
const timeline = new Timeline(model, chooseEvent);
const dark = matchMedia("(prefers-color-scheme: dark)");
let theme = null, asTable = false, said = 0, spoken = [], past = null;
window.llumnix = { model, board }; // for tests

function choose({ instance = null, k = null }) {
  board.chosen = { instance, k };
  board.dirty = true;
  panel.show(board.chosen, performance.now());
}

function chooseEvent(e) {
  const row = model.rows.get(e.k);
  if (row) choose({ instance: row.inst, k: row.k });
  else if (model.instances.has(e.target)) choose({ instance: e.target });
}

function close() {
  if (board.chosen.instance !== null || board.chosen.k !== null) choose({});
  else board.first = null;
  board.dirty = true;
}

// -- controls

async function order(title, text, go, fields, send) {
  const submit = async (values) => ({ told: await send(values).catch((error) => {
    tell(ordered(model, `${title}: refused`, error.message, true, performance.now()));
    throw error;
  }) });
  const done = await dialog({ title, text, go, fields, submit });
  if (done) tell(ordered(model, done.told[0], done.told[1], false, performance.now()));
}

const LIFE = {
  drain: ["Drain", "Its requests move to other instances, then it is stopped."],
  undrain: ["Undrain", "It takes requests again."],
  restart: ["Restart", "Its requests move to other instances, then it is stopped and started again."],
};

function act(what) {
  const { instance, k } = board.chosen, row = model.rows.get(k), id = row ? row.inst : instance;
  if (what === "close") return close();
  if (model.hello.log) return;
  if (what === "add") {
    return order("Add an instance?", "It serves once its engine is up.", "Add", [], async () => [`${(await ask("POST", "v1/instances")).id} starts`, ""]);
  }
  if (LIFE[what] && id) {
    const [name, text] = LIFE[what];
    return order(`${name} ${id}?`, text, name, [], async () => [`${id}: ${(await ask("POST", `v1/instances/${encodeURIComponent(id)}/${what}`)).state}`, "ordered on this page"]);
  }
  if (what === "migrate" && row) {
    const others = [...model.instances].filter(([name, one]) => name !== row.inst && one.state === "serving").map(([name]) => [name, name]);
    return order("Move this request?", row.id, "Move", [{ name: "To", options: [["", "the freest"], ...others] }], async ({ To }) => {
      const m = await ask("POST", "v1/migrations", { request_id: row.request, destination: To || null });
      panel.refresh();
      if (m.outcome !== "migrated") throw new Error(`${m.outcome}: ${m.reason}`);
      return [`${row.id}: ${m.source} → ${m.destination}`, m.downtime_ms === null ? "" : `paused ${millis(m.downtime_ms)}`];
    });
  }
}

const KEYS = [["← →", "an instance"], ["↑ ↓", "a request of it"], ["Enter", "show it"], ["Esc", "let go"], ["d", "drain"], ["u", "undrain"],
  ["r", "restart"], ["m", "move the request"], ["a", "add an instance"], ["t", "table or board"], ["/", "filter decisions"], ["?", "these keys"]];

function help() {
  const list = el("dl", { class: "facts" }, ...KEYS.flatMap(([key, what]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, what)]));
  dialog({ title: "Keys", text: list, go: "Close" });
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || asking()) return;
  if (event.key === "Escape") { $("search").blur(); return close(); }
  if (event.target.closest("input, select")) return;
  const doing = { d: "drain", u: "undrain", r: "restart", m: "migrate", a: "add" }[event.key];
  if (doing) act(doing);
  else if (event.key === "?") help();
  else if (event.key === "t") views();
  else if (event.key === "/") $("search").focus();
  else if (event.key.startsWith("Arrow") && !event.target.closest("#events, #table, #panel")) {
    const next = board.beside(event.key), row = model.rows.get(next.k);
    board.chosen = next;
    board.dirty = true;
    $("board").focus();
    spoken = [row ? `${row.id}, ${className(model, row.rank)}, at ${row.inst}` : next.instance ?? ""];
    if (!$("panel").hidden) choose(next);
  } else if (event.key === "Enter" && event.target === $("board")) choose(board.chosen);
  else return;
  event.preventDefault();
});

$("board").addEventListener("click", (event) => {
  const found = board.at(event.offsetX, event.offsetY);
  if (found.cell) { board.first = Math.max(0, Math.min(found.cell.at, model.instances.size - 8)); board.dirty = true; return; }
  choose({ instance: found.instance ?? null, k: found.row?.k ?? null });
});
$("board").addEventListener("pointermove", (event) => {
  const lines = board.tipOf(board.at(event.offsetX, event.offsetY));
  $("tip").hidden = !lines;
  if (!lines) return;
  $("tip").replaceChildren(el("b", {}, lines[0]), el("span", {}, lines[1]));
  const left = Math.min(event.offsetX + 14, board.w - $("tip").offsetWidth - 8);
  $("tip").style.transform = `translate(${left}px, ${Math.max(4, event.offsetY - 52)}px)`;
});
$("board").addEventListener("pointerleave", () => { $("tip").hidden = true; });
$("add").addEventListener("click", () => act("add"));
$("help").addEventListener("click", help);
$("views").addEventListener("click", views);
$("theme").addEventListener("click", () => { theme = shade() === "dark" ? "light" : "dark"; paint(); });
dark.addEventListener("change", paint);

const shade = () => theme ?? (dark.matches ? "dark" : "light");

function paint() {
  document.documentElement.dataset.theme = shade();
  board.paint(shade());
  legend();
}

function views() {
  asTable = !asTable;
  $("views").setAttribute("aria-pressed", String(asTable));
  $("board").hidden = asTable;
  $("legend").hidden = asTable;
  $("table").hidden = !asTable;
  draw();
}

function swatch(at, rank) {
  const look = looks(model.hello.classes, shade())[rank];
  if (look) { at.style.backgroundColor = look.colour; at.classList.add(look.pattern); }
}

function legend() {
  const chip = (name, text, rank) => {
    const mark = el("span", { class: `swatch ${name}` });
    if (rank !== undefined) swatch(mark, rank);
    return el("span", {}, mark, text);
  };
  $("legend").replaceChildren(...model.hello.classes.map((c, rank) => chip("", c.name, rank)),
    chip("hatch", "prompt"), chip("hollow", "waiting"), chip("lost", "orphan"));
}

function figures() {
  const { rates } = model, rows = [...model.rows.values()];
  const waiting = rows.filter((r) => r.phase === "w").length, [half, most] = rates.ttft_ms ?? [];
  const serving = [...model.instances.values()].filter((i) => i.state === "serving").length;
  const pairs = [
    ["instances", `${serving}/${model.instances.size}`], ["requests", count(rows.length - waiting)], ["waiting", count(waiting), 1],
    ["requests/s", rates.req_s ?? "–"], ["tokens/s", rates.tok_s === undefined ? "–" : count(rates.tok_s), 0],
    ["first token P50", half === undefined ? "–" : millis(half)], ["P99", most === undefined ? "–" : millis(most)],
    ["controller", model.controller], ["frontends", model.frontends],
  ];
  $("figures").replaceChildren(...pairs.map(([name, value, series]) => el("div", { class: value === "bypassed" ? "bad" : "" },
    el("dt", {}, name), el("dd", {}, value, series === undefined ? null : spark(series)))));
}

function spark(series) {
  const most = Math.max(1, ...model.points.map((p) => p[series])), ns = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(ns, "svg"), line = document.createElementNS(ns, "polyline");
  const at = model.points.map((p, x) => `${54 - 0.9 * (model.points.length - x)},${15 - 13 * p[series] / most}`);
  line.setAttribute("points", at.join(" "));
  svg.setAttribute("viewBox", "0 0 54 16");
  svg.setAttribute("aria-hidden", "true");
  svg.append(line);
  return svg;
}

function draw() {
  const now = performance.now();
  figures();
  timeline.show(now);
  if (!$("panel").hidden) panel.show(board.chosen, now);
  if (asTable && !$("table").contains(document.activeElement)) table($("table"), model, now, choose);
  if (spoken.length && now - said > 1500) {
    $("live").textContent = spoken.slice(-3).join(". ");
    [spoken, said] = [[], now];
  }
}

function tell(list) {
  board.see(list, performance.now());
  spoken.push(...list.filter((one) => one.see === "say").map((one) => one.text));
}

function banner(text) {
  $("banner").hidden = !text;
  $("banner").textContent = text;
}

follow({
  query: () => past?.query() ?? (model.seq ? `?since=${model.seq}` : ""),
  event(name, data) {
    banner("");
    tell(apply(model, name, data, performance.now()));
    if (name !== "hello") return;
    $("model").textContent = data.model;
    $("policy").textContent = data.policy;
    document.title = `${data.model} · llumnix`;
    paint();
    if (data.log) import("./past.js").then((bar) => { past = bar; bar.show(model, again); });
  },
  lost: banner,
  async key(reason) {
    banner("This server asks for a key.");
    for (let values = null; !values;) {
      values = await dialog({ title: "Key", text: `${reason}. The page keeps it until it is closed.`, go: "Open", fields: [{ name: "Key", type: "password" }] });
      if (values) setKey(values.Key);
      else await new Promise((go) => setTimeout(go, 300));
    }
  },
});

paint();
draw();
setInterval(draw, 500);
setInterval(() => panel.refresh(), 2000);
requestAnimationFrame(function next(now) { board.frame(now); requestAnimationFrame(next); });
