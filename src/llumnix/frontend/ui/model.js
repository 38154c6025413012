// What the page knows. Pure: `apply` takes an event of the feed in and returns what is to be seen of
// it: flights, flashes and lines to say. Times are the server's, in seconds.

export const KEPT_S = 600;
const EVENTS_KEPT = 1500;
const POINTS_KEPT = 60;

export const PHASES = {
  w: "waiting", p: "prompt being computed", d: "generating", o: "its instance died; another takes it up",
};

// Kinds of marks: lane, text of the filter, and whether one is said aloud.
export const KINDS = {
  move: { name: "moves", loud: true },
  death: { name: "deaths", loud: true },
  scale: { name: "instances", loud: true },
  place: { name: "dispatches", loud: false },
};
const LANES = {
  move: "move", place: "dispatch dispatches", scale: "up add drain undrain removed renew order",
  death: "death give_up revive quarantine bypass back refused",
};
const KIND_OF = Object.fromEntries(Object.entries(LANES).flatMap(([lane, kinds]) => kinds.split(" ").map((kind) => [kind, lane])));

export function newModel() {
  return {
    hello: { classes: [] }, instances: new Map(), rows: new Map(), more: {}, events: [], points: [],
    rates: {}, controller: "up", frontends: 1, t: 0, heardMs: 0, ready: false, number: 0,
  };
}

/** The server's time now, or that of the log, in seconds. `nowMs`: the browser's clock. */
export function serverTime(m, nowMs) {
  const { speed = 1, end = Infinity } = m.hello.log ?? {};
  return Math.min(end, m.t + (nowMs - m.heardMs) / 1000 * speed);
}

export const tokens = (row) => row.prompt + row.out;

export function apply(m, event, data, nowMs) {
  if (data.t) [m.t, m.heardMs] = [data.t, nowMs];
  if (data.seq) m.seq = data.seq;
  const seen = [];
  switch (event) {
    case "hello": m.hello = data; break;
    case "history": m.events = data.events.map((e) => entry(m, e)); break;
    case "state": whole(m, data); break;
    case "delta": delta(m, data, seen); break;
    case "move": moved(m, data, seen); break;
    case "decision": decided(m, data, seen); break;
  }
  return seen;
}

function whole(m, data) {
  const before = m.rows;
  m.instances = new Map(Object.entries(data.instances));
  m.rows = new Map();
  for (const row of data.requests) open(m, row, data.t, before.get(row[0]));
  m.more = data.more;
  head(m, data);
  m.ready = true;
}

function open(m, [k, inst, rank, phase, prompt, out, age, id, request], t, before) {
  const order = before && before.inst === inst ? before.order : m.number++;
  m.rows.set(k, { k, inst, rank, phase, prompt, out, born: t - age, id, request, order, moving: null });
}

function head(m, data) {
  if (data.controller) m.controller = data.controller;
  if (data.frontends) m.frontends = data.frontends;
  if (data.rates && "tok_s" in data.rates) {
    m.rates = data.rates;
    let waiting = 0;
    for (const row of m.rows.values()) waiting += row.phase === "w";
    m.points.push([data.rates.tok_s, waiting]);
    if (m.points.length > POINTS_KEPT) m.points.shift();
  }
}

function delta(m, data, seen) {
  for (const [id, change] of Object.entries(data.instances ?? {})) {
    if (change === null) m.instances.delete(id);
    else m.instances.set(id, { ...m.instances.get(id), ...change });
  }
  for (const row of data.open ?? []) {
    open(m, row, data.t);
    seen.push({ see: "open", k: row[0] });
  }
  for (const [k, inst, phase, out] of data.moved ?? []) {
    const row = m.rows.get(k);
    if (!row) continue;
    if (row.inst !== inst) {
      // Where its instance has died it was an orphan, if only between two looks.
      const orphan = row.phase === "o" || !["serving", "draining", "hung"].includes(m.instances.get(row.inst)?.state);
      seen.push({ see: "flight", k, from: row.inst, to: inst, orphan });
      row.order = m.number++;
    }
    Object.assign(row, { inst, phase, out });
  }
  for (const [k, out] of data.out ?? []) if (m.rows.has(k)) m.rows.get(k).out = out;
  for (const [k, how] of data.close ?? []) {
    const row = m.rows.get(k);
    if (row) seen.push({ see: "close", k, how, row });
    m.rows.delete(k);
  }
  if (data.more) m.more = data.more;
  head(m, data);
}

function moved(m, data, seen) {
  const row = m.rows.get(data.k);
  if (row) row.moving = data.phase === "begun" ? data.to : null;
  if (data.phase === "begun") return;
  note(m, "move", data, seen);
  if (data.outcome === "migrated") {
    seen.push({ see: "landed", k: data.k, from: data.from, to: data.to, ms: data.downtime_ms });
  }
}

function decided(m, data, seen) {
  if (data.kind === "death" || data.kind === "give_up") seen.push({ see: "flash", instance: data.target });
  note(m, "decision", data, seen);
}

function note(m, event, data, seen) {
  const line = entry(m, { event, ...data });
  m.events.push(line);
  if (m.events.length > EVENTS_KEPT) m.events.splice(0, EVENTS_KEPT / 3);
  if (KINDS[line.kind].loud) seen.push({ see: "say", text: line.text });
}

/** A line for the outcome of an order that was given on this page. */
export function ordered(m, text, why, failed, nowMs) {
  const seen = [], data = { t: serverTime(m, nowMs), kind: failed ? "refused" : "order", target: "", text, why };
  note(m, "decision", data, seen);
  return seen;
}

function entry(m, e) {
  const kind = KIND_OF[e.event === "move" ? "move" : e.kind] ?? "scale";
  return { t: e.t, kind, bad: isBad(e), k: e.k, text: told(m, e), why: whyOf(e), target: e.target };
}

const isBad = (e) => ["death", "give_up", "quarantine", "bypass", "refused"].includes(e.kind)
  || (e.event === "move" && e.outcome !== "migrated");

function whyOf(e) {
  if (e.event === "move" && e.outcome !== "migrated") return `${e.outcome}: ${e.reason}`;
  return e.why ?? "";
}

const SAID = {
  up: "serves", add: "is added", drain: "drains", undrain: "serves on", renew: "is started again", removed: "is removed",
  death: "died and starts again", give_up: "is given up", quarantine: "is quarantined",
};

function told(m, e) {
  if (e.event === "move") {
    if (e.outcome !== "migrated") return `${e.request} stays at ${e.from}`;
    const paused = e.downtime_ms === null ? "" : `, paused ${millis(e.downtime_ms)}`;
    return `${e.request} moved ${e.from} → ${e.to}${paused}`;
  }
  switch (e.kind) {
    case "dispatch": return `${m.rows.get(e.k)?.id ?? "a request"} placed at ${e.target}`;
    case "dispatches": return `${e.count} more placed`;
    case "revive": return `${e.client_id ?? e.target} goes on at ${e.instance} after ${seconds(e.gap_s)}`;
    case "bypass": return "controller bypassed";
    case "back": return "controller is back";
    default: return SAID[e.kind] ? `${e.target} ${SAID[e.kind]}` : e.text ?? e.kind;
  }
}

export function millis(ms) {
  return ms >= 1000 ? seconds(ms / 1000) : `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
}

export function seconds(s) {
  if (s === undefined || s === null) return "–";
  if (s < 60) return `${s < 10 ? s.toFixed(1) : Math.round(s)} s`;
  return s < 3600 ? `${Math.floor(s / 60)} min ${Math.round(s % 60)} s` : `${(s / 3600).toFixed(1)} h`;
}

export function bytes(n) {
  const units = ["B", "kB", "MB", "GB"];
  let at = 0;
  for (; n >= 1000 && at < 3; at++) n /= 1000;
  return `${n >= 100 || at === 0 ? Math.round(n) : n.toFixed(1)} ${units[at]}`;
}

export const count = (n) => (n >= 10000 ? `${(n / 1000).toFixed(n >= 100000 ? 0 : 1)}k` : String(Math.round(n)));

export function className(m, rank) {
  return m.hello.classes[rank]?.name ?? `class ${rank}`;
}

/** Requests of each instance, in the order in which they came there. */
export function byInstance(m) {
  const found = new Map([...m.instances.keys()].map((id) => [id, []]));
  for (const row of m.rows.values()) found.get(row.inst)?.push(row);
  for (const rows of found.values()) rows.sort((a, b) => a.order - b.order);
  return found;
}
