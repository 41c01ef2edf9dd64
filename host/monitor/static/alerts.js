// The alerts page: what fires now, board by board, and what was told of it.
import { announce, byId, count, getJson, h, listen, monitorNow, setNow, show, timeElement } from "/static/ui.js";

const SHOWN = 200;
const tone = (severity) => (severity === "critical" ? "bad" : "warn");
let before = null;

function firingItem(alert, severity) {
  const [site, device] = alert.board.split("/");
  const board = device ? h("a", { href: `/device/${site}/${device}` }, alert.board) : h("span", {}, alert.board);
  return h("li", { class: "event", "data-tone": tone(severity) },
    h("p", { class: "event-head" }, h("b", {}, alert.rule), board, h("span", { class: "muted" }, severity), timeElement(alert.since, monitorNow())),
    h("p", { class: "event-why" }, alert.text));
}

function toldItem(notice) {
  const isOver = notice.kind === "resolved";
  return h("li", { class: "event", "data-tone": isOver ? "good" : tone(notice.severity) },
    h("p", { class: "event-head" }, h("b", {}, notice.rule), h("span", {}, isOver ? "is over" : "fires"),
      h("span", { class: "muted" }, `${count(notice.count)} board${notice.count === 1 ? "" : "s"}`), timeElement(notice.time, monitorNow())),
    h("p", { class: "event-why" }, notice.text));
}

function list(id, rows, item, empty) {
  const shown = rows.slice(0, SHOWN).map(item);
  if (rows.length > SHOWN) shown.push(h("li", { class: "empty" }, `and ${count(rows.length - SHOWN)} more`));
  show(id, rows, () => byId(id).replaceChildren(...(shown.length ? shown : [h("li", { class: "empty" }, empty)])));
}

async function refresh() {
  const { firing, notices, severities, now } = await getJson("/api/alerts");
  setNow(now);
  const order = (a) => (severities[a.rule] === "critical" ? 0 : 1);
  const sorted = firing.toSorted((a, b) => order(a) - order(b) || b.since - a.since);
  list("firing", sorted, (alert) => firingItem(alert, severities[alert.rule]), "Nothing fires.");
  list("told", notices, toldItem, "Nothing was told yet.");
  byId("rules").textContent = `rules: ${Object.keys(severities).join(", ")}`;
  if (before !== null && before !== firing.length) announce(`${count(firing.length)} alerts fire`);
  before = firing.length;
}

listen(refresh);
setInterval(() => refresh().catch(() => {}), 5000); // alerts come of silence, too
