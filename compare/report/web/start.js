// Light and dark, and what happens when the page is opened.

function paint() {
  groups.forEach((_, index) => document.documentElement.style.setProperty(`--run-${index}`, colour(index)));
  byId("theme").textContent = isDark() ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", isDark() ? "Show in light colours" : "Show in dark colours");
  redraw();
}

// Plotly is most of the page, so it is packed: base64 of gzip.
async function inflatePlotly() {
  const packed = atob(byId("plotly").textContent), bytes = new Uint8Array(packed.length);
  for (let index = 0; index < packed.length; index++) bytes[index] = packed.charCodeAt(index);
  const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(inflated).text();
}

// Starting Plotly takes longer than all else, so the answer and the tables are painted before. Its
// script element is checked against its hash in the page's policy, as one that stands in the page is.
async function drawCurves(source) {
  await new Promise(painted => requestAnimationFrame(() => setTimeout(painted)));
  document.head.append(make("script", {}, await source));
  drawWhenSeen();
}

byId("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  paint();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);

if (isTouch()) byId("zooming").textContent = "Tap a panel for its values.";
byId("zooming").textContent += groups.length > 1 ? " Double-click a name above to see it alone." : "";
byId("curves").hidden = panels.length === 0;
if (!window.DecompressionStream) {
  byId("panels").append(make("p", {class: "notice"}, "The curves are not drawn: this browser cannot inflate the drawing library (DecompressionStream, in browsers since 2023)."));
}
const plotly = panels.length && window.DecompressionStream ? inflatePlotly() : null; // while the rest is built
drawAnswer();
drawResults();
drawPairs();
drawParallel();
drawLegend();
buildPanels();
startControls();
drawSamples();
drawContexts();
drawRuns();
paint();
if (plotly) drawCurves(plotly);
