// The device page: facts, timelines, events, class mix, delivery.
import { Chart, charts } from "/static/charts.js";
import { eventItem, kinds } from "/static/events.js";
import { announce, byId, count, getJson, h, listen, monitorNow, quarantineList, setNow, show, statusPill, statusWord, timeElement } from "/static/ui.js";

const [site, name] = location.pathname.split("/").slice(2).map(decodeURIComponent);
const api = `/api/devices/${encodeURIComponent(site)}/${encodeURIComponent(name)}`;
const ranges = [[900, "15 min"], [3600, "1 h"], [21600, "6 h"], [86400, "24 h"], [604800, "7 days"]];
const SHOWN_CLASSES = 12;
let seconds = 3600;
let lastStatus = null;
const drawn = charts.map((spec) => new Chart(spec));

function fact(title, value, extra) {
  return h("div", {}, h("dt", {}, title), h("dd", {}, value ?? h("span", { class: "muted" }, "unknown"), extra ? h("span", { class: "sub" }, extra) : null));
}

function drawFacts(d) {
  const { model } = d;
  const shown = d.labels.slice(0, 400);
  const labels = h("details", {}, h("summary", {}, `${count(d.labels.length)} labels`),
    h("p", { class: "labels" }, shown.join(", ") + (shown.length < d.labels.length ? ", …" : "")));
  byId("facts").replaceChildren(
    fact("Model", model?.name, model ? `version ${model.version} · release ${model.release}` : null),
    fact("Precision", model?.precision, d.slot ? `slot ${d.slot}` : null),
    fact("Learned", `version ${count(d.learned_version)}`, d.learned_version ? "taught on the device" : "nothing taught yet"),
    fact("Board", d.board, d.agent_version ? `agent ${d.agent_version}` : null),
    fact("Boot", d.boot ? h("code", {}, d.boot.slice(0, 12)) : null, d.backbone ? `backbone ${d.backbone.slice(0, 12)}` : null),
    fact("Labels", d.labels.length ? labels : null));
}

function drawHead(d) {
  document.title = `${d.site}/${d.device} · ${statusWord(d.status)} · FieldViT`;
  byId("status").replaceChildren(statusPill(d.status));
  byId("seen").replaceChildren("last seen ", timeElement(d.last_seen, monitorNow()));
  const notice = byId("notice");
  notice.hidden = d.forbidden_modules.length === 0;
  notice.textContent = `This device has loaded modules that do not belong on a board: ${d.forbidden_modules.join(", ")}`;
  if (lastStatus && lastStatus !== d.status) announce(`${d.site}/${d.device} is now ${statusWord(d.status).toLowerCase()}`);
  lastStatus = d.status;
}

function drawEvents(events) {
  byId("events").replaceChildren(...(events.length ? events.map((event) => eventItem(event, monitorNow())) : [h("li", { class: "empty" }, "No event yet.")]));
}

function drawClasses(classes) {
  const total = classes.reduce((sum, row) => sum + row.count, 0);
  const rest = classes.slice(SHOWN_CLASSES);
  const shown = classes.slice(0, SHOWN_CLASSES);
  if (rest.length) shown.push({ label: `${rest.length} others`, count: rest.reduce((sum, row) => sum + row.count, 0) });
  byId("classes-note").textContent = total ? `${count(total)} predictions in this range` : "";
  if (!total) {
    byId("classes").replaceChildren(h("p", { class: "empty" }, "No predictions in this range."));
    return;
  }
  const most = Math.max(...shown.map((row) => row.count));
  byId("classes").replaceChildren(h("table", { class: "mix" },
    h("caption", { class: "hidden" }, "Predictions per class, most frequent first"),
    h("colgroup", {}, ...["label", "bar", "count", "share"].map((column) => h("col", { class: `col-${column}` }))),
    h("thead", { class: "hidden" }, h("tr", {}, ...["Class", "Share as a bar", "Predictions", "Share"].map((title) => h("th", { scope: "col" }, title)))),
    h("tbody", {}, ...shown.map((row) => {
      const bar = h("span", { class: "bar-fill" });
      bar.style.width = `${(100 * row.count) / most}%`;
      return h("tr", {}, h("th", { scope: "row", title: row.label }, row.label), h("td", { class: "bar-cell", "aria-hidden": "true" }, bar),
        h("td", { class: "number" }, count(row.count)), h("td", { class: "number muted" }, `${((100 * row.count) / total).toFixed(1)} %`));
    }))));
}

function drawCounts(d) {
  const counts = [
    ["Received", d.received, null],
    ["Missing", d.missing, d.missing ? "bad" : null],
    ["Duplicates", d.duplicates, null],
    ["Quarantined", d.quarantined, d.quarantined ? "warn" : null],
  ];
  byId("counts").replaceChildren(...counts.map(([title, value, tone]) => h("div", {}, h("dt", {}, title), h("dd", { class: tone }, count(value)))));
}

function gapState(gap) {
  if (gap.closed !== null) return h("span", { class: "good" }, "arrived late ", timeElement(gap.closed, monitorNow()));
  if (!gap.watched) return h("span", { class: "muted" }, "before this monitor first heard of the device");
  return h("span", { class: "bad" }, `${count(gap.missing)} missing since `, timeElement(gap.opened, monitorNow()));
}

function drawGaps(gaps) {
  byId("gaps").replaceChildren(gaps.length === 0
    ? h("p", { class: "fine" }, "No gap: every number of the sequence arrived.")
    : h("table", { class: "gaps" }, h("caption", {}, "Gaps in the sequence"),
      h("thead", {}, h("tr", {}, ...["Numbers", "Boot", "State"].map((title) => h("th", { scope: "col" }, title)))),
      h("tbody", {}, ...gaps.map((gap) => h("tr", {},
        h("td", {}, gap.first === gap.last ? count(gap.first) : `${count(gap.first)} to ${count(gap.last)}`),
        h("td", {}, h("code", {}, gap.boot.slice(0, 8))), h("td", {}, gapState(gap)))))));
}

function drawQuarantine(rows) {
  byId("quarantine").replaceChildren(...(rows.length ? [h("h3", {}, "Quarantined messages"), quarantineList(rows)] : []));
}

async function drawSeries(events) {
  const series = await getJson(`${api}/series?seconds=${seconds}`);
  const markers = events.map((event) => ({ time: event.time, tone: kinds[event.kind]?.[1] ?? "muted" }));
  let visible = 0;
  for (const chart of drawn) {
    const isPresent = chart.update(series, markers);
    chart.figure.hidden = !isPresent;
    visible += isPresent;
  }
  byId("no-telemetry").hidden = visible > 0;
  show("classes", series.classes, drawClasses);
}

function drawRanges() {
  byId("ranges").replaceChildren(...ranges.map(([value, title]) => h("button", {
    type: "button", "aria-pressed": String(value === seconds),
    onclick: async () => { seconds = value; drawRanges(); byId("ranges").querySelector("[aria-pressed=true]").focus(); await refresh(null); },
  }, title)));
}

async function refresh(changed) {
  if (changed !== null && !changed.has(`${site}/${name}`)) return;
  let device;
  try { device = await getJson(api); } catch (error) {
    if (error.status !== 404) throw error;
    byId("notice").hidden = false;
    byId("notice").textContent = "No message of this device has reached this monitor yet. The page fills itself when one does.";
    return;
  }
  setNow(device.now);
  drawHead(device);
  show("facts", [device.model, device.labels, device.board, device.slot, device.agent_version, device.boot, device.learned_version], () => drawFacts(device));
  show("events", device.events, drawEvents);
  show("counts", [device.received, device.missing, device.duplicates, device.quarantined], () => drawCounts(device));
  show("gaps", device.gaps, drawGaps);
  show("quarantine", device.quarantine, drawQuarantine);
  byId("content").hidden = false;
  await drawSeries(device.events);
}

byId("crumbs").replaceChildren(h("a", { href: "/" }, "Fleet"), h("span", { "aria-hidden": "true" }, " / "), site);
byId("name").textContent = name;
byId("charts").append(...drawn.map((chart) => chart.figure));
drawRanges();
listen(refresh);
setInterval(() => refresh(null).catch(() => {}), 30000);
