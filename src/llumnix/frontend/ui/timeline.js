// The last ten minutes: a strip of marks, and beneath it the decisions with their reasons.

import { KEPT_S, KINDS, serverTime } from "./model.js";
import { el } from "./panel.js";

const LINES_MAX = 120, LANES = Object.keys(KINDS);
const INKS = { move: "accent", death: "bad", scale: "warn", place: "quiet" };

export class Timeline {
  constructor(model, choose) {
    Object.assign(this, { model, choose, off: new Set(["place"]), drawn: -1 });
    [this.strip, this.list, this.search] = ["strip", "events", "search"].map((id) => document.getElementById(id));
    const kinds = document.getElementById("kinds");
    for (const [kind, { name }] of Object.entries(KINDS)) {
      const button = el("button", { class: "toggle", "data-kind": kind, "aria-pressed": String(!this.off.has(kind)) }, name);
      button.addEventListener("click", () => {
        if (!this.off.delete(kind)) this.off.add(kind);
        button.setAttribute("aria-pressed", String(!this.off.has(kind)));
        this.lines();
      });
      kinds.append(button);
    }
    this.search.addEventListener("input", () => this.lines());
    this.strip.addEventListener("click", (e) => this.pick(e.offsetX / this.strip.clientWidth));
  }

  /** Shows what is new. */
  show(nowMs) {
    this.marks(nowMs);
    const last = this.model.events.at(-1);
    if (last !== this.drawn) this.lines();
    this.drawn = last;
  }

  marks(nowMs) {
    const { clientWidth: w, clientHeight: h } = this.strip, ratio = devicePixelRatio || 1;
    if (this.strip.width !== w * ratio) [this.strip.width, this.strip.height] = [w * ratio, h * ratio];
    const c = this.strip.getContext("2d"), now = serverTime(this.model, nowMs);
    const css = getComputedStyle(document.documentElement), ink = (name) => css.getPropertyValue(`--${name}`);
    c.setTransform(ratio, 0, 0, ratio, 0, 0);
    c.clearRect(0, 0, w, h);
    c.font = `11px ${getComputedStyle(document.body).fontFamily}`;
    const lane = (h - 15) / LANES.length, left = 84, x = (t) => left + (w - left - 12) * (1 - (now - t) / KEPT_S);
    for (let minute = 0; minute <= 10; minute++) {
      c.fillStyle = ink("line");
      c.fillRect(x(now - minute * 60), 0, 1, h - 13);
      c.fillStyle = ink("quiet");
      c.textAlign = minute ? "center" : "right";
      c.fillText(minute ? `−${minute} min` : "now", x(now - minute * 60), h - 2);
    }
    c.textAlign = "left";
    LANES.forEach((kind, at) => c.fillText(KINDS[kind].name, 12, at * lane + lane / 2 + 4));
    for (const e of this.model.events) {
      if (now - e.t > KEPT_S) continue;
      c.fillStyle = ink(e.bad ? "bad" : INKS[e.kind]);
      c.globalAlpha = e.kind === "place" ? 0.35 : 0.9;
      c.beginPath();
      c.roundRect(x(e.t) - 1.5, LANES.indexOf(e.kind) * lane + 2, 3, lane - 4, 1.5);
      c.fill();
    }
    c.globalAlpha = 1;
  }

  /** Scrolls to the decision that was made nearest to a place on the strip. */
  pick(share) {
    const now = this.model.t, t = now - (1 - share) * KEPT_S;
    const lines = [...this.list.children].filter((line) => line.at);
    lines.sort((a, b) => Math.abs(a.at - t) - Math.abs(b.at - t));
    lines[0]?.scrollIntoView({ block: "nearest" });
    lines[0]?.querySelector("button")?.focus();
  }

  lines() {
    const wanted = this.search.value.toLowerCase(), shown = [];
    const { events } = this.model;
    for (let at = events.length - 1; at >= 0 && shown.length < LINES_MAX; at--) {
      const e = events[at];
      if (this.off.has(e.kind) || !`${e.text} ${e.why}`.toLowerCase().includes(wanted)) continue;
      shown.push(e);
    }
    this.list.replaceChildren(...shown.map((e) => this.line(e)));
    if (!shown.length) this.list.append(el("li", { class: "quiet" }, wanted ? "Nothing like that" : "Nothing yet"));
  }

  line(e) {
    const what = el("button", { class: "plain" }, e.text);
    what.addEventListener("click", () => this.choose(e));
    const time = new Date(e.t * 1000).toLocaleTimeString([], { hour12: false });
    const line = el("li", { class: e.bad ? "bad" : e.kind }, el("time", {}, time), what, el("span", { class: "why" }, e.why));
    line.at = e.t;
    return line;
  }
}
