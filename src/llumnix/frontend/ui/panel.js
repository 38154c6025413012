// What is chosen, the dialogs, and the table. All text goes in as text: ids are the clients'.

import { PHASES, bytes, className, count, millis, seconds, serverTime } from "./model.js";
import { ask, setKey } from "./feed.js";

const ROWS_MAX = 2000;

export function el(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes ?? {})) made.setAttribute(key, value);
  made.append(...children.filter((c) => c !== null && c !== undefined)); // Strings become text.
  return made;
}
const facts = (pairs) => el("dl", { class: "facts" }, ...pairs.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value ?? "–")]));
const pressed = (made, act) => { made.addEventListener("click", act); return made; };
const button = (text, key, act, more) => pressed(
  el("button", { title: `${text} (${key})`, ...more }, text, el("kbd", { "aria-hidden": "true" }, key)), act);

export class Panel {
  constructor(model, act, swatch) {
    Object.assign(this, { model, act, swatch, at: document.getElementById("panel"), life: null });
  }

  /** Shows an instance or a request; nothing if both are null. */
  show({ instance, k }, nowMs) {
    const row = this.model.rows.get(k), one = this.model.instances.get(instance);
    if (row) this.last = row;
    if (k !== this.k) { [this.k, this.life] = [k, null]; this.fetch(row); }
    const gone = k !== null && k !== undefined && !row && this.last?.k === k;
    this.at.hidden = !(row || gone || one);
    if (this.at.hidden) return;
    const focused = document.activeElement?.closest("#panel") && document.activeElement.dataset.act;
    this.at.replaceChildren(...(row || gone ? this.request(row ?? this.last, gone, nowMs) : this.instance(instance, one)));
    if (focused) this.at.querySelector(`[data-act="${focused}"]`)?.focus();
  }

  async fetch(row) {
    if (!row) return;
    const life = await ask("GET", `v1/requests/${encodeURIComponent(row.request)}`).catch(() => null);
    if (this.k === row.k) this.life = life ?? this.life; // It may have ended; what is known stays.
  }

  refresh() { this.fetch(this.model.rows.get(this.k)); }

  head(kind, name) {
    const close = pressed(el("button", { class: "close", "aria-label": "Close", title: "Close (Esc)", "data-act": "close" }, "×"), () => this.act("close"));
    return el("div", { class: "head" }, el("p", { class: "quiet" }, kind), close, el("h2", { title: name }, name));
  }

  instance(id, one) {
    const sum = (list) => list.reduce((a, b) => a + b, 0);
    const drains = one.state === "draining";
    return [
      this.head("Instance", id),
      el("p", { class: `state ${one.state}` }, one.state, one.why ? el("span", { class: "why" }, one.why) : null),
      facts([
        ["KV memory", `${count(one.kv)} of ${count(one.cap)} tokens`],
        ["Freeness", one.free === null ? "–" : `${one.free} steps`],
        ["Running", sum(one.run)], ["Waiting", sum(one.wait)], ["Restarts", one.restarts], ["Host", one.node],
      ]),
      el("div", { class: "acts" }, ...(drains ? [["Undrain", "u"]] : [["Drain", "d"], ["Restart", "r"]]).map(([name, key]) => {
        const what = name.toLowerCase();
        return button(name, key, () => this.act(what), { "data-act": what });
      })),
    ];
  }

  request(row, gone, nowMs) {
    const life = this.life, moves = [...(life?.migrations ?? [])].reverse();
    const swatch = el("span", { class: "swatch" });
    this.swatch(swatch, row.rank);
    return [
      this.head("Request", row.id),
      el("p", { class: "state" }, swatch, `${className(this.model, row.rank)} · `, gone ? "has ended" : PHASES[row.phase]),
      facts([
        ["Instance", row.inst],
        ["Tokens", `${row.prompt} prompt, ${row.out} generated`],
        ["Age", seconds(Math.max(0, serverTime(this.model, nowMs) - row.born))],
        ["First token", life?.first_token_s ? `after ${millis(life.first_token_s * 1000)}` : "–"],
        ["Placed at", life?.why], ...(life?.key ? [["Key", life.key]] : []),
        ...(life?.lives_used ? [["Lives used", life.lives_used]] : []),
      ]),
      gone ? null : el("div", { class: "acts" }, button("Move to …", "m", () => this.act("migrate"), { "data-act": "migrate" })),
      el("h3", {}, moves.length ? `Moves (${moves.length})` : "No moves yet"),
      el("ol", { class: "moves" }, ...moves.map((m) => el("li", { class: m.outcome === "migrated" ? "move" : "bad" },
        el("b", {}, `${m.source} → ${m.destination}`),
        el("span", {}, m.outcome === "migrated" || m.outcome === "running" ? null : `${m.outcome}: ${m.reason}`,
          m.outcome === "running" ? "under way" : null,
          m.outcome === "migrated" ? `${m.downtime_ms === null ? "" : `${millis(m.downtime_ms)} pause · `}${m.stages.length} stages · ${bytes(m.stages.reduce((n, s) => n + s.bytes, 0))}` : null),
        el("span", { class: "why" }, m.why)))),
    ].filter(Boolean);
  }
}

export const asking = () => document.querySelector("dialog[open]") !== null;

/** Asks the user; resolves with the fields' values, or null. `submit(values)` may throw: its message
 *  is shown, and the key is asked for if that was refused. */
export function dialog({ title, text, fields = [], go, submit }) {
  if (asking()) return Promise.resolve(null);
  const inputs = new Map(), error = el("p", { class: "error", role: "alert" });
  const label = (name, input) => { inputs.set(name, input); return el("label", {}, name, input); };
  const made = fields.map((f) => label(f.name, f.options
    ? el("select", {}, ...f.options.map(([value, shown]) => el("option", { value }, shown)))
    : el("input", { type: f.type ?? "text", autocomplete: "off" })));
  const cancel = el("button", { type: "button" }, "Cancel"), ok = el("button", { class: "go" }, go);
  const form = el("form", { method: "dialog" }, el("h2", {}, title), text ? el("p", {}, text) : null,
    ...made, error, el("div", { class: "acts" }, cancel, ok));
  // An element of its own: the news that one is closed comes later, when the next may be open.
  const box = el("dialog", { "aria-label": title }, form);
  document.body.append(box);
  return new Promise((resolve) => {
    let result = null;
    cancel.addEventListener("click", () => box.close());
    box.addEventListener("close", () => { box.remove(); resolve(result); });
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const values = Object.fromEntries([...inputs].map(([name, input]) => [name, input.value]));
      if (inputs.has("Admin key")) setKey(values["Admin key"]);
      ok.disabled = true;
      try {
        result = (await submit?.(values)) ?? values;
        box.close();
      } catch (problem) {
        error.textContent = problem.message;
        if (problem.refused && !inputs.has("Admin key")) {
          error.before(label("Admin key", el("input", { type: "password", autocomplete: "off" })));
          inputs.get("Admin key").focus();
        }
      } finally { ok.disabled = false; }
    });
    box.showModal();
    (inputs.values().next().value ?? ok).focus();
  });
}

/** The same content as a table. */
export function table(at, model, nowMs, choose) {
  const line = (kind, cells) => el("tr", {}, ...cells.map((c) => el(kind, kind === "th" ? { scope: "col" } : {}, c)));
  const now = serverTime(model, nowMs), sum = (list) => list.reduce((a, b) => a + b, 0);
  const instances = [...model.instances].map(([id, o]) => {
    const pick = pressed(el("button", { class: "plain" }, id), () => choose({ instance: id, k: null }));
    return line("td", [pick, o.state, `${o.kv} of ${o.cap}`, o.free ?? "–", sum(o.run), sum(o.wait), o.restarts, o.why ?? ""]);
  });
  const rows = [...model.rows.values()].slice(0, ROWS_MAX).map((r) => {
    const pick = pressed(el("button", { class: "plain" }, r.id), () => choose({ instance: r.inst, k: r.k }));
    return line("td", [pick, r.inst, className(model, r.rank), PHASES[r.phase], r.prompt, r.out, seconds(Math.max(0, now - r.born))]);
  });
  at.replaceChildren(
    el("table", {}, el("caption", {}, `Instances (${model.instances.size})`),
      el("thead", {}, line("th", ["Instance", "State", "KV tokens", "Freeness", "Running", "Waiting", "Restarts", "Why"])), el("tbody", {}, ...instances)),
    el("table", {}, el("caption", {}, `Requests (${model.rows.size})`),
      el("thead", {}, line("th", ["Request", "Instance", "Class", "State", "Prompt", "Generated", "Age"])), el("tbody", {}, ...rows)));
}
