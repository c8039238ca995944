// Light and dark, and what happens when the page is opened.

function paint() {
  groups.forEach((_, index) => document.documentElement.style.setProperty(`--run-${index}`, colour(index)));
  byId("theme").textContent = isDark() ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", isDark() ? "Show in light colours" : "Show in dark colours");
  redraw();
}
// Plotly is most of the page, so it is packed: base64 of gzip. Its script element is checked against
// its hash in the page's policy, as one that stands in the page is.
async function loadPlotly() {
  const packed = atob(byId("plotly").textContent), bytes = new Uint8Array(packed.length);
  for (let index = 0; index < packed.length; index++) bytes[index] = packed.charCodeAt(index);
  const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  document.head.append(make("script", {}, await new Response(inflated).text()));
}
byId("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  paint();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);

if (isTouch()) byId("zooming").textContent = "Tap a panel for its values.";
byId("zooming").textContent += groups.length > 1 ? " Double-click a name above to see it alone." : "";
byId("curves").hidden = panels.length === 0;
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
if (panels.length) {
  loadPlotly().then(drawFirst).catch(() => {
    byId("panels").append(make("p", {class: "notice"}, "The curves cannot be drawn: this browser is too old to inflate the drawing library (DecompressionStream; browsers have it since 2023)."));
  });
}
