// Shared by both pages: building elements, writing numbers with units, and the live connection.
// Everything from devices goes through textContent; nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

export function h(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const byId = (id) => document.getElementById(id);

export async function getJson(path) {
  const response = await fetch(path);
  const body = await response.json();
  if (!response.ok) throw Object.assign(new Error(body.error), { status: response.status });
  return body;
}

// Renders a part of the page again only when its data changed, so that focus and selection survive updates.
const rendered = new Map();
export function show(key, data, render) {
  const text = JSON.stringify(data);
  if (rendered.get(key) === text) return;
  rendered.set(key, text);
  render(data);
}

export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const dash = "–";

export function significant(value, digits = 3) {
  if (!isNumber(value)) return dash;
  const size = Math.abs(value) >= 1 ? Math.floor(Math.log10(Math.abs(value))) + 1 : 1;
  const decimals = Number.isInteger(value) ? 0 : Math.max(0, digits - size);
  return value.toLocaleString("en", { maximumFractionDigits: decimals, minimumFractionDigits: Math.min(1, decimals) });
}
export const count = (value) => (isNumber(value) ? Math.round(value).toLocaleString("en") : dash);
export const percent = (value) => (isNumber(value) ? `${significant(value * 100)} %` : dash);
export const fixed = (value) => (isNumber(value) ? value.toFixed(3) : dash);

const steps = [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]];
export function bytes(value) {
  if (!isNumber(value)) return dash;
  const [size, unit] = steps.find(([least]) => Math.abs(value) >= least) ?? steps[3];
  return `${significant(value / size)} ${unit}`;
}
export function duration(seconds) {
  if (!isNumber(seconds)) return dash;
  return seconds >= 1 ? `${significant(seconds)} s` : `${significant(seconds * 1000)} ms`;
}

export function ago(time, now) {
  if (!time) return "not yet";
  const s = Math.max(0, now - time);
  if (s < 5) return "now";
  if (s < 60) return `${Math.floor(s)} s ago`;
  if (s < 3600) return `${Math.floor(s / 60)} min ago`;
  if (s < 172800) return `${Math.floor(s / 3600)} h ago`;
  return `${Math.floor(s / 86400)} days ago`;
}
const clock = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
export const absolute = (time) => clock.format(new Date(time * 1000));

export function timeElement(time, now) {
  if (!time) return h("span", { class: "muted" }, "not yet");
  return h("time", { datetime: new Date(time * 1000).toISOString(), title: absolute(time), "data-time": time }, ago(time, now));
}

// This machine's clock may differ from the monitor's: ages are counted on the monitor's.
let skew = 0;
export const setNow = (now) => { skew = now - Date.now() / 1000; };
export const monitorNow = () => Date.now() / 1000 + skew;
setInterval(() => {
  for (const element of document.querySelectorAll("time[data-time]")) {
    const text = ago(Number(element.dataset.time), monitorNow());
    if (element.textContent !== text) element.textContent = text;
  }
}, 1000);

const statusWords = { online: "Online", silent: "Silent", offline: "Offline", unknown: "No birth yet" };
export const statusWord = (status) => statusWords[status] ?? status;
export function statusPill(status) {
  const hint = status === "silent" ? "Says it is online, but has not spoken for 5 minutes" : null;
  return h("span", { class: "status", "data-status": status, title: hint }, h("span", { class: "dot", "aria-hidden": "true" }), statusWord(status));
}

export function sparkline(values, width = 72, height = 20) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("class", "spark");
  svg.setAttribute("aria-hidden", "true");
  if (values.length < 2) return svg;
  const low = Math.min(...values), span = Math.max(...values) - low || 1;
  const points = values.map((value, i) => `${(i * (width - 2)) / (values.length - 1) + 1},${height - 3 - ((value - low) / span) * (height - 6)}`);
  const line = document.createElementNS(SVG, "polyline");
  line.setAttribute("points", points.map((p) => p.split(",").map((n) => Number(n).toFixed(1)).join(",")).join(" "));
  svg.append(line);
  return svg;
}

export function announce(text) { byId("announce").textContent = text; }

export function quarantineList(rows) {
  return h("ul", { class: "quarantine" }, ...rows.map((row) => h("li", {},
    h("p", {}, row.reason),
    h("p", { class: "muted" }, `${row.topic} · ${bytes(row.payload_bytes)}${row.seen > 1 ? ` · seen ${count(row.seen)} times` : ""} · `, timeElement(row.last_seen, monitorNow())),
    h("pre", { tabindex: "0", "aria-label": "Beginning of the payload" }, row.payload || "(empty)"))));
}

function setLive(state, text) {
  const live = byId("live");
  if (live.dataset.state === state) return;
  live.dataset.state = state;
  live.lastElementChild.textContent = text;
}

// Calls `refresh(devices)` at most once a second: with the changed "SITE/DEVICE" names, or null for everything.
export function listen(refresh) {
  let pending = null, timer = null;
  const schedule = (devices) => {
    if (devices === null) pending = "all";
    else if (pending !== "all") pending = new Set([...(pending ?? []), ...devices]);
    timer ??= setTimeout(async () => {
      const changed = pending === "all" ? null : pending;
      pending = null;
      try { await refresh(changed); } catch (error) { console.warn(`refresh failed: ${error.message}`); }
      timer = null;
      if (pending !== null) schedule(new Set());
    }, 700);
  };
  const source = new EventSource("/events");
  const status = (event) => {
    const message = JSON.parse(event.data);
    if (message.connected) setLive("live", "Live");
    else setLive("lost", "Broker lost");
    return message;
  };
  source.addEventListener("hello", (event) => { status(event); schedule(null); });
  source.addEventListener("change", (event) => schedule(status(event).devices));
  source.addEventListener("error", () => setLive("waiting", "Reconnecting"));
  window.addEventListener("pagehide", () => source.close());
}
