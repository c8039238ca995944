// Parallel coordinates: an axis for each setting that varies and one for the result, a line per group.
//
// The lines are an SVG that is stretched to the page, the texts are HTML. A slider chooses a line, for
// keyboards and fingers; the pointer chooses the nearest one.

function drawParallel() {
  const found = data.parallel;
  if (!found) return;
  const {axes} = found, last = axes.length - 1, result = axes[last];
  const left = axis => `${100 * axis / last}%`;
  const byResult = found.groups.map((_, line) => line).sort((a, b) => result.at[a] - result.at[b]);
  const lines = found.groups.map((_, line) => {
    const known = axes.map((axis, place) => [100 * place / last, 100 - 100 * axis.at[line]]);
    return make("path", {d: `M${known.map(point => point.join(" ")).join("L")}`, style: `--place: ${Math.round(100 * result.at[line])}%`});
  });
  const drawn = make("svg", {viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true"}, [...byResult].reverse().map(line => lines[line]));
  const heads = axes.map((axis, place) => make("div", {class: "axis", style: `left: ${left(place)}`},
    make("b", {title: [axis.title, ...axis.also].join(", ")}, axis.title, axis.also.length ? make("small", {}, `+ ${axis.also.length} with it`) : null),
    axis.ticks.map(([at, text]) => make("span", {style: `bottom: ${100 * at}%`}, text))));
  const plot = make("div", {class: "coordinates", style: `--axes: ${axes.length}`}, make("div", {class: "area"}, drawn, heads));
  const slider = make("input", {type: "range", id: "parallel-line", min: 0, max: byResult.length - 1, step: 1, value: 0});
  const caption = make("p", {class: "chosen"});
  const choose = rank => {
    const line = byResult[rank], group = found.groups[line];
    slider.value = rank;
    lines.forEach((path, index) => path.classList.toggle("chosen", index === line));
    drawn.append(lines[line]); // above the others
    const pairs = axes.map(axis => [axis.title, axis.texts[line] || "\u2013"]);
    slider.setAttribute("aria-valuetext", `${Number(rank) + 1} of ${byResult.length}: ${pairs.map(pair => pair.join(" ")).join(", ")}`);
    caption.replaceChildren(groupName(group), ...pairs.map(([title, text]) => make("span", {}, make("small", {}, title), ` ${text}`)));
  };
  slider.addEventListener("input", () => choose(slider.value));
  for (const kind of ["pointermove", "pointerdown"]) {
    plot.firstChild.addEventListener(kind, event => {
      const box = plot.firstChild.getBoundingClientRect();
      const x = Math.min(last, Math.max(0, last * (event.clientX - box.left) / box.width)), before = Math.min(last - 1, Math.floor(x));
      const height = 1 - (event.clientY - box.top) / box.height;
      const away = line => Math.abs(axes[before].at[line] * (before + 1 - x) + axes[before + 1].at[line] * (x - before) - height);
      choose(byResult.indexOf(byResult.reduce((best, line) => (away(line) < away(best) ? line : best))));
    });
  }
  choose(0);
  const missing = found.left_out ? ` ${found.left_out} without a result left out.` : "";
  reveal("parallel", make("p", {class: "explained"}, `A line is a ${RUN.toLowerCase()}. Its colour is its result, from `,
    make("b", {class: "lowest"}, "the lowest"), " to ", make("b", {class: "highest"}, "the highest"), `.${missing}`),
  make("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": "Parallel coordinates, scroll sideways"}, plot),
  make("label", {class: "slider"}, "Best to worst ", slider), caption);
}
