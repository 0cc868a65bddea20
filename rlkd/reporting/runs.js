"use strict";
/* The list of runs of `rlkd report --serve`, which asks for new data every few seconds. */

const body = document.getElementById("runs"), compare = document.getElementById("compare");
const chosen = new Set();

function cell(...content) {
  const td = document.createElement("td");
  td.append(...content);
  return td;
}

const change = (pair, shown) => (pair ? (pair[0] === pair[1] ? shown(pair[1]) : `${shown(pair[0])} → ${shown(pair[1])}`) : "—");
const percent = (value) => `${(100 * value).toFixed(1)}%`;
const short = (value) => String(Number(value.toPrecision(3)));

function ago(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 129600 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86400)} days ago`;
}

function draw({ runs, now }) {
  body.replaceChildren(...runs.map((run) => {
    const row = document.createElement("tr"), box = document.createElement("input"), link = document.createElement("a");
    Object.assign(box, { type: "checkbox", name: "run", value: run.name, checked: chosen.has(run.name) });
    box.setAttribute("aria-label", `compare ${run.name}`);
    box.addEventListener("change", () => {
      if (box.checked) chosen.add(run.name);
      else chosen.delete(run.name);
      compare.disabled = chosen.size === 0;
    });
    link.href = `report?run=${encodeURIComponent(run.name)}`;
    link.textContent = run.name;
    if (run.error) {
      row.append(cell(), cell(run.name), cell(run.error));
      row.lastChild.colSpan = 6;
    } else {
      row.append(cell(box), cell(link), cell(run.algorithm), cell(run.student), cell(run.done),
        cell(change(run["eval/greedy"], percent)), cell(change(run["reward/mean"], short)), cell(ago(now - run.changed)));
    }
    return row;
  }));
}

document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
draw(JSON.parse(document.getElementById("data").textContent));
setInterval(async () => {
  const answer = await fetch("runs.json");
  if (answer.ok) draw(await answer.json());
}, 5000);
