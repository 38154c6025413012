// The board: a column an instance, as high as its KV memory; a block a request, as high as its tokens.

import { byInstance, count, millis, tokens } from "./model.js";

const FLIGHT_MS = 400, TRAIL_MS = 2200, FLASH_MS = 1500, FADE_MS = 260, EASE_MS = 90;
const BLOCKS_MAX = 60, COLUMNS_MAX = 64, OPENED = 8, LABELS_MAX = 8, LABEL_H = 54, KEPT_MAX = 400;
// Okabe and Ito's colours, which nearly everybody can tell apart.
const COLOURS = {
  light: { ink: "#fff", usual: "#0072B2", others: ["#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"] },
  dark: { ink: "#08121c", usual: "#56B4E9", others: ["#E8702A", "#2BB58D", "#CC79A7", "#E69F00", "#4C8FD6", "#F0E442"] },
};
const PATTERNS = ["slant", "dots", "bars"];

/** Of each class: the usual one is plain. */
export function looks(classes, theme) {
  let other = 0;
  return classes.map((c) => (c.priority === 0
    ? { colour: COLOURS[theme].usual, pattern: "plain" }
    : { colour: COLOURS[theme].others[other % 6], pattern: PATTERNS[other++ % 3] }));
}

function tile(pattern, ink, size) {
  const canvas = new OffscreenCanvas(size, size);
  const c = canvas.getContext("2d");
  c.strokeStyle = c.fillStyle = ink;
  c.lineWidth = size / 6;
  const line = (...at) => { c.beginPath(); c.moveTo(at[0], at[1]); c.lineTo(at[2], at[3]); c.stroke(); };
  if (pattern === "slant") for (const d of [-size, 0, size]) line(d - 2, size + 2, d + size + 2, -2);
  if (pattern === "dots") { c.beginPath(); c.arc(size / 2, size / 2, size / 6, 0, 7); c.fill(); }
  if (pattern === "bars") line(0, size / 2, size, size / 2);
  return canvas;
}

/** The height that an arc between two places bends towards. */
const topOf = (a, b) => Math.max(-30, Math.min(a.y, b.y) - 90 - Math.abs(b.x - a.x) * 0.15);
const ease = (u) => (u < 0.5 ? 4 * u ** 3 : 1 - (2 - 2 * u) ** 3 / 2);

export class Board {
  constructor(canvas, model) {
    Object.assign(this, { canvas, model, c: canvas.getContext("2d") });
    this.sprites = new Map();
    this.columns = [];
    this.trails = [];
    this.ghosts = [];
    this.flashes = new Map();
    this.caps = new Map();
    this.first = null; // of the columns that are opened out of the grid
    this.chosen = { instance: null, k: null };
    this.dirty = true;
    this.lastMs = 0;
    this.frames = 0;
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  get inGrid() { return this.model.instances.size > COLUMNS_MAX && this.first === null; }

  resize() {
    const { clientWidth: w, clientHeight: h } = this.canvas;
    this.ratio = devicePixelRatio || 1;
    [this.w, this.h] = [w, h];
    [this.canvas.width, this.canvas.height] = [w * this.ratio, h * this.ratio];
    this.jump = true;
    this.dirty = true;
  }

  /** Colours come from the style sheet. */
  paint(theme) {
    const css = getComputedStyle(document.documentElement);
    const names = ["ground", "well", "line", "text", "quiet", "bad", "warn", "good", "plate"];
    this.ink = Object.fromEntries(names.map((n) => [n, css.getPropertyValue(`--${n}`).trim()]));
    this.ink.block = COLOURS[theme].ink;
    this.font = getComputedStyle(document.body).fontFamily;
    const size = Math.round(8 * (devicePixelRatio || 1));
    this.looks = looks(this.model.hello.classes, theme).map((look) => ({
      colour: look.colour,
      over: look.pattern !== "plain" && this.fillOf(tile(look.pattern, "rgba(255,255,255,.45)", size)),
      hatch: this.fillOf(tile("slant", look.colour, size)),
    }));
    this.grey = this.fillOf(tile("slant", this.ink.line, size));
    this.dirty = true;
  }

  fillOf(canvas) {
    const made = this.c.createPattern(canvas, "repeat");
    made.setTransform(new DOMMatrix().scale(1 / (devicePixelRatio || 1)));
    return made;
  }

  lookOf(rank) { return this.looks[rank] ?? this.looks[0] ?? { colour: this.ink.quiet }; }

  /** What `apply` said is to be seen. */
  see(list, nowMs) {
    for (const one of list) {
      const sprite = this.sprites.get(one.k);
      if (one.see === "flight" && sprite) this.fly(sprite, one, nowMs);
      if (one.see === "landed") this.name(one, nowMs);
      if (one.see === "flash") this.flashes.set(one.instance, nowMs);
      if (one.see === "close" && sprite) this.ghosts.push({ ...sprite, at: nowMs, row: one.row });
      if (one.see === "close") this.sprites.delete(one.k);
    }
    // A page that is hidden draws nothing, and forgets all the same.
    for (const list of [this.trails, this.ghosts]) if (list.length > KEPT_MAX) list.splice(0, KEPT_MAX / 2);
    this.dirty = true;
  }

  fly(sprite, { k, orphan }, nowMs) {
    const { x, y, h } = this.spot(sprite, nowMs);
    const trail = { k, from: { x: x + sprite.w / 2, y: y + h / 2 }, at: nowMs, orphan, rank: sprite.row.rank };
    this.trails.push(trail);
    if (!this.calm.matches) sprite.flight = { at: nowMs, x, y, h, trail };
  }

  name({ k, from, to, ms }, nowMs) {
    if (ms === null) return;
    const trail = this.trails.findLast((t) => t.k === k && nowMs - t.at < TRAIL_MS);
    if (trail) [trail.text, trail.named] = [millis(ms), nowMs];
  }

  // -- where things are

  layout() {
    this.dirty = false;
    const ids = [...this.model.instances.keys()];
    const shown = this.first === null ? ids : ids.slice(this.first, this.first + OPENED);
    const n = Math.max(1, shown.length);
    const pitch = Math.min(170, (this.w - 32) / n), body = Math.max(3, pitch - Math.max(3, pitch * 0.2));
    const left = (this.w - pitch * n) / 2 + (pitch - body) / 2;
    const queueH = Math.max(70, this.h * 0.17), base = this.h - LABEL_H, tall = base - queueH;
    for (const [id, one] of this.model.instances) if (one.cap) this.caps.set(id, one.cap);
    const most = Math.max(1, ...shown.map((id) => this.caps.get(id) ?? 1));
    const groups = byInstance(this.model);
    for (const sprite of this.sprites.values()) sprite.there = false;
    this.columns = shown.map((id, at) => {
      const one = this.model.instances.get(id), cap = this.caps.get(id) ?? most, h = tall * cap / most;
      const column = { id, one, x: left + at * pitch, w: body, y: base - h, h, base, cap, pitch, rows: [] };
      this.stack(column, groups.get(id) ?? [], queueH);
      return column;
    });
    for (const [k, sprite] of this.sprites) if (!sprite.there) this.sprites.delete(k);
    this.jump = false;
  }

  stack(column, rows, queueH) {
    const running = rows.filter((r) => r.phase !== "w"), waiting = rows.filter((r) => r.phase === "w");
    const rest = [...(this.model.more[column.id] ?? [0, 0])];
    let kept = running;
    if (running.length > BLOCKS_MAX) {
      const large = [...running].sort((a, b) => tokens(b) - tokens(a)).slice(0, BLOCKS_MAX);
      const among = new Set(large);
      kept = running.filter((r) => among.has(r));
      rest[0] += running.length - kept.length;
      rest[1] += running.reduce((n, r) => n + (among.has(r) ? 0 : tokens(r)), 0);
    }
    // Shared prefixes are held once, so blocks may add up to more than there is.
    const sum = kept.reduce((n, r) => n + tokens(r), rest[1]);
    const scale = column.h / Math.max(column.cap, sum);
    let y = column.base;
    for (const row of kept) {
      const h = tokens(row) * scale;
      y -= h;
      this.place(row, column, y, h);
    }
    column.rest = rest[0] ? { n: rest[0], y: y - rest[1] * scale, h: rest[1] * scale } : null;
    const needs = waiting.map((r) => Math.max(5, tokens(r) * scale) + 2);
    const room = Math.min(1, (queueH - 14) / Math.max(1, needs.reduce((a, b) => a + b, 0)));
    y = column.y - 5;
    waiting.forEach((row, at) => {
      y -= needs[at] * room;
      this.place(row, column, y, Math.max(1, (needs[at] - 2) * room));
    });
    column.rows = [...kept, ...waiting];
  }

  place(row, column, y, h) {
    let sprite = this.sprites.get(row.k);
    const to = { x: column.x, y, h, w: column.w };
    if (!sprite) {
      sprite = { row, x: to.x, y: row.phase === "w" ? y - 14 : y, h, w: to.w, alpha: 0 };
      this.sprites.set(row.k, sprite);
    }
    Object.assign(sprite, { row, to, w: to.w, there: true, dim: column.one.state === "draining" });
    if (this.jump) Object.assign(sprite, to, { alpha: 1 });
  }

  /** Where a sprite is now: on its arc, or on its way to its place. */
  spot(sprite, nowMs) {
    const f = sprite.flight;
    if (!f) return sprite;
    const u = ease(Math.min(1, (nowMs - f.at) / FLIGHT_MS)), v = 1 - u, to = sprite.to;
    return { x: v * f.x + u * to.x, h: v * f.h + u * to.h, y: v * v * f.y + 2 * v * u * topOf(f, to) + u * u * to.y };
  }

  at(x, y) {
    if (this.inGrid) return { cell: this.cells?.find((c) => x >= c.x && x < c.x + c.s && y >= c.y && y < c.y + c.s) };
    const column = this.columns.find((c) => x >= c.x - 4 && x < c.x + c.w + 4);
    if (!column) return {};
    for (const row of [...column.rows].reverse()) {
      const s = this.sprites.get(row.k);
      if (s && y >= s.y - 1 && y <= s.y + Math.max(s.h, 3)) return { instance: column.id, row };
    }
    return { instance: column.id };
  }

  /** What an arrow key chooses. */
  beside(key) {
    const { columns, chosen } = this;
    if (!columns.length) return chosen;
    let at = columns.findIndex((c) => c.id === chosen.instance);
    if (key === "ArrowLeft" || key === "ArrowRight") {
      const step = key === "ArrowLeft" ? -1 : 1;
      at = at < 0 ? 0 : Math.min(columns.length - 1, Math.max(0, at + step));
      return { instance: columns[at].id, k: null };
    }
    const rows = columns[Math.max(0, at)].rows;
    let now = rows.findIndex((r) => r.k === chosen.k);
    now = key === "ArrowUp" ? Math.min(rows.length - 1, now + 1) : now - 1;
    return { instance: columns[Math.max(0, at)].id, k: rows[now]?.k ?? null };
  }

  // -- drawing

  frame(nowMs) {
    const dt = Math.min(100, nowMs - this.lastMs);
    this.lastMs = nowMs;
    if (!this.w || !this.ink) return;
    if (this.dirty) { this.layout(); this.still = false; }
    if (this.still) return;
    const { c } = this, step = this.calm.matches ? 1 : 1 - Math.exp(-dt / EASE_MS);
    c.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    c.clearRect(0, 0, this.w, this.h);
    this.frames++;
    if (this.inGrid) { this.grid(); this.still = true; return; }
    for (const column of this.columns) this.frameOf(column, nowMs);
    const busy = this.move(step, nowMs), drawn = [];
    this.blocks();
    this.fades(nowMs);
    for (const column of this.columns) this.label(column);
    const plates = this.arcs(nowMs);
    for (const s of this.sprites.values()) if (s.flight) this.flying(s, nowMs);
    this.choice(nowMs);
    for (const plate of plates) this.plate(plate, drawn);
    this.still = !(busy || this.trails.length || this.ghosts.length || this.flashes.size);
  }

  move(step, nowMs) {
    let busy = false;
    for (const s of this.sprites.values()) {
      const { to } = s;
      if (s.flight && nowMs - s.flight.at >= FLIGHT_MS) Object.assign(s, to, { flight: null });
      if (s.flight) { busy = true; s.alpha = 1; continue; }
      const off = Math.abs(to.y - s.y) + Math.abs(to.h - s.h) + Math.abs(to.x - s.x) + (1 - s.alpha);
      if (off < 0.1) { Object.assign(s, to, { alpha: 1 }); continue; }
      busy = true;
      s.x += (to.x - s.x) * step;
      s.y += (to.y - s.y) * step;
      s.h += (to.h - s.h) * step;
      s.alpha = Math.min(1, s.alpha + step);
    }
    return busy;
  }

  box(x, y, w, h, r) {
    this.c.beginPath();
    this.c.roundRect(x, y, w, h, Math.min(r, w / 2, h / 2));
  }

  frameOf(col, nowMs) {
    const { c, ink } = this, serves = col.one.state === "serving";
    this.box(col.x - 3, col.y - 3, col.w + 6, col.h + 6, 7);
    c.fillStyle = ink.well;
    c.fill();
    if (!serves) { c.fillStyle = this.grey; c.fill(); }
    c.setLineDash(serves || col.one.state === "draining" ? [] : [5, 4]);
    c.lineWidth = 1;
    c.strokeStyle = ink.line;
    c.stroke();
    c.setLineDash([]);
    const at = this.flashes.get(col.id);
    if (at === undefined) return;
    const u = (nowMs - at) / FLASH_MS;
    if (u >= 1) { this.flashes.delete(col.id); return; }
    c.globalAlpha = (1 - u) * (this.calm.matches ? 0.5 : 0.55 + 0.45 * Math.cos(u * 18));
    c.fillStyle = ink.bad;
    c.fill();
    c.globalAlpha = 1;
  }

  blocks() {
    const many = this.sprites.size > 700;
    for (const s of this.sprites.values()) if (!s.flight) this.block(s, s, many);
    for (const { rest, x, w } of this.columns) {
      if (!rest) continue;
      this.c.fillStyle = this.ink.quiet;
      this.c.globalAlpha = 0.5;
      this.c.fillRect(x, rest.y, w, Math.max(1, rest.h - 1));
      this.c.globalAlpha = 1;
      if (w > 24 && rest.h > 11) this.text(`+${rest.n}`, x + w / 2, rest.y + rest.h / 2 + 4, this.ink.ground, 11, 600);
    }
  }

  block(s, { x, y, h }, plain = false, alpha = 1) {
    const { c, ink } = this, { w } = s, row = s.flight?.trail.orphan ? { ...s.row, phase: "o" } : s.row, look = this.lookOf(row.rank), high = Math.max(h - (h > 4 ? 1.5 : 0.4), 0.8);
    c.globalAlpha = s.alpha * alpha * (s.dim ? 0.55 : 1);
    if (plain) { c.beginPath(); c.rect(x, y, w, high); } else this.box(x, y, w, high, 3);
    if (row.phase === "w" || row.phase === "o") {
      const orphan = row.phase === "o";
      c.fillStyle = orphan ? ink.bad : look.colour;
      c.globalAlpha *= orphan ? 0.22 : 0.1;
      c.fill();
      c.globalAlpha = s.alpha * alpha;
      c.strokeStyle = orphan ? ink.bad : look.colour;
      c.lineWidth = 1.5;
      c.setLineDash(orphan ? [4, 3] : []);
      c.stroke();
      c.setLineDash([]);
    } else if (row.phase === "p") {
      c.fillStyle = ink.ground;
      c.fill();
      c.fillStyle = look.hatch;
      c.fill();
      if (!plain) { c.strokeStyle = look.colour; c.lineWidth = 1; c.stroke(); }
    } else {
      c.fillStyle = look.colour;
      c.fill();
      if (look.over && h > 3) { c.fillStyle = look.over; c.fill(); }
    }
    if (row.moving) { c.strokeStyle = ink.text; c.lineWidth = 1.5; c.stroke(); }
    c.globalAlpha = 1;
    if (!plain && w > 64 && h > 15 && row.phase !== "p") {
      const over = row.phase === "d" ? ink.block : ink.text;
      this.text(this.fit(row.id, w - 14, 11), x + 7, y + high / 2 + 4, over, 11, 500, "left");
    }
  }

  flying(s, nowMs) {
    const { c } = this, spot = this.spot(s, nowMs);
    c.shadowColor = this.lookOf(s.row.rank).colour;
    c.shadowBlur = 18;
    this.block({ ...s, alpha: 1, dim: false }, spot);
    c.shadowBlur = 0;
  }

  fades(nowMs) {
    this.ghosts = this.ghosts.filter((g) => nowMs - g.at < FADE_MS && !this.calm.matches);
    for (const g of this.ghosts) this.block(g, g, true, 1 - (nowMs - g.at) / FADE_MS);
  }

  /** The arcs of the last moves; returns where their downtimes stand. */
  arcs(nowMs) {
    const { c, ink } = this, plates = [];
    this.trails = this.trails.filter((t) => nowMs - t.at < TRAIL_MS);
    for (const t of this.trails) {
      const s = this.sprites.get(t.k);
      if (s) t.to = { x: s.to.x + s.w / 2, y: s.to.y + s.to.h / 2 };
      if (!t.to) continue;
      const u = (nowMs - t.at) / TRAIL_MS, { from, to } = t, x = (from.x + to.x) / 2, top = topOf(from, to);
      c.globalAlpha = (1 - u) ** 1.5 * 0.9;
      c.strokeStyle = t.orphan ? ink.bad : this.lookOf(t.rank).colour;
      c.lineWidth = 2.5;
      c.setLineDash(t.orphan ? [6, 5] : []);
      c.beginPath();
      c.moveTo(from.x, from.y);
      c.quadraticCurveTo(x, top, to.x, to.y);
      c.stroke();
      c.setLineDash([]);
      if (t.text) plates.push({ t, x, y: (from.y + to.y) / 4 + top / 2 - 16, u });
    }
    c.globalAlpha = 1;
    return plates.slice(-LABELS_MAX);
  }

  plate({ t, x, y, u }, drawn) {
    const { c, ink } = this;
    c.font = `600 12px ${this.font}`;
    const w = c.measureText(t.text).width + 16;
    while (drawn.some((d) => Math.abs(d.x - x) < (d.w + w) / 2 && Math.abs(d.y - y) < 22)) y -= 23;
    y = Math.max(14, y);
    drawn.push({ x, y, w });
    c.globalAlpha = Math.min(1, (1 - u) * 3);
    this.box(x - w / 2, y - 11, w, 22, 11);
    c.fillStyle = ink.plate;
    c.fill();
    c.strokeStyle = this.lookOf(t.rank).colour;
    c.lineWidth = 1.5;
    c.stroke();
    this.text(t.text, x, y + 4, ink.text, 12, 600);
    c.globalAlpha = 1;
  }

  label(col) {
    const { ink } = this, { one } = col, x = col.x + col.w / 2, y = col.base + 20, wide = col.pitch > 62;
    const serves = one.state === "serving";
    const colour = serves ? ink.text : ["failed", "hung", "restarting"].includes(one.state) ? ink.bad : ink.warn;
    this.text(col.id, x, y, colour, col.pitch > 30 ? 13 : 9, 600);
    if (!wide) return;
    this.text(serves ? `KV ${one.cap ? Math.round(100 * one.kv / one.cap) : 0} %` : one.state, x, y + 15, serves ? ink.quiet : colour, 11, 500);
    if (serves && one.free !== null) this.text(`free ${count(one.free)}`, x, y + 29, ink.quiet, 11, 500);
  }

  choice(nowMs) {
    const { c, ink, chosen } = this, sprite = this.sprites.get(chosen.k);
    const column = this.columns.find((o) => o.id === chosen.instance);
    c.strokeStyle = ink.text;
    c.lineWidth = 2;
    if (sprite) {
      const spot = this.spot(sprite, nowMs);
      this.box(spot.x - 2, spot.y - 2, sprite.w + 4, Math.max(3, spot.h) + 3, 4);
      c.stroke();
    } else if (column) {
      this.box(column.x - 6, column.y - 6, column.w + 12, column.h + 12, 9);
      c.stroke();
    }
  }

  text(text, x, y, colour, size, weight, align = "center") {
    Object.assign(this.c, { font: `${weight} ${size}px ${this.font}`, fillStyle: colour, textAlign: align });
    this.c.fillText(text, x, y);
  }

  fit(text, width, size) {
    const room = Math.floor(width / (size * 0.56));
    return text.length <= room ? text : `${text.slice(0, Math.max(1, room - 1))}…`;
  }

  /** More instances than columns: a cell each, coloured by freeness. */
  grid() {
    const all = [...this.model.instances], { c, ink } = this;
    const s = Math.max(6, Math.floor(Math.sqrt(this.w * (this.h - 20) / all.length)) - 2), across = Math.floor((this.w - 16) / s);
    const most = Math.max(1, ...all.map(([, o]) => o.free ?? 0));
    this.cells = all.map(([id, one], at) => {
      const cell = { id, at, s, x: 8 + (at % across) * s, y: 10 + Math.floor(at / across) * s };
      c.globalAlpha = one.free === null ? 1 : 0.2 + 0.8 * Math.max(0, Math.min(1, one.free / most));
      c.fillStyle = one.free === null ? ink.line : one.free < 0 ? ink.bad : ink.good;
      this.box(cell.x + 1, cell.y + 1, s - 2, s - 2, 3);
      c.fill();
      c.globalAlpha = 1;
      if (s > 30) this.text(id, cell.x + s / 2, cell.y + s / 2 + 4, ink.text, 11, 600);
      return cell;
    });
  }

  tipOf({ instance, row }) {
    const one = this.model.instances.get(instance);
    if (row) return [row.id, `${count(row.prompt)} + ${count(row.out)} tokens`];
    return one ? [instance, `${one.state} · ${count(one.kv)} of ${count(one.cap)} KV tokens`] : null;
  }
}
