"use strict";
// Draws the report from the JSON in the page, which compare/report/content.py computes. Names of runs
// and samples are text of others, so they are only ever inserted as text nodes; Plotly, which reads
// markup in its labels, gets them through `escaped`. Nothing here writes innerHTML.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const form = document.getElementById("controls");
const view = {x: "step", logX: false, logY: false, crop: true, smooth: 0, hidden: new Set(), zooms: 0};
const DASHES = ["solid", "dash", "dot"];
const SHAPES = { // Plotly's symbols, as paths in an 18 x 10 picture for the legend
  circle: "M12.5 5a3.5 3.5 0 1 1-7 0a3.5 3.5 0 1 1 7 0Z", square: "M6 2h6v6h-6Z",
  diamond: "M9 .5L13.5 5L9 9.5L4.5 5Z", "triangle-up": "M9 1L13 8.5H5Z",
  "triangle-down": "M9 9L5 1.5h8Z", pentagon: "M9 1l4 3-1.5 5h-5L5 4Z",
  x: "M6 2h2l1 1.8L10 2h2l-1.8 3L12 8h-2L9 6.2 8 8H6l1.8-3Z", star: "M9 .8l1.3 2.9 3.2.3-2.4 2.1.7 3.1L9 7.6 6.2 9.2l.7-3.1L4.5 4l3.2-.3Z",
};
const SYMBOLS = Object.keys(SHAPES);
const MAX_MARKERS = 60; // a curve of more evaluations is drawn as a line only
const MAX_COLUMNS = 6; // with more runs, each is a row of the table and its details are folded
const MAX_PAIRS = 10; // with more, the rest is shown on request
const isTouch = () => matchMedia("(pointer: coarse)").matches;

// ---- small things

function make(tag, attributes, ...children) {
  const svg = ["svg", "path", "line", "circle"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined));
  return made;
}
const byId = id => document.getElementById(id);
const reveal = (id, ...children) => { byId(id).append(...children.filter(child => child)); byId(id).hidden = false; };
const escaped = text => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const isDark = () => (document.documentElement.dataset.theme || system()) === "dark";
const system = () => (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
const colour = index => data.colours[isDark() ? "dark" : "light"][index % data.colours.light.length];
const symbol = index => SYMBOLS[index % SYMBOLS.length];
const dash = index => DASHES[Math.floor(index / data.colours.light.length) % DASHES.length];

const runColour = index => `--run: var(--run-${index})`; // `paint` sets it for each run
function swatch(index) {
  return make("svg", {class: "swatch", style: runColour(index), viewBox: "0 0 18 10", "aria-hidden": "true"},
    make("line", {x1: 0, x2: 18, y1: 5, y2: 5, "stroke-dasharray": {solid: null, dash: "4 2", dot: "1.5 2"}[dash(index)]}),
    make("path", {d: SHAPES[symbol(index)]}));
}
const runName = index => make("span", {class: "run", title: runs[index].path}, swatch(index),
  make("span", {class: "name"}, runs[index].label));
const runTitle = index => [runName(index), runs[index].short_name === runs[index].label ? null : make("small", {class: "time"}, runs[index].short_name)];

function copyButton(text, name) {
  const button = make("button", {type: "button", class: "copy", "aria-label": `Copy the command of ${name}`}, "Copy");
  button.addEventListener("click", async () => {
    // Browsers have no clipboard for pages that came over plain HTTP.
    const done = await navigator.clipboard?.writeText(text).then(() => true, () => false);
    button.textContent = done ? "Copied" : "Select and copy";
    byId("live").textContent = done ? `Command of ${name} copied` : "Copying is not allowed here";
    setTimeout(() => { button.textContent = "Copy"; }, 1800);
  });
  return button;
}

// ---- the answer

function drawAnswer() {
  byId("overline").textContent = data.overline;
  byId("headline").textContent = data.headline;
  byId("answer").append(...data.answer.map((line, index) => make("p", {class: index ? "aside" : "lead"}, line)));
  const problems = runs.flatMap((run, index) => run.problems.map(problem => make("li", {}, make("b", {}, run.name), `: ${problem}`)));
  if (problems.length) {
    byId("answer").append(make("details", {class: "notice", open: problems.length < 4},
      make("summary", {}, `Not everything could be read (${problems.length})`), make("ul", {}, problems)));
  }
  byId("footer").textContent = data.footer;
}

// ---- tables

function cell(column, index) {
  const text = column.texts[index], best = column.best === index;
  const classes = [column.numeric && "number", best && "best", column.others && column.others[index] && "other", text === "" && "none"];
  const shown = column.states ? make("span", {class: `state ${column.states[index]}`}, text) : text || "\u2013";
  return make("td", {class: classes.filter(Boolean).join(" ") || null}, shown,
    column.notes && column.notes[index] ? make("small", {}, column.notes[index]) : null,
    best ? make("span", {class: "visually-hidden"}, " (best)") : null);
}
const heading = column => [column.section && column.section !== column.title ? make("small", {}, column.section) : null, column.title];

function drawResults() {
  const columns = data.columns;
  byId("results-title").textContent = runs.length > 1 ? "Results and the settings that differ" : "Results";
  const table = runs.length === 1 ? cards(columns) : scrolled(runs.length > MAX_COLUMNS ? asRows(columns) : asColumns(columns));
  const legend = runs.length > 1 && columns.some(column => column.group === "Settings")
    ? make("p", {class: "hint"}, make("b", {class: "key best"}, "bold"), ": best of all runs. ",
      make("span", {class: "key other"}, "tinted"), ": other than in ", make("span", {class: "name"}, runs[0].label), ".") : null;
  byId("results").append(table, ...(legend ? [legend] : []));
}
const scrolled = table => make("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": "Table, scrolls sideways"}, table);
const cards = columns => make("dl", {class: "cards"}, columns.map(column => {
  const note = column.notes && column.notes[0];
  return make("div", {}, make("dt", {}, column.title),
    make("dd", {}, column.texts[0] || "\u2013", note ? make("small", {}, note) : null));
}));

function asColumns(columns) {
  const head = make("tr", {}, make("td"), runs.map((_, index) => make("th", {scope: "col"}, runTitle(index))));
  const rows = columns.flatMap((column, number) => {
    const starts = number > 0 && columns[number - 1].group !== column.group;
    return make("tr", {class: starts ? "group-start" : null},
      make("th", {scope: "row"}, heading(column)), runs.map((_, index) => cell(column, index)));
  });
  return make("table", {class: "run-columns"}, make("thead", {}, head), make("tbody", {}, rows));
}

function asRows(columns) {
  const rows = runs.map((_, index) => make("tr", {},
    make("th", {scope: "row"}, runTitle(index)), columns.map(column => cell(column, index))));
  const name = {title: "Run", texts: runs.map(run => run.label), values: runs.map(() => null)};
  return sortable("run-rows", rows, [name, ...columns]);
}

// A table that a click on a heading sorts. A column has `texts` and `values` (null: sort by text), one
// per row; a column without a title cannot be sorted by.
function sortable(name, rows, columns) {
  const body = make("tbody", {}, rows);
  const heads = columns.map(column => {
    if (!column.title) return make("td");
    const button = make("button", {type: "button", title: "Sort"}, heading(column));
    const th = make("th", {scope: "col", class: column.numeric ? "number" : null}, button);
    button.addEventListener("click", () => {
      const up = th.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      th.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.replaceChildren(...rows.map((row, index) => ({row, index})).sort(order(column, up)).map(({row}) => row));
    });
    return th;
  });
  return make("table", {class: `${name} sorted`}, make("thead", {}, make("tr", {}, heads)), body);
}
const order = (column, up) => ({index: a}, {index: b}) => {
  const [one, two] = [column.texts[a], column.texts[b]], [less, more] = [column.values[a], column.values[b]];
  if ((one === "") !== (two === "")) return one === "" ? 1 : -1; // unknown last
  return (up ? 1 : -1) * (less !== null && more !== null ? less - more : one.localeCompare(two));
};

// ---- the paired comparison: a dot and its interval per run

function drawPairs() {
  const pairs = data.pairs;
  if (!pairs.length) return;
  const known = pairs.filter(pair => pair.low !== null);
  const ends = known.map(pair => Math.max(Math.abs(pair.low), Math.abs(pair.high))).sort((a, b) => a - b);
  // One run that is far worse must not squeeze all other intervals to points: it is clipped.
  const reach = known.length > 2 ? 4 * ends[Math.floor((ends.length - 1) / 2)] : Infinity;
  const low = Math.max(-reach, Math.min(0, ...known.map(pair => pair.low)));
  const high = Math.min(reach, Math.max(0, ...known.map(pair => pair.high)));
  const margin = (high - low) * 0.06 || 1;
  const x = value => 100 * (value - low + margin) / (high - low + 2 * margin);
  const rows = pairs.map(pair => make("tr", {}, make("th", {scope: "row"}, runTitle(pair.run)),
    pair.low === null
      ? make("td", {colspan: 3, class: "reason"}, pair.verdict)
      : [make("td", {class: "number"}, pair.text, make("small", {}, `95 %: ${pair.interval}`)),
        make("td", {class: "verdict"}, pair.verdict, [pair.where, ...pair.sources].map(text => make("small", {}, text))), make("td", {class: "forest"}, forest(pair, x))]));
  const differences = {title: "Held-out loss", numeric: true, texts: pairs.map(pair => pair.text || ""), values: pairs.map(pair => pair.difference ?? null)};
  const verdicts = {title: "Verdict", texts: pairs.map(pair => (pair.low === null ? "" : pair.verdict)), values: pairs.map(() => null)};
  const names = {title: "Run", texts: pairs.map(pair => runs[pair.run].label), values: pairs.map(() => null)};
  const table = sortable("pairs", rows, [names, differences, verdicts, {}]);
  reveal("paired", make("p", {class: "explained"}, data.pairs_note), scrolled(table), rows.length > MAX_PAIRS + 2 ? allButton(table, rows.length) : null);
}
function allButton(table, count) {
  table.classList.add("first");
  const button = make("button", {type: "button", class: "quiet all"}, `Show all ${count} runs`);
  button.addEventListener("click", () => { table.classList.remove("first"); button.remove(); });
  return button;
}
function forest(pair, x) {
  const at = value => `${Math.min(100, Math.max(0, x(value)))}%`;
  const middle = x(pair.difference), beyond = middle > 100 ? true : middle < 0 ? false : null;
  return make("svg", {style: runColour(pair.run), role: "img", "aria-label": `${pair.text}, ${pair.interval}`},
    make("line", {class: "zero", x1: at(0), x2: at(0), y1: "0", y2: "100%"}),
    make("line", {class: "interval", x1: at(pair.low), x2: at(pair.high), y1: "50%", y2: "50%"}),
    beyond === null ? make("circle", {cx: at(pair.difference), cy: "50%", r: 4.5})
      : make("svg", {x: beyond ? "99%" : "1%", y: "50%", overflow: "visible"}, make("path", {d: beyond ? "M0 0L-9 -5V5Z" : "M0 0L9 -5V5Z"})));
}

// ---- curves

const panels = data.panels.map((panel, number) => ({...panel, number, plot: null}));

function drawLegend() {
  byId("legend").append(...runs.map((run, index) => {
    const button = make("button", {type: "button", "aria-pressed": "true", title: run.path}, runName(index));
    button.addEventListener("click", () => {
      if (!view.hidden.delete(index)) view.hidden.add(index);
      redraw();
    });
    button.addEventListener("dblclick", () => {
      const others = runs.map((_, other) => other).filter(other => other !== index);
      const alone = !view.hidden.has(index) && others.every(other => view.hidden.has(other));
      view.hidden = new Set(alone ? [] : others);
      redraw();
    });
    return button;
  }));
  byId("legend").hidden = runs.length === 1;
}

function buildPanels() {
  for (const panel of panels) {
    panel.plot = make("div", {class: "plot", role: "img", "aria-label": panel.label});
    panel.note = make("small", {class: "note"});
    watch(panel);
    const unit = panel.unit ? make("span", {class: "unit"}, panel.unit) : null;
    const key = panel.loss ? make("span", {class: "key"}, make("i", {class: "thin"}), "training", make("i", {class: "bold"}), "held-out") : null;
    byId("panels").append(make("figure", {class: panel.loss ? "panel main" : "panel"},
      make("figcaption", {}, make("h3", {}, panel.title), unit, key, panel.note), panel.plot));
  }
}

// Returns what the values of the x axis are divided by, and the title of the axis.
function xUnit() {
  if (view.x !== "time") return [1, data.axes[view.x]];
  const longest = runs.reduce((most, run) => run.axes.time.reduce((a, b) => Math.max(a, b || 0), most), 0);
  if (longest > 3 * 3600) return [3600, "Time (h)"];
  return longest > 300 ? [60, "Time (min)"] : [1, "Time (s)"];
}

// The exponential moving average, divided by the weight it has seen so far: without that, the first
// values would be pulled towards zero. A gap stays a gap.
function smoothed(values, weight) {
  let mean = 0, mass = 0;
  return values.map(value => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return mean / mass;
  });
}

function tracesOf(panel) {
  const [unit] = xUnit();
  return runs.flatMap((run, index) => panel.metrics.flatMap(metric => {
    const curve = run.curves[metric.key];
    if (!curve) return [];
    const x = curve.at.map(row => (run.axes[view.x][row] === null ? null : run.axes[view.x][row] / unit));
    const y = curve.y.map(value => (value === null ? null : value * panel.scale));
    const base = {x, y, name: escaped(run.label), meta: index, legendgroup: metric.key, type: "scatter", mode: "lines", visible: !view.hidden.has(index),
      line: {color: colour(index), dash: dash(index), width: metric.bold ? 2.6 : 1.4}, opacity: metric.bold ? 1 : 0.8};
    if (metric.bold) {
      return [{...base, mode: y.length <= MAX_MARKERS ? "lines+markers" : "lines", marker: {size: 7, symbol: symbol(index), color: colour(index)}}];
    }
    if (!metric.smooth || view.smooth === 0) return [base];
    return [{...base, opacity: 0.22, hoverinfo: "skip", line: {...base.line, width: 1}},
      {...base, y: smoothed(y, view.smooth)}];
  }));
}

// The range of the losses after the first twentieth of the run; null if the start is not much higher.
// figure.py crops pictures by the same rule.
function frame(traces) {
  const seen = traces.filter(trace => trace.visible && trace.hoverinfo !== "skip");
  const late = [], all = [];
  for (const {x, y} of seen) {
    const end = x.reduce((a, b) => Math.max(a, b || 0), 0);
    y.forEach((value, index) => {
      if (value === null || x[index] === null) return;
      all.push(value);
      if (x[index] >= end / 20) late.push(value);
    });
  }
  if (!late.length) return null;
  const extreme = values => values.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, -Infinity]);
  const [bottom, top] = extreme(late), [, highest] = extreme(all);
  if (highest - bottom <= 1.25 * (top - bottom)) return null;
  const margin = (top - bottom) * 0.06;
  return {range: [Math.max(bottom - margin, bottom * 0.5), top + margin], highest};
}

function layoutOf(panel, traces, style) {
  const axis = {gridcolor: style.grid, linecolor: style.line, zeroline: false, automargin: true, exponentformat: "B",
    tickfont: {size: 12, color: style.soft}, ticks: "", showline: false, fixedrange: isTouch()};
  const framed = panel.loss && view.crop ? frame(traces) : null;
  const logarithmic = view.logY && !panel.zero;
  const range = framed && (logarithmic ? framed.range.map(Math.log10) : framed.range);
  panel.note.textContent = framed ? `start above the frame, up to ${framed.highest.toPrecision(3)}` : "";
  return {
    autosize: true, margin: {l: 46, r: 10, t: 6, b: 42}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {family: style.font, size: 12, color: style.ink}, showlegend: false, hovermode: false,
    dragmode: isTouch() ? false : "zoom",
    uirevision: JSON.stringify([view.x, view.logX, view.logY, view.crop, view.zooms]),
    xaxis: {...axis, type: view.logX ? "log" : "linear", title: {text: xUnit()[1], font: {size: 12, color: style.soft}, standoff: 8},
      showline: true, nticks: 8},
    yaxis: {...axis, type: logarithmic ? "log" : "linear", nticks: 7, ...(range ? {range, autorange: false} : {autorange: true}),
      ...(panel.zero ? {rangemode: "tozero"} : {})},
  };
}

// Plotly does not resolve CSS variables or light-dark(): it gets the colours that the browser computes.
function styleNow() {
  const computed = getComputedStyle(document.body);
  const read = name => {
    const probe = make("i", {style: `color: var(--${name})`});
    document.body.append(probe);
    const value = getComputedStyle(probe).color;
    probe.remove();
    return value;
  };
  return {font: computed.fontFamily, ink: read("ink"), soft: read("soft"), line: read("line"), grid: read("grid")};
}

const CONFIG = {responsive: true, displaylogo: false, displayModeBar: false, doubleClick: false, scrollZoom: false};

function redraw() {
  const style = styleNow();
  document.querySelectorAll("#legend button").forEach((button, index) => button.setAttribute("aria-pressed", String(!view.hidden.has(index))));
  form.querySelector("output").textContent = view.smooth.toFixed(2);
  for (const panel of panels) {
    const traces = tracesOf(panel);
    const first = !panel.plot.data;
    Plotly.react(panel.plot, traces, layoutOf(panel, traces, style), CONFIG);
    if (!first) continue;
    panel.plot.on("plotly_relayout", change => follow(panel, change));
    panel.plot.on("plotly_doubleclick", showWhole);
  }
}

// Undoes all zooms. Plotly's own double click would also undo the crop of the losses, so it is off;
// a changed `uirevision` makes Plotly forget the zoom.
function showWhole() {
  view.zooms += 1;
  redraw();
}

// Zooms all panels along x when one is zoomed. `following` stops the others from answering.
let following = false;
async function follow(panel, change) {
  if (following || !("xaxis.range[0]" in change)) return;
  following = true;
  const update = {"xaxis.range": [change["xaxis.range[0]"], change["xaxis.range[1]"]]};
  await Promise.all(panels.filter(other => other !== panel).map(other => Plotly.relayout(other.plot, {...update})));
  following = false;
}

// ---- the values under the pointer or a tap
//
// A table with a row per run, in the order of the curves on the screen. Plotly's own box is not used:
// it has a line per curve and, with 30 runs, grows beyond the screen.

const REACH = 40; // pixels from the pointer to the nearest point of a curve
const MAX_ROWS = 12;
const readout = make("div", {class: "readout", "aria-hidden": "true", hidden: true}), cursor = make("div", {class: "cursor"});
document.body.append(readout);

function watch(panel) {
  for (const kind of ["pointermove", "pointerdown"]) panel.plot.addEventListener(kind, event => read(panel, event));
  panel.plot.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hideReadout(); });
}
function hideReadout() {
  readout.hidden = true;
  cursor.remove();
}
addEventListener("scroll", hideReadout, {passive: true});
addEventListener("pointerdown", event => { if (!event.target.closest(".plot")) hideReadout(); });

function read(panel, event) {
  const {xaxis, yaxis} = panel.plot._fullLayout, box = panel.plot.getBoundingClientRect();
  const at = event.clientX - box.left - xaxis._offset, height = event.clientY - box.top - yaxis._offset;
  const found = valuesAt(panel, at, xaxis, yaxis);
  if (!found.length || at < 0 || at > xaxis._length || height < 0 || height > yaxis._length) return hideReadout();
  found.sort((a, b) => a.y - b.y);
  const nearest = found.reduce((best, row) => (Math.abs(row.y - height) < Math.abs(best.y - height) ? row : best));
  const most = Math.min(MAX_ROWS, Math.floor(innerHeight / 34));
  const from = Math.max(0, Math.min(found.indexOf(nearest) - Math.floor(most / 2), found.length - most));
  const shown = found.slice(from, from + most), under = found.length - from - shown.length;
  const metrics = panel.metrics.filter(metric => found.some(row => row.values[metric.key] !== undefined)).reverse();
  const more = (count, where) => (count ? make("p", {}, `${count} more ${where}`) : null);
  const x = nearest.x.toLocaleString("en", {maximumSignificantDigits: 6});
  readout.replaceChildren(...[make("b", {}, `${xUnit()[1]} ${x}`), more(from, "above"),
    make("table", {}, metrics.length > 1 ? make("tr", {}, make("td"), metrics.map(metric => make("th", {}, metric.bold ? "held-out" : "training"))) : null,
      shown.map(row => make("tr", {class: row === nearest && found.length > 1 ? "nearest" : null}, make("th", {}, runName(row.run)),
        metrics.map(metric => make("td", {}, row.values[metric.key] === undefined ? "" : String(Number(row.values[metric.key].toPrecision(5)))))))),
    more(under, "below")].filter(child => child));
  cursor.style.cssText = `left: ${xaxis._offset + xaxis.d2p(nearest.x)}px; top: ${yaxis._offset}px; height: ${yaxis._length}px`;
  panel.plot.append(cursor);
  readout.hidden = false;
  const {width, height: tall} = readout.getBoundingClientRect(), right = event.clientX + 18;
  const left = right + width < innerWidth - 8 ? right : event.clientX - width - 18;
  readout.style.left = `${Math.max(8, Math.min(left, innerWidth - width - 8))}px`;
  readout.style.top = `${Math.max(8, Math.min(event.clientY - tall / 2, innerHeight - tall - 8))}px`;
}

// Returns, for each visible run, its values nearest to `at` (pixels along x) and its height in pixels.
function valuesAt(panel, at, xaxis, yaxis) {
  const found = new Map();
  for (const trace of panel.plot.data) {
    if (!trace.visible || trace.hoverinfo === "skip") continue;
    let place = -1, gap = REACH;
    trace.x.forEach((x, index) => {
      const away = x === null || trace.y[index] === null ? Infinity : Math.abs(xaxis.d2p(x) - at);
      if (away <= gap) [place, gap] = [index, away];
    });
    if (place < 0) continue;
    const row = found.get(trace.meta) || {run: trace.meta, values: {}};
    row.values[trace.legendgroup] = trace.y[place];
    // Traces of held-out losses come last, so a row stands at the height of these.
    [row.x, row.y] = [trace.x[place], yaxis.d2p(trace.y[place])];
    found.set(trace.meta, row);
  }
  return [...found.values()];
}

function readControls() {
  view.x = new FormData(form).get("x");
  for (const name of ["logX", "logY", "crop"]) view[name] = form.elements[name].checked;
  view.smooth = Number(form.elements.smooth.value);
}

function startControls() {
  const longest = Math.max(0, ...runs.map(run => (run.curves["train/loss"] || {at: []}).at.length));
  form.elements.smooth.defaultValue = longest > 400 ? 0.9 : longest > 80 ? 0.7 : 0;
  form.elements.smooth.value = form.elements.smooth.defaultValue;
  for (const axis of form.elements.x) axis.disabled = !runs.some(run => run.axes[axis.value].some(value => value !== null));
  form.addEventListener("input", () => { readControls(); redraw(); });
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => {
    view.hidden.clear();
    readControls();
    showWhole();
  }));
  readControls();
}

// ---- samples, contexts, commands

function drawSamples() {
  const sampled = runs.map((run, index) => ({run, index})).filter(({run}) => run.samples.length);
  const steps = [...new Set(sampled.flatMap(({run}) => run.samples.map(([step]) => step)))].sort((a, b) => a - b);
  if (!steps.length) return;
  const slider = make("input", {type: "range", id: "sample-step", min: 0, max: steps.length - 1, step: 1});
  slider.value = steps.length - 1;
  const shownStep = make("output", {for: "sample-step"});
  const columns = sampled.map(({run, index}) => {
    const at = make("small"), text = make("pre", {tabindex: 0});
    return {run, at, text, box: make("article", {class: "sample"}, make("h3", {}, make("span", {}, runTitle(index)), at), text)};
  });
  const fill = () => {
    const step = steps[slider.value];
    shownStep.textContent = `step ${step.toLocaleString("en")}`;
    slider.setAttribute("aria-valuetext", shownStep.textContent);
    for (const {run, at, text} of columns) {
      const sample = run.samples.filter(([when]) => when <= step).pop();
      at.textContent = sample ? `step ${sample[0].toLocaleString("en")}` : "";
      text.textContent = sample ? sample[1] : "no sample yet";
    }
  };
  slider.addEventListener("input", fill);
  fill();
  const chooser = steps.length > 1 ? [make("label", {class: "slider"}, "Evaluation at ", slider, shownStep)] : [];
  reveal("samples", ...chooser, columns.length > MAX_COLUMNS
    ? make("div", {class: "samples side", tabindex: 0, role: "region", "aria-label": "Samples, scroll sideways"}, columns.map(column => column.box))
    : make("div", {class: "samples"}, columns.map(column => column.box)));
}

function drawContexts() {
  if (!data.contexts.length) return;
  const rows = data.contexts.map(([key, values]) => make("tr", {}, make("th", {scope: "row"}, key),
    values.map(value => make("td", {class: value === "" ? "none" : null}, value || "\u2013"))));
  const head = make("tr", {}, make("td"), runs.map((_, index) => make("th", {scope: "col"}, runTitle(index))));
  reveal("contexts", scrolled(make("table", {class: "run-columns long-text"}, make("thead", {}, head), make("tbody", {}, rows))));
}

const folded = (title, pairs) => (pairs.length ? make("details", {}, make("summary", {}, title),
  make("dl", {class: "settings"}, pairs.map(([key, value]) => [make("dt", {}, key), make("dd", {}, value || "\u2013")]))) : null);

function drawRuns() {
  byId("runs").append(...runs.map((run, index) => {
    const title = [make("span", {}, runTitle(index)), make("span", {class: `state ${run.state}`}, run.status)];
    const body = [make("div", {class: "command"}, make("code", {tabindex: 0}, run.command), copyButton(run.command, run.name)),
      make("p", {class: "path"}, run.path),
      folded(`All ${run.settings.length} settings`, run.settings), folded("Environment", run.environment)];
    return runs.length > MAX_COLUMNS ? make("details", {class: "run-details"}, make("summary", {}, title), body)
      : make("article", {class: "run-details"}, make("h3", {}, title), body);
  }));
}

// ---- light and dark

function paint() {
  runs.forEach((_, index) => document.documentElement.style.setProperty(`--run-${index}`, colour(index)));
  byId("theme").textContent = isDark() ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", isDark() ? "Show in light colours" : "Show in dark colours");
  redraw();
}
byId("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  paint();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);

if (isTouch()) byId("zooming").textContent = "Tap a panel for its values.";
byId("zooming").textContent += runs.length > 1 ? " Double-click a run above to see it alone." : "";
byId("curves").hidden = panels.length === 0;
drawAnswer();
drawResults();
drawPairs();
drawLegend();
buildPanels();
startControls();
drawSamples();
drawContexts();
drawRuns();
paint();
