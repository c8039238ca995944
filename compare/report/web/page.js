"use strict";
// Draws the report from the JSON in the page, which compare/report/content.py computes: here the
// answer, tables, samples and commands. Names of runs and samples are text of others, so they are only
// ever inserted as text nodes; Plotly, which reads markup in its labels, gets them through `escaped`.
// Nothing here writes innerHTML.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
// A group is one run, or runs that differ in their seed alone. It has one colour, curve and row.
const groups = data.groups.map(group => ({...runs[group.runs[0]], ...group}));
const groupOf = runs.map((_, run) => Math.max(0, groups.findIndex(group => group.runs.includes(run))));
const isFolded = groups.length < runs.length;
const form = document.getElementById("controls");
const view = {x: "step", logX: false, logY: false, crop: true, single: false, smooth: 0, hidden: new Set(), zooms: 0, zoom: {}};
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
const RUN = isFolded ? "Group" : "Run";
const isTouch = () => matchMedia("(pointer: coarse)").matches;

// ---- small things

function make(tag, attributes, ...children) {
  const svg = ["svg", "path", "line", "circle", "g"].includes(tag);
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

const runColour = group => `--run: var(--run-${group})`; // `paint` sets it for each group
function swatch(index) {
  return make("svg", {class: "swatch", style: runColour(index), viewBox: "0 0 18 10", "aria-hidden": "true"},
    make("line", {x1: 0, x2: 18, y1: 5, y2: 5, "stroke-dasharray": {solid: null, dash: "4 2", dot: "1.5 2"}[dash(index)]}),
    make("path", {d: SHAPES[symbol(index)]}));
}
const named = ({label, path}, group) => make("span", {class: "run", title: path}, swatch(group), make("span", {class: "name"}, label));
const titled = (one, group) => [named(one, group), one.short_name === one.label ? null : make("small", {class: "time"}, one.short_name)];
const groupName = index => named(groups[index], index);
const groupTitle = index => titled(groups[index], index);
const runTitle = index => titled(runs[index], groupOf[index]);

function copied(what, text, name) {
  const button = make("button", {type: "button", class: "copy", "aria-label": `Copy the command of ${name}`}, "Copy");
  button.addEventListener("click", async () => {
    // Browsers have no clipboard for pages that came over plain HTTP.
    const done = await navigator.clipboard?.writeText(text).then(() => true, () => false);
    button.textContent = done ? "Copied" : "Select and copy";
    byId("live").textContent = done ? `Command of ${name} copied` : "Copying is not allowed here";
    setTimeout(() => { button.textContent = "Copy"; }, 1800);
  });
  return make("div", {class: "command"}, make("span", {}, make("small", {}, what), make("code", {tabindex: 0}, text)), button);
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
  byId("results-title").textContent = groups.length > 1 ? "Results and the settings that differ" : "Results";
  const table = groups.length === 1 ? cards(columns) : scrolled(groups.length > MAX_COLUMNS ? asRows(columns, groups, groupTitle) : asColumns(columns));
  const legend = groups.length > 1 && columns.some(column => column.group === "Settings")
    ? make("p", {class: "hint"}, make("b", {class: "key best"}, "bold"), ": best of all. ",
      make("span", {class: "key other"}, "tinted"), ": other than in ", make("span", {class: "name"}, groups[0].label), ".",
      isFolded ? " \u00b1: one standard deviation over the runs of a group." : null) : null;
  const each = data.run_columns.length ? make("details", {class: "each"}, make("summary", {}, `Each of the ${runs.length} runs`),
    scrolled(asRows(data.run_columns, runs, runTitle))) : null;
  byId("results").append(...[table, legend, each].filter(child => child));
}
const scrolled = table => make("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": "Table, scrolls sideways"}, table);
const cards = columns => make("dl", {class: "cards"}, columns.map(column => {
  const note = column.notes && column.notes[0];
  return make("div", {}, make("dt", {}, column.title),
    make("dd", {}, column.texts[0] || "\u2013", note ? make("small", {}, note) : null));
}));

function asColumns(columns) {
  const head = make("tr", {}, make("td"), groups.map((_, index) => make("th", {scope: "col"}, groupTitle(index))));
  const rows = columns.flatMap((column, number) => {
    const starts = number > 0 && columns[number - 1].group !== column.group;
    return make("tr", {class: starts ? "group-start" : null},
      make("th", {scope: "row"}, heading(column)), groups.map((_, index) => cell(column, index)));
  });
  return make("table", {class: "run-columns"}, make("thead", {}, head), make("tbody", {}, rows));
}

function asRows(columns, all, title) {
  const rows = all.map((_, index) => make("tr", {},
    make("th", {scope: "row"}, title(index)), columns.map(column => cell(column, index))));
  const name = {title: all === runs ? "Run" : RUN, texts: all.map(one => one.label), values: all.map(() => null)};
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

// ---- the paired comparison: a dot and its interval per group

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
  const rows = pairs.map(pair => make("tr", {}, make("th", {scope: "row"}, groupTitle(pair.group)),
    pair.low === null
      ? make("td", {colspan: 3, class: "reason"}, pair.verdict)
      : [make("td", {class: "number"}, pair.text, make("small", {}, `95 %: ${pair.interval}`)),
        make("td", {class: "verdict"}, pair.verdict, pair.details.map(text => make("small", {}, text))), make("td", {class: "forest"}, forest(pair, x))]));
  const differences = {title: "Held-out loss", numeric: true, texts: pairs.map(pair => pair.text || ""), values: pairs.map(pair => pair.difference ?? null)};
  const verdicts = {title: "Verdict", texts: pairs.map(pair => (pair.low === null ? "" : pair.verdict)), values: pairs.map(() => null)};
  const names = {title: RUN, texts: pairs.map(pair => groups[pair.group].label), values: pairs.map(() => null)};
  const table = sortable("pairs", rows, [names, differences, verdicts, {}]);
  reveal("paired", make("p", {class: "explained"}, data.pairs_note), scrolled(table), rows.length > MAX_PAIRS + 2 ? allButton(table, rows.length) : null);
}
function allButton(table, count) {
  table.classList.add("first");
  const button = make("button", {type: "button", class: "quiet all"}, `Show all ${count}`);
  button.addEventListener("click", () => { table.classList.remove("first"); button.remove(); });
  return button;
}
function forest(pair, x) {
  const at = value => `${Math.min(100, Math.max(0, x(value)))}%`;
  const middle = x(pair.difference), beyond = middle > 100 ? true : middle < 0 ? false : null;
  return make("svg", {style: runColour(pair.group), role: "img", "aria-label": `${pair.text}, ${pair.interval}`},
    make("line", {class: "zero", x1: at(0), x2: at(0), y1: "0", y2: "100%"}),
    make("line", {class: "interval", x1: at(pair.low), x2: at(pair.high), y1: "50%", y2: "50%"}),
    beyond === null ? make("circle", {cx: at(pair.difference), cy: "50%", r: 4.5})
      : make("svg", {x: beyond ? "99%" : "1%", y: "50%", overflow: "visible"}, make("path", {d: beyond ? "M0 0L-9 -5V5Z" : "M0 0L9 -5V5Z"})));
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

const listed = pairs => (pairs.length ? make("dl", {class: "settings"}, pairs.map(([key, value]) => [make("dt", {}, key), make("dd", {}, value || "\u2013")])) : null);
const folded = (title, pairs) => (pairs.length ? make("details", {}, make("summary", {}, title), listed(pairs)) : null);

// The command that runs the first steps again and compares them with what this page holds of the run.
function reproduceCommand(run) {
  const page = decodeURIComponent(location.protocol === "file:" ? location.pathname : location.pathname.split("/").pop());
  return `python train.py --reproduce ${quoted(`${page}#${run.reproduce.name}`)}`;
}
const quoted = word => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replace(/'/g, "'\\''")}'`);

function drawRuns() {
  byId("runs").append(...runs.map((run, index) => {
    const title = [make("span", {}, runTitle(index)), make("span", {class: `state ${run.state}`}, run.status)];
    const body = [
      run.parent ? [make("p", {}, run.parent.text), listed(run.parent.changed)] : null,
      copied("Train it again", run.command, run.name), copied("Repeat its first steps and compare them", reproduceCommand(run), `the check of ${run.name}`),
      make("p", {class: "path"}, run.path),
      folded(`All ${run.settings.length} settings`, run.settings), folded("Environment", run.environment)];
    return runs.length > MAX_COLUMNS ? make("details", {class: "run-details"}, make("summary", {}, title), body)
      : make("article", {class: "run-details"}, make("h3", {}, title), body);
  }));
}
