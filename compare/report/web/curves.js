// The curves: panels, their controls, and the values under the pointer. Plotly draws them.

const panels = data.panels.map((panel, number) => ({...panel, number, plot: null}));

function drawLegend() {
  byId("legend").append(...groups.map((group, index) => {
    const more = group.runs.length > 1 ? make("small", {}, `\u00d7${group.runs.length}`) : null;
    const button = make("button", {type: "button", "aria-pressed": "true", title: group.path}, groupName(index), more);
    button.addEventListener("click", () => {
      if (!view.hidden.delete(index)) view.hidden.add(index);
      redraw();
    });
    button.addEventListener("dblclick", () => {
      const others = groups.map((_, other) => other).filter(other => other !== index);
      const alone = !view.hidden.has(index) && others.every(other => view.hidden.has(other));
      view.hidden = new Set(alone ? [] : others);
      redraw();
    });
    return button;
  }));
  byId("legend").hidden = groups.length === 1;
}

function buildPanels() {
  for (const panel of panels) {
    panel.plot = make("div", {class: "plot", role: "img", "aria-label": panel.label});
    panel.note = make("small", {class: "note"});
    watch(panel);
    const unit = panel.unit ? make("span", {class: "unit"}, panel.unit) : null;
    const banded = panel.number === 0 && panel.metrics.some(metric => groups.some(group => group.curves[metric.key]?.spread));
    const forked = panel.number === 0 && groups.some(group => group.parent);
    panel.explained = [banded && "line: mean over the steps that all runs of a group have; band: \u00b1 one standard deviation", forked && "dotted: where a run was forked"];
    const key = panel.loss ? make("span", {class: "key"}, make("i", {class: "thin"}), "training", make("i", {class: "bold"}), "held-out") : null;
    byId("panels").append(make("figure", {class: panel.loss ? "panel main" : "panel"},
      make("figcaption", {}, make("h3", {}, panel.title), unit, key, panel.note), panel.plot));
  }
}

// Returns what the values of the x axis are divided by, and the title of the axis.
const UNITS = {
  time: [[1, "Time (s)", 300], [60, "Time (min)", 3 * 3600], [3600, "Time (h)", Infinity]],
  flops: ["G", "T", "P", "E", "Z"].map((prefix, place) => [1e3 ** (place + 3), `Training ${prefix}FLOPs`, prefix === "Z" ? Infinity : 1e3 ** (place + 4)]),
};
function xUnit() {
  if (!UNITS[view.x]) return [1, data.axes[view.x]];
  const longest = groups.reduce((most, group) => group.axes[view.x].reduce((a, b) => Math.max(a, b || 0), most), 0);
  return UNITS[view.x].find(([, , end]) => longest <= end);
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
  return groups.flatMap((group, index) => panel.metrics.flatMap(metric => {
    const curve = group.curves[metric.key], several = group.runs.length > 1;
    const base = {meta: index, legendgroup: metric.key, type: "scatter", mode: "lines", visible: !view.hidden.has(index),
      name: escaped(group.label), opacity: metric.bold ? 1 : 0.8,
      line: {color: colour(index), dash: dash(index), width: metric.bold ? 2.6 : 1.4}};
    const behind = {...base, hoverinfo: "skip", opacity: 0.3, line: {...base.line, width: 1}};
    const mean = curve && points(group, curve, unit, panel.scale);
    // Runs of a group that have no step in common have no mean: then they are all there is to see.
    const meanless = several && !(mean && mean.x.length);
    const single = meanless || (several && view.single && metric.band) ? group.runs.flatMap(run => {
      const own = runs[run].curves[metric.key];
      return own ? [{...(meanless ? base : behind), ...points(runs[run], own, unit, panel.scale)}] : [];
    }) : [];
    if (!mean) return single;
    const {x, y} = mean, smooth = metric.smooth && view.smooth > 0;
    const drawn = smooth ? smoothed(y, view.smooth) : y;
    const band = curve.spread && metric.band ? [{...behind, opacity: 1, fill: "toself", fillcolor: `${colour(index)}2b`, line: {...base.line, width: 0},
      ...bandOf(x, drawn, (smooth ? smoothed(curve.spread, view.smooth) : curve.spread).map(value => value * panel.scale))}] : [];
    const faint = smooth ? [{...base, x, y, opacity: 0.22, hoverinfo: "skip", line: {...base.line, width: 1}}] : [];
    const marked = metric.bold && y.length <= MAX_MARKERS && {mode: "lines+markers", marker: {size: 7, symbol: symbol(index), color: colour(index)}};
    return [...band, ...single, ...faint, {...base, ...marked, x, y: drawn, customdata: curve.spread}];
  }));
}
const points = ({axes}, {at, y}, unit, scale) => ({
  x: at.map(row => (axes[view.x][row] === null ? null : axes[view.x][row] / unit)), y: y.map(value => (value === null ? null : value * scale))});
// The outline of the mean plus and minus its standard deviation: to the right above, back below.
function bandOf(x, mean, spread) {
  const there = x.map((_, index) => index), back = [...there].reverse();
  return {x: [...there, ...back].map(index => x[index]),
    y: [...there.map(index => mean[index] + spread[index]), ...back.map(index => mean[index] - spread[index])]};
}

// A line at the step at which a run was forked from another: its curve before is the other's.
function forkLines() {
  const [unit] = xUnit();
  return groups.flatMap((group, index) => {
    const row = group.parent && !view.hidden.has(index) ? group.axes.step.findLastIndex(step => step <= group.parent.step) : -1;
    const at = row < 0 ? null : group.axes[view.x][row];
    return at === null ? [] : [{type: "line", x0: at / unit, x1: at / unit, yref: "paper", y0: 0, y1: 1, layer: "below",
      line: {color: colour(index), width: 1, dash: "dot"}}];
  });
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
  const notes = [framed && `start above the frame, up to ${framed.highest.toPrecision(3)}`, ...panel.explained];
  const unplaced = groups.filter(group => group.axes.step.length && group.axes[view.x].every(at => at === null)).length;
  if (unplaced) notes.push(`${unplaced} without ${data.axes[view.x]} not drawn`);
  panel.note.textContent = notes.filter(note => note).join("; ");
  return {
    autosize: true, margin: {l: 46, r: 10, t: 6, b: 42}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {family: style.font, size: 12, color: style.ink}, showlegend: false, hovermode: false,
    dragmode: isTouch() ? false : "zoom",
    shapes: forkLines(),
    uirevision: frameKey(),
    xaxis: {...axis, type: view.logX ? "log" : "linear", title: {text: xUnit()[1], font: {size: 12, color: style.soft}, standoff: 8},
      showline: true, nticks: 8, ...(view.zoom.key === frameKey() ? {range: [...view.zoom.range], autorange: false} : {autorange: true})},
    yaxis: {...axis, type: logarithmic ? "log" : "linear", nticks: 7, ...(range ? {range, autorange: false} : {autorange: true}),
      ...(panel.zero ? {rangemode: "tozero"} : {})},
  };
}

// A zoom lasts until one of these changes.
const frameKey = () => JSON.stringify([view.x, view.logX, view.logY, view.crop, view.zooms]);

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

// The losses are drawn at once, other panels when they are about to be seen, or printed.
function drawWhenSeen() {
  const seen = new IntersectionObserver(entries => entries.filter(entry => entry.isIntersecting)
    .forEach(({target}) => drawFirst(panels.find(panel => panel.plot === target))), {rootMargin: "300px"});
  const [losses, ...others] = panels;
  drawFirst(losses);
  others.forEach(panel => seen.observe(panel.plot));
  addEventListener("beforeprint", () => others.forEach(drawFirst));
}

function drawFirst(panel) {
  if (panel.plot.data) return;
  draw(panel, styleNow());
  panel.plot.on("plotly_relayout", follow);
  panel.plot.on("plotly_doubleclick", showWhole);
}

function draw(panel, style) {
  const traces = tracesOf(panel);
  Plotly.react(panel.plot, traces, layoutOf(panel, traces, style), CONFIG);
}

function redraw() {
  const style = styleNow();
  document.querySelectorAll("#legend button").forEach((button, index) => button.setAttribute("aria-pressed", String(!view.hidden.has(index))));
  form.querySelector("output").textContent = view.smooth.toFixed(2);
  for (const panel of panels.filter(panel => panel.plot.data)) draw(panel, style);
}

// Undoes all zooms. Plotly's own double click would also undo the crop of the losses, so it is off;
// a changed `uirevision` makes Plotly forget the zoom.
function showWhole() {
  view.zooms += 1;
  redraw();
}

// Zooms all panels along x when one is zoomed, also those that are drawn later.
function follow(change) {
  if (!("xaxis.range[0]" in change)) return;
  view.zoom = {key: frameKey(), range: [change["xaxis.range[0]"], change["xaxis.range[1]"]]};
  redraw();
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
  if (!panel.plot.data) return;
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
      shown.map(row => make("tr", {class: row === nearest && found.length > 1 ? "nearest" : null}, make("th", {}, groupName(row.run)),
        metrics.map(metric => make("td", {}, row.values[metric.key] ?? ""))))),
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
    const spread = trace.customdata?.[place];
    row.values[trace.legendgroup] = String(Number(trace.y[place].toPrecision(5))) + (spread === undefined ? "" : ` \u00b1 ${Number((spread * panel.scale).toPrecision(2))}`);
    // Traces of held-out losses come last, so a row stands at the height of these.
    [row.x, row.y] = [trace.x[place], yaxis.d2p(trace.y[place])];
    found.set(trace.meta, row);
  }
  return [...found.values()];
}

function readControls() {
  view.x = new FormData(form).get("x");
  for (const name of ["logX", "logY", "crop", "single"]) view[name] = form.elements[name].checked;
  view.smooth = Number(form.elements.smooth.value);
}

function startControls() {
  const longest = Math.max(0, ...groups.map(run => (run.curves["train/loss"] || {at: []}).at.length));
  form.elements.smooth.defaultValue = longest > 400 ? 0.9 : longest > 80 ? 0.7 : 0;
  form.elements.smooth.value = form.elements.smooth.defaultValue;
  for (const axis of form.elements.x) axis.parentElement.hidden = !runs.some(run => run.axes[axis.value].some(value => value !== null));
  form.elements.single.parentElement.hidden = !isFolded;
  form.addEventListener("input", () => { readControls(); redraw(); });
  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(() => {
    view.hidden.clear();
    readControls();
    showWhole();
  }));
  readControls();
}
