// The fleet page: one table, filtered and sorted here, each row updated in place.
import { announce, byId, count, duration, fixed, getJson, h, isNumber, listen, monitorNow, quarantineList, setNow, show, sparkline, statusPill, statusWord, timeElement } from "/static/ui.js";

const DRIFT_WARNING = 0.3;
const statusOrder = ["offline", "silent", "unknown", "online"];
const name = (device) => `${device.site}/${device.device}`;
const stack = (main, sub) => [h("span", { class: "main" }, main), h("span", { class: "sub" }, sub)];

const columns = [
  { id: "device", title: "Device", sort: name, cell: (d) => [
    h("a", { href: `/device/${d.site}/${d.device}`, class: "main" }, h("span", { class: "site" }, `${d.site} / `), d.device),
    h("span", { class: "sub" }, d.board ?? "board unknown")] },
  { id: "status", title: "Status", sort: (d) => statusOrder.indexOf(d.status), cell: (d) => [statusPill(d.status)] },
  { id: "model", title: "Model", sort: (d) => (d.model ? `${d.model.name} ${d.model.version}` : "~"), cell: modelCell },
  { id: "p50", title: "Latency p50", number: true, sort: (d) => -(d.latest["latency/p50"] ?? -1), cell: (d) => [
    sparkline(d.recent_latency_s), h("span", { class: "figure" }, duration(d.latest["latency/p50"]))] },
  { id: "p99", title: "p99", number: true, sort: (d) => -(d.latest["latency/p99"] ?? -1), cell: (d) => [duration(d.latest["latency/p99"])] },
  { id: "drift", title: "Drift", number: true, sort: (d) => -(d.latest.drift ?? -1), cell: driftCell },
  { id: "spool", title: "Spool", number: true, sort: (d) => -(d.latest["spool/depth"] ?? -1), cell: (d) => [count(d.latest["spool/depth"])] },
  { id: "missing", title: "Missing", number: true, sort: (d) => -d.missing, cell: (d) => [h("span", { class: d.missing ? "warn" : "muted" }, count(d.missing))] },
  { id: "seen", title: "Last seen", number: true, sort: (d) => -d.last_seen, cell: (d) => [timeElement(d.last_seen, monitorNow())] },
];

let fleet = { devices: [], quarantined: 0 };
let statusFilter = null;
let order = { column: columns[0], descending: false };
const rows = new Map();

function modelCell(d) {
  if (!d.model) return [h("span", { class: "muted" }, "none")];
  const learned = d.learned_version ? ` · learned v${d.learned_version}` : "";
  return stack(d.model.name, `${d.model.version} · ${d.model.precision}${learned}`);
}

function driftCell(d) {
  const drift = d.latest.drift;
  if (!isNumber(drift)) return [h("span", { class: "muted" }, "–")];
  const bar = h("span", { class: "meter", "aria-hidden": "true" }, h("span", {}));
  bar.firstChild.style.width = `${Math.min(1, Math.max(0, drift)) * 100}%`;
  return [bar, h("span", { class: `figure${drift > DRIFT_WARNING ? " warn" : ""}` }, fixed(drift))];
}

function drawHead() {
  byId("columns").replaceChildren(...columns.map((column) => {
    const isSorted = order.column === column;
    const sort = () => {
      order = { column, descending: isSorted && !order.descending };
      drawHead();
      drawRows();
      byId(`sort-${column.id}`).focus();
    };
    const direction = order.descending ? "descending" : "ascending";
    return h("th", { role: "columnheader", scope: "col", class: column.number ? "number" : null, "aria-sort": isSorted ? direction : null },
      h("button", { type: "button", id: `sort-${column.id}`, onclick: sort }, column.title, h("span", { class: "arrow", "aria-hidden": "true" }, isSorted ? (order.descending ? "↓" : "↑") : "")));
  }));
}

function matches(d) {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const text = [name(d), d.board, d.status, d.model?.name, d.model?.version, d.model?.precision].join(" ").toLowerCase();
  return (!statusFilter || d.status === statusFilter) && words.every((word) => text.includes(word));
}

function compare(a, b) {
  const [x, y] = [order.column.sort(a), order.column.sort(b)];
  const result = (x < y ? -1 : x > y ? 1 : 0) || (name(a) < name(b) ? -1 : 1);
  return order.descending ? -result : result;
}

function rowOf(d) {
  const key = name(d);
  if (!rows.has(key)) {
    const cells = columns.map((column) => h("td", { role: "cell", class: `cell-${column.id}${column.number ? " number" : ""}`, "data-title": column.title }));
    rows.set(key, h("tr", { role: "row", "data-device": key }, ...cells));
  }
  const row = rows.get(key);
  row.dataset.status = d.status;
  columns.forEach((column, i) => show(`${key} ${column.id}`, cellData(column, d), () => row.cells[i].replaceChildren(...column.cell(d))));
  return row;
}

// What a cell shows, so that it is drawn again only if that changed (its age is kept current by ui.js).
function cellData(column, d) {
  if (column.id === "device") return [d.board];
  if (column.id === "model") return [d.model, d.learned_version];
  if (column.id === "p50") return [d.recent_latency_s, d.latest["latency/p50"]];
  return column.id === "status" ? d.status : column.sort(d);
}

function drawRows() {
  const shown = fleet.devices.filter(matches).sort(compare).map(rowOf);
  const body = byId("rows");
  if (shown.length !== body.children.length || shown.some((row, i) => body.children[i] !== row)) body.replaceChildren(...shown);
  byId("empty").hidden = shown.length > 0;
  byId("empty").textContent = fleet.devices.length ? "No device matches." : "No device has been heard from yet. Start one with: fieldvit-device run";
}

function drawFilters() {
  const counts = new Map(statusOrder.map((status) => [status, fleet.devices.filter((d) => d.status === status).length]));
  const choices = [[null, "All", fleet.devices.length], ...[...counts].reverse().map(([status, n]) => [status, statusWord(status), n])];
  show("filters", [choices, statusFilter], () => byId("filters").replaceChildren(...choices
    .filter(([status, , n]) => n > 0 || status === null || status === statusFilter)
    .map(([status, title, n]) => h("button", {
      type: "button", "aria-pressed": String(status === statusFilter), "data-status": status,
      onclick: () => { statusFilter = status; drawFilters(); drawRows(); byId("filters").querySelector("[aria-pressed=true]")?.focus(); },
    }, title, h("span", { class: "n" }, count(n))))));
}

function worst(measure) {
  return fleet.devices.filter((d) => d.status === "online" && isNumber(d.latest[measure])).sort((a, b) => b.latest[measure] - a.latest[measure])[0];
}

function tile(title, value, note, href) {
  const sub = href ? h("a", { href }, note) : note;
  return h("div", {}, h("dt", {}, title), h("dd", {}, h("span", { class: "value" }, value), h("span", { class: "sub" }, sub)));
}

function drawTiles() {
  const online = fleet.devices.filter((d) => d.status === "online").length;
  const missing = fleet.devices.reduce((sum, d) => sum + d.missing, 0);
  const duplicates = fleet.devices.reduce((sum, d) => sum + d.duplicates, 0);
  const [slow, drift] = [worst("latency/p99"), worst("drift")];
  const rate = fleet.devices.reduce((sum, d) => sum + (d.status === "online" ? (d.latest.throughput ?? 0) : 0), 0);
  const link = (d) => (d ? `/device/${d.site}/${d.device}` : null);
  const values = [
    ["Online", `${count(online)} of ${count(fleet.devices.length)}`, online === fleet.devices.length ? "every device answers" : `${count(fleet.devices.length - online)} not online`],
    ["Throughput", `${count(rate)} frames/s`, "all online devices"],
    ["Slowest p99", duration(slow?.latest["latency/p99"]), slow ? name(slow) : "no telemetry", link(slow)],
    ["Highest drift", fixed(drift?.latest.drift), drift ? name(drift) : "no telemetry", link(drift)],
    ["Missing messages", count(missing), `${count(duplicates)} duplicate${duplicates === 1 ? "" : "s"} dropped`],
    ["Quarantined", count(fleet.quarantined), fleet.quarantined ? "unreadable, kept below" : "all were readable"],
  ];
  show("tiles", values, () => byId("tiles").replaceChildren(...values.map((value) => tile(...value))));
}

function announceChanges(before, after) {
  const statuses = new Map(before.devices.map((d) => [name(d), d.status]));
  const changes = after.devices.filter((d) => statuses.has(name(d)) && statuses.get(name(d)) !== d.status);
  if (changes.length) announce(changes.slice(0, 5).map((d) => `${name(d)} is now ${statusWord(d.status).toLowerCase()}`).join("; "));
}

async function drawQuarantine() {
  const box = byId("quarantine");
  box.hidden = fleet.quarantined === 0;
  box.firstElementChild.textContent = `Quarantine: ${count(fleet.quarantined)} unreadable message${fleet.quarantined === 1 ? "" : "s"}`;
  if (!box.open) return;
  const { quarantine } = await getJson("/api/quarantine");
  show("quarantine", quarantine, () => box.lastElementChild.replaceChildren(quarantineList(quarantine)));
}

async function refresh() {
  const next = await getJson("/api/devices");
  setNow(next.now);
  announceChanges(fleet, next);
  fleet = next;
  drawTiles();
  drawFilters();
  drawRows();
  await drawQuarantine();
}

drawHead();
byId("search").addEventListener("input", drawRows);
byId("quarantine").addEventListener("toggle", drawQuarantine);
listen(refresh);
setInterval(() => refresh().catch(() => {}), 30000); // a device falls silent without a message
