// The bar of a page over an event log: which moment is shown, and how fast it goes on.

import { serverTime } from "./model.js";
import { el } from "./panel.js";

const SPEEDS = [[0.1, "a tenth"], [1, "as it was"], [4, "4 times"], [16, "16 times"], [64, "64 times"]];
const SETTLE_MS = 120, SHOW_MS = 200;
let model, again, at = null, timer = 0, speed = "1";
const play = el("button", {}), clock = el("span", { class: "quiet" });
const slider = el("input", { type: "range", step: "any", "aria-label": "Moment of the log" });
const pace = el("select", { "aria-label": "Pace" }, ...SPEEDS.map(([value, name]) => el("option", { value }, name)));

const now = () => at ?? serverTime(model, performance.now());
const runs = () => speed !== "0";

/** What to ask the server for. */
export const query = () => `?at=${now().toFixed(3)}&speed=${speed}`;

/** Shows the bar; `go` has the server asked again. */
export function show(of, go) {
  const { begin, end } = of.hello.log;
  at = null;
  if (model) return;
  [model, again, pace.value] = [of, go, speed];
  Object.assign(slider, { min: begin, max: end });
  document.body.classList.add("past");
  document.querySelector("footer").prepend(el("div", { id: "past", role: "group", "aria-label": "The log" }, play, slider, clock, pace));
  slider.addEventListener("input", () => {
    at = +slider.value;
    clearTimeout(timer);
    timer = setTimeout(go, SETTLE_MS);
    draw();
  });
  play.addEventListener("click", () => turn(runs() ? "0" : pace.value));
  pace.addEventListener("change", () => turn(pace.value));
  setInterval(draw, SHOW_MS);
  draw();
}

function turn(to) {
  at = now();
  if (to !== "0" && at >= model.hello.log.end) at = model.hello.log.begin;
  speed = to;
  again();
  draw();
}

function draw() {
  const t = now(), { begin, end } = model.hello.log, shown = new Date(t * 1000);
  play.textContent = runs() && t < end ? "Pause" : "Play";
  if (at === null) slider.value = t;
  const text = `${shown.toLocaleDateString()} ${shown.toLocaleTimeString([], { hour12: false })}`;
  clock.textContent = `${text} · ${Math.round(t - begin)} of ${Math.round(end - begin)} s`;
  slider.setAttribute("aria-valuetext", text);
}
