"use strict";
// The page is drawn from the data that stands in it. Text reaches it as text: in the document by `textContent`, in charts by `plain`.
const page = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const coarse = matchMedia("(pointer: coarse), (max-width: 600px)");
const charts = []; // every chart redraws itself: {div, draw}

const PALETTE = {
  light: ["#0072b2", "#d55e00", "#00805c", "#b0508a", "#8a6d00", "#3a8fc4", "#666666", "#6a4fc0"],
  dark: ["#5ab4ee", "#ff8f4a", "#2fd1a0", "#eb9bc9", "#e3c43f", "#9bd3f5", "#b5b5b5", "#b39dff"],
};
const DASHES = ["solid", "dash", "dot", "dashdot"];
const COSINES = {
  light: [[0, "#2166ac"], [0.5, "#f7f7f7"], [1, "#b2182b"]],
  dark: [[0, "#58a6dc"], [0.5, "#17191c"], [1, "#ef6a5a"]],
};

const scheme = () => (dark.matches ? "dark" : "light");
const colour = (i) => PALETTE[scheme()][i % PALETTE.light.length];
const dash = (i) => DASHES[Math.floor(i / PALETTE.light.length) % DASHES.length];
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const short = (text) => (text.length > 14 ? text.slice(0, 13) + "…" : text);

function element(kind, properties = {}, ...children) {
  const made = Object.assign(document.createElement(kind), properties);
  made.append(...children);
  return made;
}

function table(header, rows, long = []) {
  // a line may end before a deviation, not within it
  const cell = (kind, text, i) => element(kind, { textContent: String(text).replace("± ", "±\u00a0"), className: long.includes(i) ? "long" : "" });
  const body = rows.map((row) => element("tr", {}, ...row.map((text, i) => cell("td", text, i))));
  const head = element("thead", {}, element("tr", {}, ...header.map((text) => cell("th", text))));
  return element("div", { className: "scroll" }, element("table", {}, head, element("tbody", {}, ...body)));
}

function layout(more) {
  const axis = { gridcolor: css("--line"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true };
  const { xaxis = {}, yaxis = {}, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
    margin: { l: 46, r: 10, t: coarse.matches ? 34 : 8, b: 36 }, modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--accent") },
    font: { color: css("--fg"), size: 12, family: "system-ui, sans-serif" },
    hoverlabel: { align: "left", bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--fg") } },
    dragmode: coarse.matches ? false : "zoom", // a finger scrolls the page
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
  };
}

function chart(parent, title, kind, draw) {
  const div = element("div", { className: kind });
  const heading = element("h4", { textContent: title });
  const card = element("div", { className: "card" }, heading, div);
  parent.append(card);
  charts.push({ div, draw: () => draw(heading) });
  return card;
}

function redraw() {
  const buttons = coarse.matches ? ["zoomIn2d", "zoomOut2d", "pan2d", "resetScale2d"] : ["zoom2d", "pan2d", "resetScale2d", "toImage"];
  const options = { responsive: true, displaylogo: false, displayModeBar: coarse.matches || "hover", modeBarButtons: [buttons] };
  for (const { div, draw } of charts) {
    if (div.offsetParent === null) continue; // hidden with its arm
    const [data, arrangement] = draw();
    Plotly.react(div, data, arrangement, options);
  }
}

// Cosines -------------------------------------------------------------------------------------------------------------

function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return Float64Array.from(new Int16Array(bytes.buffer), (value) => (value === -32768 ? NaN : value / 32767));
}

function unpacked(frames) {
  const n = frames.classes.length;
  const rows = (name, count) => {
    const values = unpack(frames[name]);
    return (epoch, i) => values.subarray((epoch * count + i) * n, (epoch * count + i + 1) * n);
  };
  return {
    n, epochs: frames.epochs, labels: frames.labels || [], classes: frames.classes,
    heat: rows("heat", n), means: rows("means", n), frame: rows("frame", n),
    points: frames.points ? rows("points", frames.labels.length) : null,
  };
}

// Coordinates in the plane through three unit class vectors, from cosines alone: the first at the top, then left and right.
function plane(frames, epoch, three) {
  const G = three.map((i) => three.map((j) => frames.frame(epoch, i)[j]));
  const inner = (a, b) => a.reduce((sum, x, i) => sum + b.reduce((part, y, j) => part + x * y * G[i][j], 0), 0);
  const origin = [1 / 3, 1 / 3, 1 / 3];
  let up = [2 / 3, -1 / 3, -1 / 3];
  up = up.map((x) => x / Math.sqrt(inner(up, up)));
  const across = [0, -1, 1];
  const lean = inner(across, up);
  let right = across.map((x, i) => x - lean * up[i]);
  right = right.map((x) => x / Math.sqrt(inner(right, right)));
  return (cosines) => [right, up].map(
    (axis) => axis.reduce((sum, x, i) => sum + x * cosines[three[i]], 0) - inner(origin, axis));
}

// A section -----------------------------------------------------------------------------------------------------------

function section(content) {
  const root = element("section", {}, element("h2", { textContent: content.title }));
  document.getElementById("page").append(root);
  const hidden = new Set();
  const panels = []; // cards of one arm
  const shown = () => content.runs.filter((run) => !hidden.has(run.arm));
  const place = (run) => content.arms.indexOf(run.arm);
  const label = (run) => plain(`${run.arm}, seed ${run.seed}`);

  const chips = element("div", { className: "bar" });
  content.arms.forEach((arm, i) => {
    const swatch = element("span", { className: "swatch" });
    const chip = element("button", { type: "button" }, swatch, arm);
    const paint = () => { swatch.style.borderTopColor = colour(i); swatch.style.borderTopStyle = dash(i) === "solid" ? "solid" : "dashed"; };
    paint();
    dark.addEventListener("change", paint);
    chip.setAttribute("aria-pressed", "true");
    chip.onclick = () => {
      hidden.has(arm) ? hidden.delete(arm) : hidden.add(arm);
      chip.setAttribute("aria-pressed", String(!hidden.has(arm)));
      panels.forEach((panel) => { panel.card.hidden = hidden.has(panel.arm); });
      redraw();
    };
    chips.append(chip);
  });
  root.append(chips, element("h3", { textContent: "Mean ± standard deviation over seeds" }));
  root.append(table(content.header, content.rows));
  if (content.paired.rows.length) {
    root.append(element("h3", { textContent: "Differences, paired by seed" }));
    root.append(table(content.paired.header, content.paired.rows));
  }
  [...content.notes, page.caption].forEach((note) => root.append(element("p", { textContent: note })));
  if (content.published.rows.length) {
    const summary = element("summary", { textContent: `Published numbers on this set at this ratio (${content.published.rows.length})` });
    root.append(element("details", {}, summary, table(content.published.header, content.published.rows)));
  }

  curves(root, content, shown, place, label);
  frames(root, content, panels);
  sizes(root, content, shown, place, label);

  if (content.differences.rows.length) {
    root.append(element("h3", { textContent: "Where the configurations differ" }));
    root.append(table(["option", ...content.differences.runs], content.differences.rows));
  }
  root.append(element("h3", { textContent: "Runs" }));
  const facts = [...new Set(content.runs.flatMap((run) => Object.keys(run.facts)))];
  const rows = content.runs.map((run) => [run.name, run.arm, run.seed, ...facts.map((name) => run.facts[name] ?? page.missing)]);
  root.append(table(["run", "arm", "seed", ...facts], rows, [facts.indexOf("command") + 3, facts.indexOf("versions") + 3]));
}

function curves(root, content, shown, place, label) {
  const present = Object.keys(page.curves).filter((name) => content.runs.some((run) => run.curves[name]));
  if (!present.length) return;
  const grid = element("div", { className: "grid" });
  root.append(element("h3", { textContent: "Over epochs" }), grid);
  for (const name of present) {
    chart(grid, page.curves[name], "chart", () => {
      const data = shown().filter((run) => run.curves[name]).map((run) => ({
        x: run.curves[name][0], y: run.curves[name][1], text: label(run), type: "scatter",
        mode: run.curves[name][0].length > 1 ? "lines" : "markers", connectgaps: false,
        line: { color: colour(place(run)), dash: dash(place(run)), width: 1.8 }, marker: { color: colour(place(run)) },
        hovertemplate: "%{text}<br>epoch %{x:.4~g}: %{y:.4~g}<extra></extra>",
      }));
      const yaxis = name.endsWith("/nc1") ? { type: "log", exponentformat: "power" } : {};
      const values = data.flatMap((trace) => trace.y).filter((value) => value > 0);
      // over a smaller range there may be no power of ten to label
      if (yaxis.type && Math.max(...values) >= 100 * Math.min(...values)) yaxis.dtick = 1;
      const xaxis = { title: { text: "epoch" } };
      if (Math.max(...data.flatMap((trace) => trace.x)) < 8) xaxis.dtick = 1;
      return [data, layout({ xaxis, yaxis, uirevision: name })];
    });
  }
}

function frames(root, content, panels) {
  const first = content.arms.map((arm) => content.runs.find((run) => run.arm === arm && run.frames)).filter(Boolean);
  if (!first.length) return;
  const runs = first.map((run) => ({ run, frames: unpacked(run.frames) }));
  const epochs = [...new Set(runs.flatMap(({ frames }) => frames.epochs))].sort((a, b) => a - b);
  const names = first.map((run) => run.classes).find(Boolean)?.names;
  const classes = runs[0].frames.classes;
  const name = (k) => (names && names[k] !== undefined ? names[k] : String(k));

  root.append(element("h3", { textContent: "Class means, class vectors and embeddings" }));
  const slider = element("input", { type: "range", min: 0, max: epochs.length - 1, value: epochs.length - 1 });
  slider.setAttribute("aria-label", "epoch");
  const told = element("output");
  const play = element("button", { type: "button", textContent: "▶ play" });
  const bar = element("div", { className: "bar sticky" }, play, slider, told);
  const middle = Math.floor((classes.length - 1) / 2);
  const picks = classes.length < 3 ? [] : [0, middle, classes.length - 1].map((chosen, corner) => {
    const pick = element("select");
    classes.forEach((k, i) => pick.append(element("option", { value: i, textContent: name(k) })));
    pick.value = chosen;
    pick.setAttribute("aria-label", ["class at the top", "class on the left", "class on the right"][corner]);
    bar.append(element("label", {}, ["top", "left", "right"][corner], pick));
    pick.onchange = redraw;
    return pick;
  });
  const block = element("div", {}, bar);
  root.append(block);

  let timer = null;
  const tell = () => { told.textContent = `epoch ${epochs[slider.value]}`; redraw(); };
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "▶ play"; };
  slider.oninput = () => { stop(); tell(); };
  play.onclick = () => {
    if (timer) return stop();
    play.textContent = "❚❚ pause";
    if (+slider.value === epochs.length - 1) slider.value = 0;
    timer = setInterval(() => {
      slider.value = +slider.value + 1;
      tell();
      if (+slider.value === epochs.length - 1) stop();
    }, 400);
  };
  told.textContent = `epoch ${epochs[slider.value]}`;
  // each run shows its own last epoch up to the slider's
  const now = (frames) => Math.max(0, frames.epochs.findLastIndex((epoch) => epoch <= epochs[slider.value]));
  const title = ({ run, frames }) => `${run.arm}, seed ${run.seed}, epoch ${frames.epochs[now(frames)]}`;

  if (picks.length) {
    block.append(element("p", { textContent:
      "Three classes in the plane through their class vectors (stars), all at unit length: dots are embeddings of training images, rings are " +
      "class means. Under collapse they lie on the corners. A run without snapshots shows means only." }));
    const grid = element("div", { className: "grid" });
    block.append(grid);
    for (const shown of runs) {
      const card = chart(grid, "", "square triangle", (heading) => {
        heading.textContent = title(shown);
        return triangle(shown.frames, now(shown.frames), picks.map((pick) => +pick.value), (i) => name(classes[i]));
      });
      panels.push({ arm: shown.run.arm, card });
    }
  }
  block.append(element("p", { textContent:
    "Cosines of centred class means (rows) and centred class vectors (columns) of the training images: 1 on the diagonal and -1/(K-1) elsewhere " +
    "under collapse." }));
  const grid = element("div", { className: "grid" });
  block.append(grid);
  for (const shown of runs) {
    const card = chart(grid, "", "square heat", (heading) => {
      heading.textContent = title(shown);
      return heat(shown.frames, now(shown.frames), name);
    });
    panels.push({ arm: shown.run.arm, card });
  }
}

function triangle(frames, epoch, three, name) {
  if (new Set(three).size < 3) {
    const note = { text: "choose three different classes", showarrow: false, font: { size: 14 } };
    return [[], layout({ annotations: [note], xaxis: { visible: false }, yaxis: { visible: false } })];
  }
  const project = plane(frames, epoch, three);
  const corners = three.map((i) => project(frames.frame(epoch, i)));
  const closed = [...corners, corners[0]];
  const data = [{
    x: closed.map((p) => p[0]), y: closed.map((p) => p[1]), mode: "lines", hoverinfo: "skip", fill: "toself",
    line: { color: css("--soft"), width: 1 }, fillcolor: dark.matches ? "rgba(255,255,255,.05)" : "rgba(0,0,0,.04)",
  }];
  three.forEach((i, corner) => {
    const marker = { color: colour(corner), symbol: ["circle", "square", "triangle-up"][corner] };
    const text = plain(name(i));
    if (frames.points) {
      const own = frames.labels.flatMap((k, row) => (k === i ? [project(frames.points(epoch, row))] : []));
      data.push({
        x: own.map((p) => p[0]), y: own.map((p) => p[1]), mode: "markers", text, marker: { ...marker, size: 7, opacity: 0.6 },
        hovertemplate: "embedding of %{text}<extra></extra>",
      });
    }
    const mean = project(frames.means(epoch, i));
    data.push({
      x: [mean[0]], y: [mean[1]], mode: "markers", text, hovertemplate: "mean of %{text}<extra></extra>",
      marker: { size: 14, symbol: "circle-open", color: colour(corner), line: { width: 2.5 } },
    });
  });
  data.push({
    x: corners.map((p) => p[0]), y: corners.map((p) => p[1]), mode: "markers+text", text: three.map((i) => plain(short(name(i)))),
    textposition: ["top center", "bottom center", "bottom center"], textfont: { size: 13, color: css("--fg") }, hoverinfo: "skip",
    cliponaxis: false, marker: { symbol: "star", size: 15, color: css("--bg"), line: { color: css("--fg"), width: 1.2 } },
  });
  const still = { visible: false, range: [-1.05, 1.05] };
  return [data, layout({
    margin: { l: 4, r: 4, t: 4, b: 4 }, xaxis: still, yaxis: { visible: false, range: [-0.95, 1.15], scaleanchor: "x" }, uirevision: "triangle",
  })];
}

function heat(frames, epoch, name) {
  const z = Array.from({ length: frames.n }, (_, i) => Array.from(frames.heat(epoch, i), (v) => (Number.isNaN(v) ? null : v)));
  const ticks = frames.classes.map((k) => plain(short(name(k))));
  const step = Math.ceil(frames.n / 12);
  const axis = {
    tickvals: ticks.map((_, i) => i).filter((i) => i % step === 0), ticktext: ticks.filter((_, i) => i % step === 0),
    showgrid: false, zeroline: false, constrain: "domain",
  };
  const names = frames.classes.map((k) => plain(name(k)));
  return [[{
    type: "heatmap", z, zmin: -1, zmax: 1, colorscale: COSINES[scheme()], hoverongaps: false,
    customdata: z.map((row, i) => row.map((_, j) => [names[i], names[j]])),
    colorbar: { thickness: 10, len: 0.9, outlinewidth: 0, tickvals: [-1, 0, 1] },
    hovertemplate: "mean of %{customdata[0]}<br>vector of %{customdata[1]}<br>%{z:.3f}<extra></extra>",
  }], layout({
    margin: { l: 40, r: 10, t: coarse.matches ? 34 : 8, b: 40 }, uirevision: "heat", xaxis: axis, yaxis: { ...axis, autorange: "reversed", scaleanchor: "x" },
  })];
}

function sizes(root, content, shown, place, label) {
  if (!content.runs.some((run) => run.classes)) return;
  root.append(element("h3", { textContent: "Accuracy of each class against its size" }));
  const grid = element("div", { className: "grid wide" });
  root.append(grid);
  chart(grid, "test accuracy of a class over its training images", "square", () => {
    const data = shown().filter((run) => run.classes).map((run) => ({
      x: run.classes.counts, y: run.classes.acc, mode: "markers", type: "scatter",
      text: run.classes.names.map((name) => `${plain(name)}<br>${label(run)}`),
      marker: { color: colour(place(run)), size: 8, opacity: 0.75, symbol: place(run) % 8 },
      hovertemplate: "%{text}<br>%{x} training images: %{y:.3f}<extra></extra>",
    }));
    const yaxis = { range: [-0.03, 1.03], title: { text: "accuracy" } };
    // dtick "D2" drops the zeros, and classes of nearly one size would have no tick
    const counts = data.flatMap((run) => run.x);
    const wide = Math.max(...counts) >= 5 * Math.min(...counts);
    const tickvals = wide ? [0, 1, 2, 3, 4, 5, 6].flatMap((e) => [1, 2, 5].map((digit) => digit * 10 ** e)) : [...new Set(counts)];
    return [data, layout({ xaxis: { type: "log", tickvals, title: { text: "training images" } }, yaxis, uirevision: "sizes" })];
  });
}

const runs = page.sections.reduce((sum, { runs }) => sum + runs.length, 0);
document.getElementById("page").replaceChildren(
  element("h1", { textContent: "etflight report" }),
  element("p", { textContent: `${runs} run${runs === 1 ? "" : "s"}, etflight ${page.version}. Press an arm to hide or show it.` }),
);
page.sections.forEach(section);
redraw();
dark.addEventListener("change", redraw);
