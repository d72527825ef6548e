// What htmx does not do: copying a command, charts, uploads. No text of the checkout becomes HTML here.
"use strict";

const csrfToken = document.querySelector('meta[name="csrf-token"]').content;

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  await navigator.clipboard.writeText(button.dataset.copy);
  const before = button.textContent;
  button.textContent = "✓";
  setTimeout(() => { button.textContent = before; }, 1200);
});

document.addEventListener("change", (event) => {
  if (event.target.matches("select[data-submit]")) event.target.form.requestSubmit();
});

// Charts

function readColours() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(["text", "quiet", "line", "accent", "bad"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

function embed(target, spec, label) {
  const colours = readColours();
  const config = {
    background: "transparent",
    font: "system-ui, sans-serif",
    axis: { labelColor: colours.quiet, titleColor: colours.quiet, gridColor: colours.line, domainColor: colours.line, tickColor: colours.line },
    title: { color: colours.text, anchor: "start", fontSize: 13 },
    legend: { labelColor: colours.text, titleColor: colours.quiet, orient: "bottom" },
    view: { stroke: null },
    range: { category: [colours.accent, colours.quiet, colours.bad] },
    mark: { color: colours.accent },
    text: { color: colours.text },
  };
  const whole = { $schema: "https://vega.github.io/schema/vega-lite/v6.json", width: "container", height: 200, description: label, config, ...spec };
  const options = { mode: "vega-lite", ast: true, actions: false, defaultStyle: false, renderer: "canvas", tooltip: { disableDefaultStyle: true } };
  return vegaEmbed(target, whole, options);
}

// Curves that belong together: of training and of validation.
function groupCurves(curves) {
  const groups = {};
  for (const [name, points] of Object.entries(curves)) {
    if (!points.length) continue;
    const title = name.split("/").pop().replaceAll("_", " ");
    const series = name.includes("eval/") ? "validation" : "training";
    groups[title] = (groups[title] || []).concat(points.map(([step, value]) => ({ step, value, series })));
  }
  return groups;
}

function specifyCurve(title, values) {
  const several = new Set(values.map((point) => point.series)).size > 1;
  return {
    title,
    data: { name: "points", values },
    mark: { type: "line", point: values.length < 40, tooltip: true, clip: true },
    encoding: {
      x: { field: "step", type: "quantitative", title: "step", axis: { tickMinStep: 1 } },
      y: { field: "value", type: "quantitative", title: null, scale: { zero: false }, axis: { format: "~s" } },
      ...(several ? { color: { field: "series", type: "nominal", title: null } } : {}),
    },
  };
}

const drawn = new WeakMap(); // chart -> view by title

async function drawCurves(chart, curves) {
  const views = drawn.get(chart) || new Map();
  drawn.set(chart, views);
  for (const [title, values] of Object.entries(groupCurves(curves))) {
    const known = views.get(title);
    const several = new Set(values.map((point) => point.series)).size;
    if (known && known.several === several) {
      known.view.data("points", values).runAsync();
      continue;
    }
    const target = known ? known.target : chart.appendChild(document.createElement("div"));
    views.set(title, { target, several, view: (await embed(target, specifyCurve(title, values), title)).view });
  }
}

function specify(kind, rows) {
  const tooltip = { type: "point", filled: true, size: 70, tooltip: true };
  if (kind === "sizes") {
    const x = { field: "bytes", type: "quantitative", title: "bytes", axis: { format: "~s" }, scale: { zero: false } };
    const y = { field: "score", type: "quantitative", title: "score", scale: { zero: false } };
    return { data: { values: rows }, encoding: { x, y }, layer: [{ mark: tooltip }, { mark: { type: "text", dy: -10 }, encoding: { text: { field: "name" } } }] };
  }
  if (kind === "history") {
    const x = { field: "number", type: "quantitative", title: "trial", axis: { tickMinStep: 1 } };
    return { data: { values: rows }, mark: { ...tooltip, tooltip: { content: "data" } }, encoding: { x, y: { field: "score", type: "quantitative", scale: { zero: false }, title: null } } };
  }
  if (kind === "front") {
    const axis = (field) => ({ field, type: "quantitative", scale: { zero: false }, title: null });
    return { data: { values: rows }, mark: { ...tooltip, tooltip: { content: "data" } }, encoding: { x: axis("x"), y: axis("y"), color: { field: "best", type: "nominal", title: "best" } } };
  }
  return { data: { values: rows }, mark: { type: "bar", tooltip: true }, encoding: { y: { field: "name", type: "nominal", sort: "-x", title: null, axis: { labelLimit: 220 } }, x: { field: "value", type: "quantitative", title: null } } };
}

async function startChart(chart) {
  if (chart.dataset.started) return;
  chart.dataset.started = "yes";
  const { chart: kind, label, rows, source, events } = chart.dataset;
  if (rows) await embed(chart.appendChild(document.createElement("div")), specify(kind, JSON.parse(rows)), label);
  if (source) {
    const response = await fetch(source);
    if (response.ok) await drawCurves(chart, await response.json());
  }
  if (events) {
    const stream = new EventSource(events);
    // A page that nobody sees draws nothing: the training has the processor.
    let undrawn = null;
    const draw = () => {
      if (document.hidden || undrawn === null) return;
      drawCurves(chart, JSON.parse(undrawn));
      undrawn = null;
    };
    stream.addEventListener("curves", (event) => { undrawn = event.data; draw(); });
    document.addEventListener("visibilitychange", draw);
    stream.addEventListener("ended", () => { stream.close(); setTimeout(() => location.reload(), 1500); });
  }
}

function startAll(root) {
  if (window.vegaEmbed) root.querySelectorAll("[data-chart]").forEach(startChart);
  root.querySelectorAll("form[data-upload]").forEach(startUpload);
}

document.addEventListener("DOMContentLoaded", () => startAll(document));
document.addEventListener("htmx:afterSwap", (event) => startAll(event.target));

// Parts that are loaded anew stay open where the reader had opened them.
const opened = new Set();
document.addEventListener("toggle", (event) => {
  const { id, open } = event.target;
  if (id && event.target.isConnected) opened[open ? "add" : "delete"](id);
}, true);
// htmx gives the focus back by its id, but not to what is in a closed part.
let focused = "";
document.addEventListener("htmx:beforeSwap", () => { focused = document.activeElement.id; });
document.addEventListener("htmx:afterSwap", () => {
  opened.forEach((id) => document.getElementById(id)?.setAttribute("open", ""));
  if (focused && document.activeElement === document.body) document.getElementById(focused)?.focus({ preventScroll: true });
});

// A log is read from its end, unless one has scrolled up.
let followsLog = true;
function followLog() {
  const log = document.querySelector("#log");
  if (log && followsLog) log.scrollTop = log.scrollHeight;
}
document.addEventListener("scroll", (event) => {
  const log = event.target;
  if (log.id === "log") followsLog = log.scrollTop + log.clientHeight > log.scrollHeight - 40;
}, true);
document.addEventListener("DOMContentLoaded", followLog);
document.addEventListener("htmx:afterSettle", followLog);

// Uploads: the file itself is the request's body, so that it is written as it comes.

function startUpload(form) {
  if (form.dataset.started) return;
  form.dataset.started = "yes";
  const input = form.querySelector('input[type="file"]');
  const status = form.querySelector("[data-status]");
  form.addEventListener("dragover", (event) => { event.preventDefault(); form.classList.add("over"); });
  form.addEventListener("dragleave", () => form.classList.remove("over"));
  form.addEventListener("drop", (event) => {
    event.preventDefault();
    form.classList.remove("over");
    input.files = event.dataTransfer.files;
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const file = input.files[0];
    status.textContent = "…";
    const headers = { "X-CSRF-Token": csrfToken, "HX-Request": "true" };
    const replaces = form.querySelector('[name="replace"]')?.checked ? "?replace=true" : "";
    const address = form.dataset.upload + encodeURIComponent(file.name) + replaces;
    const response = await fetch(address, { method: "PUT", body: file, headers });
    const found = form.dataset.found;
    if (form.dataset.check && response.ok) {
      const saved = await response.json();
      status.textContent = saved.path;
      htmx.ajax("GET", form.dataset.check + encodeURIComponent(saved.path), found);
    } else if (form.dataset.check) {
      status.textContent = (await response.json()).message;
    } else {
      // A page of the studio's own, escaped by its template.
      const target = response.headers.get("HX-Retarget") || found;
      status.textContent = "";
      htmx.swap(target, await response.text(), { swapStyle: "innerHTML" });
    }
  });
}
