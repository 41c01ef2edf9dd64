// The rollouts page: how far each is, why it stands still or goes back, and what happened when.
import { announce, byId, count, getJson, h, listen, monitorNow, setNow, show, timeElement } from "/static/ui.js";

const statuses = { running: ["Running", "accent"], paused: ["Paused", "warn"], aborted: ["Aborted", "bad"], finished: ["Finished", "good"], new: ["New", "muted"] };
const parts = [
  ["done", "do well", "good"], ["confirmed", "watched", "accent"], ["asked", "told", "accent"], ["failed", "failed", "bad"],
  ["revert", "going back", "warn"], ["reverted", "back", "muted"], ["stuck", "will not go back", "bad"],
];
const tones = { done: "good", confirmed: "accent", finished: "good", failed: "bad", aborted: "bad", stuck: "bad", paused: "warn", revert: "warn" };
const words = {
  started: "Begun", stage: "Next stage", paused: "Paused", resumed: "Resumed", aborted: "Aborted", finished: "Finished", asked: "Told to update",
  confirmed: "Has it for good", done: "Does well", failed: "Failed", revert: "Told to go back", reverted: "Is back", stuck: "Will not go back",
};
let before = new Map();

function bar(rollout) {
  const told = Object.values(rollout.boards).reduce((sum, n) => sum + n, 0);
  const segments = parts.filter(([state]) => rollout.boards[state]).map(([state, , tone]) => {
    const segment = h("span", { class: "segment", "data-tone": tone });
    segment.style.flexGrow = String(rollout.boards[state]);
    return segment;
  });
  const text = parts.filter(([state]) => rollout.boards[state]).map(([state, word]) => `${count(rollout.boards[state])} ${word}`).join(", ");
  return [h("div", { class: "progress", "aria-hidden": "true" }, ...segments), h("p", { class: "muted" }, `${count(told)} board${told === 1 ? "" : "s"} told${text ? `: ${text}` : ""}`)];
}

function entryItem(entry) {
  const why = [entry.reason, entry.detail].filter(Boolean).join(": ");
  const [site, device] = (entry.device ?? "").split("/");
  const about = device ? h("a", { href: `/device/${site}/${device}` }, entry.device) : entry.kind === "stage" ? h("span", {}, String((entry.stage ?? 0) + 1)) : null;
  return h("li", { class: "event", "data-tone": tones[entry.kind] ?? "muted" },
    h("p", { class: "event-head" }, h("b", {}, words[entry.kind] ?? entry.kind), about, entry.by ? h("span", { class: "muted" }, `by ${entry.by}`) : null, timeElement(entry.time, monitorNow())),
    why ? h("p", { class: "event-why" }, why) : null);
}

function card(rollout) {
  const [word, tone] = statuses[rollout.status] ?? [rollout.status, "muted"];
  const title = `title-${rollout.id}`;
  return h("section", { class: "card", "aria-labelledby": title, "data-rollout": rollout.id },
    h("div", { class: "card-head" },
      h("h2", { id: title }, `${rollout.name} ${rollout.version}`),
      h("span", { class: "status", "data-tone": tone }, h("span", { class: "dot", "aria-hidden": "true" }), word),
      h("span", { class: "muted" }, `${rollout.id} · stage ${rollout.stage + 1} of ${rollout.stages.length}: ${rollout.stages[rollout.stage]}`)),
    h("div", { class: "fold-body" }, ...bar(rollout),
      rollout.reason ? h("p", { class: `notice ${tone}` }, rollout.reason) : null),
    h("ol", { class: "events", "aria-label": `What happened in ${rollout.id}, newest first`, tabindex: "0" }, ...rollout.entries.map(entryItem)));
}

async function refresh() {
  const { rollouts, now } = await getJson("/api/rollouts");
  setNow(now);
  byId("empty").hidden = rollouts.length > 0;
  show("rollouts", rollouts, () => byId("rollouts").replaceChildren(...rollouts.map(card)));
  const changed = rollouts.filter((r) => before.has(r.id) && before.get(r.id) !== r.status);
  if (changed.length) announce(changed.map((r) => `${r.name} ${r.version} is now ${(statuses[r.status] ?? [r.status])[0].toLowerCase()}`).join("; "));
  before = new Map(rollouts.map((r) => [r.id, r.status]));
}

listen(refresh);
setInterval(() => refresh().catch(() => {}), 3000); // the engine writes without a message of a board
