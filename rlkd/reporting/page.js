"use strict";
/* The page of a report: the first screen, curves by uPlot, and the inspector of samples. All text from a run goes into
   the page as text nodes. `data` is made by report_data.py. */

const $ = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function number(value, digits = 4) {
  if (value === null || value === undefined) return "—";
  const size = Math.abs(value);
  if (size >= 1e3 && size < 1e7) return Math.round(value).toLocaleString("en").replace("-", "−");
  const short = Number(value.toPrecision(digits));
  const long = size !== 0 && (size < 1e-3 || size >= 1e7);
  return (long ? short.toExponential().replace("e+", "e") : String(short)).replaceAll("-", "−");
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

let data = JSON.parse($("data").textContent);
let plots = [];

// Theme -----------------------------------------------------------------------------------------------------------

const prefersDark = matchMedia("(prefers-color-scheme: dark)");

function setTheme(theme) {
  if (document.documentElement.dataset.theme === theme) return;
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
  for (const plot of plots) plot.redraw();
}

$("theme").addEventListener("click", () =>
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
prefersDark.addEventListener("change", () => setTheme(prefersDark.matches ? "dark" : "light"));
let beforePrint = "light";
addEventListener("beforeprint", () => {
  beforePrint = document.documentElement.dataset.theme;
  setTheme("light");
});
addEventListener("afterprint", () => setTheme(beforePrint));

// The first screen ------------------------------------------------------------------------------------------------

const algorithms = (run) => [...new Set(run.stages.map((stage) => stage.algorithm))].join(" → ");

function drawHead() {
  const { runs } = data;
  $("title").textContent = runs.map((run) => run.label).join(" · ");
  document.title = `${$("title").textContent} · rlkd`;
  const about = runs.map((run) => `${algorithms(run)} on ${run.stages[0].student}`);
  $("subtitle").textContent = [...new Set(about)].join(" · ");
  $("first").replaceChildren(runs.length === 1 ? tiles(runs[0]) : compared(runs));
  const notes = runs.flatMap((run) => run.notes.map((note) => (runs.length > 1 ? `${run.label}: ${note}` : note)));
  $("notes").replaceChildren(...notes.map((note) => make("p", { class: "note" }, note)));
}

function tiles(run) {
  const each = run.tiles.map(({ label, value, detail }) =>
    make("div", { class: "tile" }, make("span", {}, label), make("b", {}, value), make("span", {}, detail)));
  return make("div", { class: "tiles" }, ...each);
}

function compared(runs) {
  const labels = [...new Set(runs.flatMap((run) => run.tiles.map((tile) => tile.label)))];
  const row = (run, index) => make("tr", {},
    make("th", { scope: "row" }, swatch(`--c${index % 6}`, []), run.label),
    ...labels.map((label) => {
      const tile = run.tiles.find((each) => each.label === label);
      return tile ? make("td", { title: tile.detail }, tile.value) : make("td", {}, "—");
    }));
  const head = make("tr", {}, ...["", ...labels].map((label) => make("th", { scope: "col" }, label)));
  return make("div", { class: "compared" },
    make("table", {}, make("thead", {}, head), make("tbody", {}, ...runs.map(row))));
}

// Curves ----------------------------------------------------------------------------------------------------------

const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3], [4, 2], [1, 2]];
const FONT = "12px system-ui, sans-serif";
const HEIGHT = 200;

function swatch(name, dash) {
  const mark = make("span", { class: "swatch" });
  mark.style.borderColor = `var(${name})`;
  mark.style.borderTopStyle = dash.length === 0 ? "solid" : dash[0] > 3 ? "dashed" : "dotted";
  return mark;
}

/* The curves of a panel: of one run they differ by colour, of several runs each run has its colour. */
function curvesOf(panel) {
  const several = data.runs.length > 1;
  return data.runs.flatMap((run, r) => panel.keys.flatMap((key, k) => {
    const curve = run.series[key];
    if (!curve) return [];
    const name = !several ? panel.names[k] : panel.keys.length > 1 ? `${run.label}: ${panel.names[k]}` : run.label;
    return [{ curve, name, help: `${key}. ${panel.help[k]}`, colour: `--c${(several ? r : k) % 6}`, dash: DASHES[k % 6] }];
  }));
}

function drawCurves() {
  for (const plot of plots) plot.destroy();
  plots = [];
  const open = new Set([...document.querySelectorAll("#curves details[open]")].map((each) => each.dataset.section));
  $("curves").replaceChildren(...data.sections.map((section) => {
    const moving = section.panels.filter((panel) => !panel.flat), flat = section.panels.filter((panel) => panel.flat);
    const part = make("section", {}, make("h2", {}, section.title));
    if (moving.length) part.append(make("div", { class: "grid" }, ...moving.map(figure)));
    if (flat.length) {
      const values = flat.map((panel) => `${panel.title} ${curvesOf(panel).map((c) => number(c.curve.last)).join(", ")}`);
      const grid = make("div", { class: "grid" });
      const fold = make("details", {}, make("summary", {}, make("span", { class: "soft" }, "Constant: "), values.join(" · ")), grid);
      fold.dataset.section = section.title;
      fold.addEventListener("toggle", () => {
        if (fold.open && !grid.childElementCount) {
          grid.append(...flat.map(figure));
          fit();
        }
      });
      fold.open = open.has(section.title);
      part.append(fold);
    }
    return part;
  }));
  fit();
}

function figure(panel) {
  const curves = curvesOf(panel);
  const window_ = Math.max(0, ...curves.map(({ curve }) => curve.window || 0));
  const note = [panel.unit, window_ ? `bold: mean of ${window_} points` : ""].filter(Boolean).join("; ");
  const rows = curves.map((each) => {
    const gaps = each.curve.missing ? [make("span", { class: "gaps" }, ` ${each.curve.missing} not finite`)] : [];
    return make("tr", {},
      make("th", { scope: "row", title: each.help }, swatch(each.colour, each.dash), each.name, ...gaps),
      ...["min", "max", "last"].map((which) => make("td", {}, number(each.curve[which]))));
  });
  const head = ["", "min", "max", "last"].map((text) => make("th", { scope: "col" }, text));
  const place = make("div", { class: "plot", role: "img", "aria-label": `${panel.title}: ${panel.keys.join(", ")} by iteration` });
  place.panel = panel;
  place.curves = curves;
  place.cells = rows.map((row) => row.lastChild);
  place.head = head;
  return make("figure", {},
    make("figcaption", {}, make("h3", {}, panel.title), make("span", { class: "unit" }, note)),
    place,
    make("table", { class: "figures" }, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)));
}

/* Draws the plots that have a place on the page and none yet, and gives the others their width. */
function fit() {
  for (const place of document.querySelectorAll(".plot")) {
    const width = place.clientWidth;
    if (!width) continue;
    if (!place.plot) plots.push((place.plot = plot(place, width)));
    else if (place.plot.width !== width) place.plot.setSize({ width, height: HEIGHT });
  }
}

function plot(place, width) {
  const { panel, curves } = place;
  const tables = [], series = [{}], shown = [null];
  const add = (x, y, options, index) => {
    tables.push([x, y]);
    series.push(options);
    shown.push(index);
  };
  curves.forEach(({ curve, colour: name, dash }, index) => {
    const stroke = () => colour(name);
    const faint = Boolean(curve.mean);
    add(curve.x, curve.y, {
      stroke, dash: faint ? [] : dash, width: faint ? 1 : 1.8, alpha: faint ? 0.4 : 1,
      points: { show: true, size: 5, stroke, fill: stroke, filter: dots },
    }, index);
    if (faint) add(curve.mean[0], curve.mean[1], { stroke, dash, width: 2.2, points: { show: false } }, null);
  });
  const joined = uPlot.join([[iterations()], ...tables]);
  const soft = () => colour("--soft");
  const grid = { stroke: () => colour("--rule"), width: 1 };
  const axis = { stroke: soft, font: FONT, grid, ticks: { show: false }, gap: 6, labelFont: FONT };
  const view = new uPlot({
    width, height: HEIGHT, padding: [10, 24, 0, 4], legend: { show: false },
    cursor: {
      y: false, sync: { key: "iteration" }, points: { size: 7 }, drag: { x: true, y: false, setScale: true },
      dataIdx: (u, s, at) => nearest(u.data[s], at),
    },
    scales: { x: { time: false, range: xRange }, y: { range: (u, low, high) => yRange(panel, low, high) } },
    axes: [
      { ...axis, size: 26, space: 60, incrs: whole(), values: (u, splits) => splits.map((v) => v.toLocaleString("en")) },
      { ...axis, space: 34, size: labelWidth, filter: (u, splits) => splits.map((v) => (panel.share && (v < 0 || v > 1) ? null : v)),
        values: (u, splits, a, space, step) => splits.map((v) => (v === null ? "" : tick(v, step, splits))) },
    ],
    series,
    hooks: { setCursor: [(u) => hover(u, place, shown)], draw: [stageLines] },
  }, joined, place);
  return view;
}

/* The first and the last of all plots, so that they have the same axis. */
function iterations() {
  const curves = data.runs.flatMap((run) => Object.values(run.series));
  return [Math.min(...curves.map(({ x }) => x[0])), Math.max(...curves.map(({ x }) => x[x.length - 1]))];
}

/* Whole steps of an axis: 1, 2, 5, 10, … */
function whole() {
  const steps = [];
  for (let power = 1; power <= 1e9; power *= 10) steps.push(power, 2 * power, 5 * power);
  return steps;
}

/* Every point of a short curve has a dot, and of a long one those without a neighbour, which no line would show. */
function dots(u, s) {
  const values = u.data[s], known = [];
  for (let i = 0; i < values.length; i++) if (values[i] !== undefined) known.push(i);
  const finite = known.filter((i) => values[i] !== null);
  if (finite.length <= 40) return finite;
  return known.filter((i, k) => values[i] !== null
    && (k === 0 || values[known[k - 1]] === null) && (k === known.length - 1 || values[known[k + 1]] === null));
}

function nearest(values, at) {
  for (let d = 0; d < values.length; d++) {
    if (values[at - d] !== undefined && values[at - d] !== null) return at - d;
    if (values[at + d] !== undefined && values[at + d] !== null) return at + d;
  }
  return at;
}

const xRange = (u, low, high) => (low === null ? [0, 1] : low === high ? [low - 1, high + 1] : [low, high]);

function yRange(panel, low, high) {
  if (panel.share) return [-0.03, 1.03];
  if (low === null || low === undefined) return [0, 1];
  const largest = Math.max(Math.abs(low), Math.abs(high));
  if (high - low <= Math.max(1e-6 * largest, panel.rounding)) {  // a constant looks like one
    return largest > panel.rounding ? [low - 0.1 * largest, high + 0.1 * largest] : [-1, 1];
  }
  const room = 0.06 * (high - low);
  return [low - room, high + room];
}

function tick(value, step, all) {
  const largest = Math.max(...all.map(Math.abs));
  if (value === 0) return "0";
  if (largest >= 1e6 || largest < 1e-3) {
    const digits = Math.max(0, Math.floor(Math.log10(Math.abs(value))) - Math.floor(Math.log10(step)) + (step.toPrecision(2).includes("25") ? 1 : 0));
    return Number(value.toExponential(Math.min(digits, 12))).toExponential().replace("e+", "e").replaceAll("-", "−");
  }
  let places = 0;
  while (places < 12 && Math.abs(step * 10 ** places - Math.round(step * 10 ** places)) > 1e-6) places++;
  return value.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places }).replace("-", "−");
}

function labelWidth(u, values) {
  if (!values) return 40;
  u.ctx.save();
  u.ctx.font = FONT;
  const widest = Math.max(...values.map((text) => u.ctx.measureText(text || "").width));
  u.ctx.restore();
  return Math.ceil(widest) + 12;
}

/* The value under the pointer replaces the last one in the figures below. */
function hover(u, place, shown) {
  const at = u.cursor.idx;
  const over = at !== null && at !== undefined && u.cursor.left >= 0;
  place.head[3].textContent = over ? `at ${u.data[0][at].toLocaleString("en")}` : "last";
  shown.forEach((index, s) => {
    if (index === null) return;
    const found = over ? u.data[s][u.cursor.idxs[s] ?? at] : place.curves[index].curve.last;
    place.cells[index].textContent = number(found);
  });
}

function stageLines(u) {
  if (data.runs.length > 1 || data.runs[0].stages.length < 2) return;
  const { ctx } = u, { top, height } = u.bbox;
  ctx.save();
  ctx.strokeStyle = ctx.fillStyle = colour("--soft");
  ctx.textAlign = "left";
  ctx.lineWidth = devicePixelRatio;
  ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
  ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
  data.runs[0].stages.forEach((stage, index) => {
    const x = u.valToPos(Math.max(stage.start, u.scales.x.min), "x", true);
    if (stage.start > u.scales.x.max) return;
    if (index) {
      ctx.beginPath();
      ctx.moveTo(x, top);
      ctx.lineTo(x, top + height);
      ctx.stroke();
    }
    ctx.fillText(stage.name, x + 4 * devicePixelRatio, top + 10 * devicePixelRatio);
  });
  ctx.restore();
}

// Samples: the list -----------------------------------------------------------------------------------------------

const state = { sort: "at", down: true, chosen: null, colour: null, token: null };
const COLUMNS = [["run", "run"], ["at", "iteration"], ["id", "prompt"], ["reward", "reward"], ["advantage", "advantage"],
  ["length", "tokens"], ["end", "end"]];
let all = [];

function readSamples() {
  all = data.runs.flatMap((run, r) => run.samples.map((sample, i) => ({
    ...sample, key: `${r}/${sample.at}/${i}`, run: run.label, r,
    id: String(sample.id ?? "—"),
    end: sample.error ? "error" : sample.finish_reason ?? "—",
  })));
  $("inspector").hidden = all.length === 0;
  const iterations = [...new Set(all.map((sample) => sample.at))].sort((a, b) => a - b);
  const kept = $("at").value;
  $("at").replaceChildren(make("option", { value: "" }, "all"),
    ...iterations.map((at) => make("option", { value: String(at) }, at.toLocaleString("en"))));
  $("at").value = iterations.includes(Number(kept)) ? kept : "";
  state.scales = {};
}

function filtered() {
  const words = $("search").value.toLowerCase(), at = $("at").value, errors = $("errors").checked;
  const from = $("from").value === "" ? -Infinity : Number($("from").value);
  const to = $("to").value === "" ? Infinity : Number($("to").value);
  const bounded = from > -Infinity || to < Infinity;
  const found = all.filter((sample) =>
    (!at || sample.at === Number(at)) && (!errors || sample.error)
    && (!bounded || (sample.reward !== null && sample.reward >= from && sample.reward <= to))
    && (!words || [sample.id, sample.prompt, textOf(sample)].some((text) => text.toLowerCase().includes(words))));
  const sign = state.down ? -1 : 1;
  const value = (sample) => sample[state.sort];
  return found.map((sample, i) => [sample, i]).sort(([a, i], [b, j]) => {
    const [x, y] = [value(a), value(b)];
    if (x === y) return i - j;
    if (x === null || x === undefined) return 1;  // what has no value comes last
    if (y === null || y === undefined) return -1;
    return sign * (typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y);
  }).map(([sample]) => sample);
}

const textOf = (sample) => (sample.tokens ? sample.tokens.join("") : sample.text);

function drawList() {
  const columns = COLUMNS.filter(([key]) => (key === "run" ? data.runs.length > 1 : all.some((s) => s[key] !== null && s[key] !== undefined)));
  document.querySelector("#list thead").replaceChildren(make("tr", {}, ...columns.map(([key, label]) => {
    const sorted = state.sort === key;
    const button = make("button", { type: "button", onclick: () => sortBy(key) }, label + (sorted ? (state.down ? " ↓" : " ↑") : ""));
    const numeric = ["at", "reward", "advantage", "length"].includes(key);
    return make("th", { class: numeric ? `number ${key}` : "", scope: "col", "data-key": key,
      "aria-sort": sorted ? (state.down ? "descending" : "ascending") : "none" }, button);
  })));
  const found = filtered();
  $("count").textContent = `${found.length} of ${all.length} samples`;
  if (!found.some((sample) => sample.key === state.chosen)) {
    state.chosen = found.length ? found[0].key : null;
    state.token = null;
  }
  const cell = (sample, key) => {
    if (key === "id" || key === "run") return make("td", { class: "id", title: sample[key] }, sample[key]);
    if (key === "end") return make("td", { class: sample.error ? "wrong" : "" }, sample.end);
    return make("td", { class: `number ${key}` }, key === "at" ? sample.at.toLocaleString("en") : number(sample[key]));
  };
  document.querySelector("#list tbody").replaceChildren(...found.map((sample) => make("tr", {
    "aria-selected": String(sample.key === state.chosen), "data-key": sample.key, onclick: () => { $("list").focus({ preventScroll: true }); choose(sample.key); },
  }, ...columns.map(([key]) => cell(sample, key)))));
  drawSample();
}

function sortBy(key) {
  state.down = state.sort === key ? !state.down : true;
  state.sort = key;
  drawList();
  document.querySelector(`#list th[data-key="${key}"] button`).focus();
}

function choose(key) {
  state.chosen = key;
  state.token = null;
  for (const row of document.querySelectorAll("#list tbody tr")) {
    row.setAttribute("aria-selected", String(row.dataset.key === key));
    if (row.dataset.key === key) {
      const list = $("list"), head = list.querySelector("thead").offsetHeight;
      if (row.offsetTop - head < list.scrollTop) list.scrollTop = row.offsetTop - head;
      const below = row.offsetTop + row.offsetHeight - list.clientHeight;
      if (below > list.scrollTop) list.scrollTop = below;
    }
  }
  drawSample();
}

// Samples: one of them, token by token ----------------------------------------------------------------------------

const byToken = (sample, key) => (t) => sample[key]?.[t] ?? null;
const difference = (a, b) => (t) => (a(t) === null || b(t) === null ? null : a(t) - b(t));
const authorOf = (sample, t) => sample.authors?.[t] ?? "student";

/* What a token can be coloured by: name, note, its value of a sample's token; `signed` has two colours. */
const COLOURS = {
  advantage: { name: "advantage", signed: true, note: "of the completion",
    of: (s) => (t) => (authorOf(s, t) === "student" ? s.advantage : null) },
  ratio: { name: "teacher log-ratio", signed: true, note: "log π teacher − log π student, nats",
    of: (s) => difference(byToken(s, "teacher"), byToken(s, "logp")) },
  entropy: { name: "entropy", note: "of the student's next-token distribution, nats", of: (s) => byToken(s, "entropy") },
  surprise: { name: "surprise", note: "−log π of the sampler, nats",
    of: (s) => (t) => (byToken(s, "logp")(t) === null ? null : -byToken(s, "logp")(t)) },
  gap: { name: "sampler–trainer gap", signed: true, note: "log π trainer − log π sampler, nats",
    of: (s) => byToken(s, "gap") },
  author: { name: "author", note: "" },
};
const AUTHORS = { student: ["student", "--c0"], teacher: ["teacher", "--c1"], glue: ["template", "--c4"],
  environment: ["environment", "--c2"], data: ["data", "--c3"] };

function valuesOf(sample, key) {
  const of = COLOURS[key].of(sample);
  return sample.tokens.map((_, t) => of(t));
}

const coloursOf = (sample) => Object.keys(COLOURS).filter((key) => sample.tokens
  && (key === "author" || valuesOf(sample, key).some((value) => value !== null)));

/* The same shade means the same value in all samples: full colour at the 95th percentile of the absolute values. */
function scaleOf(key) {
  if (!(key in state.scales)) {
    const sizes = all.filter((s) => s.tokens).flatMap((s) => valuesOf(s, key)).filter((v) => v !== null).map(Math.abs).sort((a, b) => a - b);
    state.scales[key] = sizes[Math.floor(0.95 * (sizes.length - 1))] || sizes[sizes.length - 1] || 1;
  }
  return state.scales[key];
}

const shade = (value, scale) => `rgba(var(--${value < 0 ? "down" : "up"}), ${(0.6 * Math.min(1, Math.abs(value) / scale)).toFixed(3)})`;

function paint(span, sample, t, key) {
  if (key === "author") {
    span.style.backgroundColor = `color-mix(in srgb, var(${(AUTHORS[authorOf(sample, t)] || AUTHORS.student)[1]}) 32%, transparent)`;
  } else {
    const value = COLOURS[key].of(sample)(t);
    span.style.backgroundColor = value === null ? "" : shade(value, scaleOf(key));
  }
}

function legend(sample, key) {
  const box = make("span", { class: "legend" });
  if (key === "author") {
    const present = new Set(sample.tokens.map((_, t) => authorOf(sample, t)));
    for (const author of present) {
      const mark = make("span", { class: "key" }, (AUTHORS[author] || [author])[0]);
      mark.style.backgroundColor = `color-mix(in srgb, var(${(AUTHORS[author] || AUTHORS.student)[1]}) 32%, transparent)`;
      box.append(mark);
    }
    return box;
  }
  const scale = scaleOf(key), ramp = make("span", { class: "ramp" });
  const left = COLOURS[key].signed ? shade(-scale, scale) : "transparent";
  ramp.style.background = `linear-gradient(to right, ${left}, transparent ${COLOURS[key].signed ? "50%" : "0%"}, ${shade(scale, scale)})`;
  box.append(COLOURS[key].signed ? `−${number(scale, 2)}` : "0", ramp, number(scale, 2), make("span", {}, COLOURS[key].note));
  return box;
}

function drawSample() {
  hideTip();
  const place = $("sample"), sample = all.find((each) => each.key === state.chosen);
  if (!sample) {
    place.replaceChildren(make("p", { class: "soft" }, "No sample matches these filters."));
    return;
  }
  const fact = (name, value) => make("span", {}, make("span", { class: "soft" }, `${name} `), make("b", {}, value));
  const run = data.runs[sample.r], stage = run.stages[sample.stage];
  const facts = [
    ...(data.runs.length > 1 ? [fact("run", run.label)] : []),
    ...(run.stages.length > 1 ? [fact("stage", `${stage.name}, iteration ${sample.iteration}`)] : [fact("iteration", String(sample.iteration))]),
    fact("prompt", sample.id), fact("reward", number(sample.reward)), fact("advantage", number(sample.advantage)),
    ...Object.entries(Object.keys(sample.parts).length > 1 ? sample.parts : {}).map(([name, value]) => fact(name, number(value))),
    ...(sample.length === undefined ? [] : [fact("tokens", sample.length.toLocaleString("en"))]),
    fact("end", sample.finish_reason ?? "—"),
    ...(sample.weight_version === undefined ? [] : [fact("weights of iteration", String(sample.weight_version))]),
  ];
  const parts = [make("div", { class: "facts" }, ...facts)];
  if (sample.error) parts.push(make("p", { class: "note" }, `The reward failed: ${sample.error}`));
  parts.push(make("h4", {}, "Prompt"), make("div", { class: "text prompt" }, sample.prompt));
  const usable = coloursOf(sample);
  const key = usable.includes(state.colour) ? state.colour : usable.includes("ratio") ? "ratio" : usable[0];
  if (usable.length) {
    const pick = make("select", { id: "colour", onchange: (event) => recolour(event.target.value) },
      ...usable.map((each) => make("option", { value: each }, COLOURS[each].name)));
    pick.value = key;
    parts.push(make("h4", {}, "Completion"), make("div", { class: "colours" },
      make("label", {}, "Colour by ", pick), legend(sample, key)));
    const box = make("div", { class: "text tokens" });
    sample.tokens.forEach((text, t) => {
      if (sample.cut && t === sample.head) {
        box.append(make("i", {}, ` […${sample.cut.toLocaleString("en")} tokens…] `));
      }
      const span = make("span", { "data-t": String(t) }, text.replaceAll("\n", "↵\n"));
      if (text === "") span.className = "nothing";
      paint(span, sample, t, key);
      box.append(span);
    });
    parts.push(box);
  } else {
    parts.push(make("h4", {}, "Completion"), make("div", { class: "text tokens" }, sample.text ?? ""));
  }
  if (sample.answer !== undefined) parts.push(make("h4", {}, "Answer"), make("div", { class: "text" }, String(sample.answer)));
  place.replaceChildren(...parts);
}

function recolour(key) {
  state.colour = key;
  const t = state.token;
  drawSample();
  if (t !== null) showToken(t);
}

function showToken(t) {
  const sample = all.find((each) => each.key === state.chosen);
  const span = document.querySelector(`.tokens span[data-t="${t}"]`);
  if (!sample || !span) return;
  document.querySelector(".tokens .now")?.classList.remove("now");
  span.classList.add("now");
  state.token = t;
  const place = sample.cut && t >= sample.head ? t + sample.cut : t;
  const rows = [["token", `${(place + 1).toLocaleString("en")} of ${sample.length.toLocaleString("en")}`]];
  if (sample.ids) rows.push(["id", String(sample.ids[t])]);
  rows.push(["author", (AUTHORS[authorOf(sample, t)] || [authorOf(sample, t)])[0]]);
  for (const [name, key] of [["log π sampler", "logp"], ["log π teacher", "teacher"]]) {
    if (byToken(sample, key)(t) !== null) rows.push([name, number(byToken(sample, key)(t))]);
  }
  for (const key of coloursOf(sample)) {
    if (key === "author" || key === "surprise") continue;
    const value = COLOURS[key].of(sample)(t);
    if (value !== null) rows.push([COLOURS[key].name, number(value)]);
  }
  const tip = $("tip");
  tip.replaceChildren(make("code", {}, JSON.stringify(sample.tokens[t])),
    make("table", {}, make("tbody", {}, ...rows.map(([name, value]) => make("tr", {}, make("th", {}, name), make("td", {}, value))))));
  tip.hidden = false;
  const box = span.getClientRects()[0] || span.getBoundingClientRect();
  const left = Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8));
  const under = box.bottom + 6 + tip.offsetHeight < innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${under ? box.bottom + 6 : Math.max(4, box.top - tip.offsetHeight - 6)}px`;
}

function hideTip() {
  $("tip").hidden = true;
  document.querySelector(".tokens .now")?.classList.remove("now");
}

$("sample").addEventListener("pointerover", (event) => {
  const t = event.target.dataset?.t;
  if (t !== undefined) showToken(Number(t));
});
$("sample").addEventListener("pointerleave", hideTip);
addEventListener("scroll", hideTip, { passive: true });
$("filters").addEventListener("submit", (event) => event.preventDefault());
for (const id of ["search", "from", "to"]) $(id).addEventListener("input", drawList);
for (const id of ["at", "errors"]) $(id).addEventListener("change", drawList);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("inspector").hidden) return;
  if (event.target.matches("input, select, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const rows = [...document.querySelectorAll("#list tbody tr")];
  const at = rows.findIndex((row) => row.dataset.key === state.chosen);
  const inside = event.target.closest("#inspector") !== null;
  const move = { j: 1, k: -1, ...(inside ? { ArrowDown: 1, ArrowUp: -1 } : {}) }[event.key];
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (move && rows[at + move]) choose(rows[at + move].dataset.key);
  else if (step && inside) {
    const last = document.querySelectorAll(".tokens span[data-t]").length - 1;
    if (last >= 0) showToken(Math.max(0, Math.min(last, (state.token ?? (step > 0 ? -1 : 1)) + step)));
  } else if (event.key === "c") {
    const usable = [...($("colour")?.options || [])].map((option) => option.value);
    if (usable.length) recolour(usable[(usable.indexOf($("colour").value) + 1) % usable.length]);
  } else if (event.key === "/") $("search").focus();
  else if (event.key === "Escape") hideTip();
  else return;
  event.preventDefault();
});

// The whole page --------------------------------------------------------------------------------------------------

function drawConfigs() {
  $("configs").replaceChildren(...data.runs.flatMap((run) => run.stages.map((stage) => {
    const which = [data.runs.length > 1 ? run.label : "", run.stages.length > 1 ? stage.name : ""].filter(Boolean).join(", ");
    return make("details", {}, make("summary", {}, `Configuration${which ? `: ${which}` : ""}`), make("pre", {}, stage.config));
  })));
}

function draw() {
  drawHead();
  drawCurves();
  readSamples();
  drawList();
}

setTheme(prefersDark.matches ? "dark" : "light");
draw();
drawConfigs();
addEventListener("resize", fit);
if (data.live) {
  let seen = null;
  setInterval(async () => {
    const answer = await fetch(`data.json${location.search}`, { headers: seen ? { "If-None-Match": seen } : {} });
    if (answer.status !== 200) return;
    seen = answer.headers.get("ETag");
    data = await answer.json();
    draw();
  }, 5000);
}
