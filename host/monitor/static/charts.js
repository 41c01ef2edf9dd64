// Timelines with uPlot (vendored). Each is a figure whose caption holds the values: the newest, or those under the pointer.
import { absolute, bytes, count, duration, fixed, h, isNumber, percent, significant } from "/static/ui.js";

const celsius = (value) => (isNumber(value) ? `${significant(value)} °C` : "–");
const hertz = (value) => (isNumber(value) ? `${significant(value)} frames/s` : "–");

export const charts = [
  { id: "latency", title: "Latency", wide: true, write: duration, lines: [["latency/p50", "p50"], ["latency/p90", "p90"], ["latency/p99", "p99"]] },
  { id: "throughput", title: "Throughput", write: hertz, lines: [["throughput", ""]] },
  { id: "confidence", title: "Mean confidence", write: percent, lines: [["confidence", ""]] },
  { id: "drift", title: "Drift", write: fixed, lines: [["drift", ""]] },
  { id: "memory", title: "Memory", write: bytes, lines: [["memory", ""]] },
  { id: "temperature", title: "Temperature", write: celsius, lines: [["temperature", ""]] },
  { id: "spool", title: "Spool", write: count, whole: true, lines: [["spool/depth", "waiting"], ["spool/dropped", "dropped"]] },
  { id: "errors", title: "Frame errors", write: count, whole: true, lines: [["errors", ""]], skipZero: true },
];

const wholeSteps = [1, 2, 5].flatMap((step) => [...Array(12).keys()].map((power) => step * 10 ** power)).sort((a, b) => a - b);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const lineColor = (i) => color(`--line-${i + 1}`);

export class Chart {
  constructor(spec) {
    this.spec = spec;
    this.legend = h("span", { class: "legend" });
    this.plotBox = h("div", { class: "plot", role: "img" });
    this.figure = h("figure", { class: `card chart${spec.wide ? " wide" : ""}` },
      h("figcaption", {}, h("span", { class: "chart-title" }, spec.title), this.legend), this.plotBox);
    this.markers = [];
    new ResizeObserver(() => this.resize()).observe(this.plotBox);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  // Returns false where the device does not measure this.
  update(series, markers) {
    const { lines, skipZero } = this.spec;
    const present = lines.filter(([measure]) => series.values[measure]?.some((v) => v !== null && (!skipZero || v !== 0)));
    this.markers = markers;
    if (present.length === 0) return false;
    const isSame = this.lines?.length === present.length;
    this.lines = present;
    this.data = [series.times, ...present.map(([measure]) => series.values[measure])];
    const first = Math.min(series.times[0] ?? series.since, series.until - 30); // a young device fills the width
    this.range = [Math.max(series.since, first), series.until];
    if (this.plot && isSame) this.plot.setData(this.data);
    else this.draw();
    this.write(null);
    return true;
  }

  draw() {
    this.plot?.destroy();
    this.plot = null;
    if (!this.data || this.plotBox.clientWidth === 0) return; // drawn by the resize observer once it has a width
    const [axis, grid] = [color("--muted"), color("--grid")];
    const font = `11px ${getComputedStyle(document.body).fontFamily}`;
    const common = { stroke: axis, font, ticks: { show: false }, grid: { stroke: grid, width: 1 } };
    const single = this.lines.length === 1;
    this.plot = new uPlot({
      width: this.plotBox.clientWidth,
      height: this.height(),
      padding: [8, 8, 0, 0],
      legend: { show: false },
      cursor: { sync: { key: "device" }, drag: { x: false, y: false }, points: { size: 6 } },
      scales: { x: { time: true, range: () => this.range }, y: { range: (plot, low, high) => range(low, this.spec.whole ? Math.max(high, 2) : high) } },
      axes: [
        { ...common, grid: { show: false }, space: 70, size: 26, values: [[86400, "{MMM} {D}"], [3600, "{HH}:{mm}"], [60, "{HH}:{mm}"], [1, "{HH}:{mm}:{ss}"]] },
        { ...common, size: 62, space: 36, incrs: this.spec.whole ? wholeSteps : undefined, values: (plot, splits) => splits.map((v) => this.tick(v)) },
      ],
      series: [{}, ...this.lines.map((line, i) => ({
        stroke: lineColor(i), width: 1.6, points: { show: this.data[0].length < 40, size: 4 }, fill: single ? `${lineColor(0)}1c` : undefined,
      }))],
      hooks: { setCursor: [(plot) => this.write(plot.cursor.idx)], drawClear: [(plot) => this.drawMarkers(plot)] },
    }, this.data, this.plotBox);
  }

  tick(value) {
    const rounded = Number(value.toPrecision(6)); // splits carry binary noise: 0.30000000000000004
    return this.spec.write(rounded).replace(" frames/s", "/s").replace("0 ms", rounded === 0 ? "0" : "0 ms");
  }

  height() { return this.spec.wide ? 210 : 132; }

  resize() {
    if (!this.plot) this.draw();
    else if (this.plot.width !== this.plotBox.clientWidth) this.plot.setSize({ width: this.plotBox.clientWidth, height: this.height() });
  }

  drawMarkers(plot) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
    for (const marker of this.markers) {
      if (marker.time < this.range[0] || marker.time > this.range[1]) continue;
      const x = Math.round(plot.valToPos(marker.time, "x", true)) + 0.5;
      ctx.strokeStyle = color(`--${marker.tone}`);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  write(index) {
    const texts = this.lines.map(([, title], i) => {
      const values = this.data[i + 1];
      const value = index === null || index === undefined ? values.findLast((v) => v !== null) : values[index];
      return [title, this.spec.write(value)];
    });
    const time = index === null || index === undefined ? null : this.data[0][index];
    this.legend.replaceChildren(
      ...(time ? [h("span", { class: "muted at" }, absolute(time).split(", ").at(-1))] : []),
      ...texts.map(([title, text], i) => h("span", { class: "key" },
        this.lines.length > 1 ? h("span", { class: `swatch line-${i + 1}`, "aria-hidden": "true" }) : null,
        title ? h("span", { class: "muted" }, `${title} `) : null, h("b", {}, text))));
    if (time === null) this.plotBox.setAttribute("aria-label", this.describe());
  }

  describe() {
    return this.lines.map(([, title], i) => {
      const values = this.data[i + 1].filter((v) => v !== null);
      const [low, high, last] = [Math.min(...values), Math.max(...values), values.at(-1)].map(this.spec.write);
      return `${this.spec.title} ${title}: now ${last}, between ${low} and ${high}`;
    }).join("; ");
  }
}

// Starts at zero where that costs little resolution, so that small noise does not look like a cliff.
function range(low, high) {
  if (!isNumber(low) || !isNumber(high)) return [0, 1];
  if (low >= 0 && low < 0.75 * high) low = 0;
  const room = (high - low || Math.abs(high) || 1) * 0.12;
  return [low === 0 ? 0 : low - room, high + room];
}
