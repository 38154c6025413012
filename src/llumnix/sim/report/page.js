"use strict";
// Shows one setting (workload and rate) at a time, and one of its runs from inside.
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  if (!page.settings.length) return;
  const chosen = { setting: 0, policy: null, hidden: new Set() };
  const ROWS_MAX = 300;
  const HEIGHT_PX = 270;

  const all = (selector) => [...document.querySelectorAll(selector)];
  const setting = () => page.settings[chosen.setting];

  function make(name, attributes = {}, ...inside) {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else element.setAttribute(key, value);
    }
    element.append(...inside);
    return element;
  }

  const dot = (policy) =>
    make("i", { class: "dot", style: `--c:var(--p${page.colours[policy]})` });

  // -- plots

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // A copy of the figure's part, with the colours of the page as it is now.
  function coloured(part) {
    if (Array.isArray(part)) {
      const plain = part.every((v) => v === null || typeof v === "number");
      return plain ? part : part.map(coloured);
    }
    if (part && typeof part === "object") {
      return Object.fromEntries(Object.entries(part).map(([k, v]) => [k, coloured(v)]));
    }
    const found = typeof part === "string" && /^var\((--[\w-]+)\)$/.exec(part);
    return found ? css(found[1]) : part;
  }

  function axis(own) {
    const { title, ...rest } = own;
    return {
      gridcolor: css("--grid"), zerolinecolor: css("--rule"), linecolor: css("--rule"),
      tickcolor: css("--rule"), ticks: "outside", ticklen: 4,
      title: { text: title?.text ?? title, standoff: 8, font: { size: 12, color: css("--soft") } },
      ...rest,
    };
  }

  function pageLayout(figure, several) {
    const layout = {
      height: HEIGHT_PX, margin: { l: 56, r: 12, t: 12, b: 46 }, showlegend: several,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: css("--ink") },
      hoverlabel: {
        bgcolor: css("--card"), bordercolor: css("--rule"), align: "left",
        font: { color: css("--ink"), size: 12.5 },
      },
      modebar: { bgcolor: css("--card"), color: css("--soft"), activecolor: css("--accent") },
      ...coloured(figure.layout),
    };
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key)) layout[key] = axis(layout[key]);
      if (/^legend\d*$/.test(key)) layout[key].bgcolor = "rgba(0,0,0,0)";
    }
    layout.margin = { l: 56, r: 12, t: 12, b: 46, ...figure.layout.margin };
    return layout;
  }

  function traces(figure) {
    return figure.data
      .filter((trace) => !chosen.hidden.has(trace.meta))
      .map((trace) => {
        const { meta, ...made } = coloured(trace);
        if (Array.isArray(meta)) {
          made.customdata = trace.z.map((row, i) => row.map(() => meta[i]));
        }
        return made;
      });
  }

  // One plot a figure; a place without any hides its section.
  function plot(name, figures, several = false) {
    const place = document.querySelector(`[data-plots="${name}"]`);
    if (name !== "run") place.closest("section").hidden = !figures.length;
    while (place.children.length > figures.length) {
      Plotly.purge(place.lastChild.lastChild);
      place.lastChild.remove();
    }
    figures.forEach((figure, i) => {
      if (!place.children[i]) place.append(make("div", {}, make("h3"), make("div")));
      const [title, area] = place.children[i].children;
      title.textContent = figure.title;
      title.hidden = !figure.title;
      Plotly.react(area, traces(figure), pageLayout(figure, several), {
        responsive: true, displaylogo: false,
        // By name: by default there is one that sends the plot to a cloud.
        plotlyServerURL: "", modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
      });
    });
  }

  function compare() {
    plot("against_rate", page.against_rate[setting().workload]);
    plot("distributions", setting().distributions);
    plot("over_time", setting().over_time);
  }

  // -- one run

  function inside() {
    const runs = setting().runs;
    const names = Object.keys(runs);
    document.getElementById("run").hidden = !names.length;
    if (!names.length) return;
    if (!(chosen.policy in runs)) chosen.policy = names[0];
    const tab = (name) =>
      make(
        "button",
        {
          role: "tab", "aria-selected": name === chosen.policy,
          onclick: () => { chosen.policy = name; inside(); },
        },
        dot(name), name,
      );
    document.querySelector(".tabs").replaceChildren(...names.map(tab));
    const run = runs[chosen.policy];
    document.getElementById("note").textContent = run.note;
    plot("run", run.figure ? [run.figure] : [], true);
    decisions(run.decisions);
  }

  function decisions(lines) {
    const place = document.getElementById("decisions");
    place.previousElementSibling.hidden = place.hidden = !lines.length;
    const off = new Set();
    let most = ROWS_MAX;
    const kinds = [...new Set(lines.map((line) => line[1]))];
    const body = make("tbody");
    const shownCount = make("span", { class: "about" });
    const more = make("button", { onclick: () => { most *= 10; show(); } }, "show more");
    const search = make("input", {
      type: "search", placeholder: "search: r17, i3, freeness …", "aria-label": "Search decisions",
      oninput: () => show(),
    });
    const kind = (name) => {
      const number = lines.filter((line) => line[1] === name).length.toLocaleString("en");
      const button = make("button", { "aria-pressed": true }, `${name} ${number}`);
      button.addEventListener("click", () => {
        if (!off.delete(name)) off.add(name);
        button.setAttribute("aria-pressed", !off.has(name));
        show();
      });
      return button;
    };
    function show() {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const found = lines.filter(([, name, what, why]) => {
        const text = `${name} ${what} ${why}`.toLowerCase();
        return !off.has(name) && words.every((word) => text.includes(word));
      });
      const row = ([t, name, what, why]) =>
        make(
          "tr", {},
          make("td", {}, t === null ? "" : t.toFixed(2)),
          make("td", { class: name === "fault" ? "fault" : "" }, name),
          make("td", {}, what), make("td", {}, why),
        );
      body.replaceChildren(...found.slice(0, most).map(row));
      const shown = Math.min(found.length, most);
      shownCount.textContent =
        `${shown.toLocaleString("en")} of ${found.length.toLocaleString("en")} shown`;
      more.hidden = found.length <= most;
    }
    const titles = ["time, s", "kind", "what", "why"].map((title) => make("th", {}, title));
    place.replaceChildren(
      make("div", { class: "filters" }, search, ...kinds.map(kind), shownCount, more),
      make(
        "div", { class: "log" },
        make("table", {}, make("thead", {}, make("tr", {}, ...titles)), body),
      ),
    );
    show();
  }

  // -- the bar

  function choice(title, options, value, change) {
    const select = make("select", { onchange: () => change(Number(select.value)) });
    for (const [key, text] of options) select.append(make("option", { value: key }, text));
    select.value = value;
    return make("label", {}, title, select);
  }

  function bar() {
    const now = setting();
    const place = document.getElementById("bar");
    const parts = [];
    if (page.workloads.length > 1) {
      const options = page.workloads.map((name, i) => [i, name]);
      parts.push(choice("workload", options, now.workload, (workload) => {
        const same = (s) => s.workload === workload && s.rate === now.rate;
        const found = page.settings.findIndex(same);
        const first = page.settings.findIndex((s) => s.workload === workload);
        chosen.setting = found >= 0 ? found : first;
        show();
      }));
    }
    const rates = page.settings
      .map((s, i) => [i, s.rate])
      .filter(([i]) => page.settings[i].workload === now.workload);
    if (rates.length > 1) {
      parts.push(choice("rate", rates, chosen.setting, (i) => { chosen.setting = i; show(); }));
    }
    const policy = (name) =>
      make(
        "button",
        {
          class: "policy", "aria-pressed": !chosen.hidden.has(name),
          title: "show or hide in the plots",
          onclick: () => {
            if (!chosen.hidden.delete(name)) chosen.hidden.add(name);
            bar();
            compare();
          },
        },
        dot(name), name,
      );
    place.replaceChildren(...parts, ...now.policies.map(policy));
  }

  function show() {
    const now = setting();
    const workload = page.workloads[now.workload];
    all("[data-setting]").forEach((table) => {
      table.hidden = Number(table.dataset.setting) !== chosen.setting;
    });
    all(".of-workload").forEach((e) => { e.textContent = workload; });
    all(".of-setting").forEach((e) => { e.textContent = `${workload}, ${now.rate}`; });
    bar();
    compare();
    inside();
  }

  // Of several rates the highest shows the most.
  const first = page.settings.filter((s) => s.workload === 0);
  chosen.setting = page.settings.indexOf(first[first.length - 1]);
  show();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    compare();
    inside();
  });
})();
