// Events in words. Kinds are the contract's; what stands in `data` comes from a device and is shown as text.
import { h, isNumber, significant, timeElement } from "/static/ui.js";

export const kinds = {
  downloaded: ["Downloaded", "muted"],
  installed: ["Installed", "accent"],
  confirmed: ["Confirmed", "good"],
  "rolled-back": ["Rolled back", "bad"],
  refused: ["Update refused", "bad"],
  drift: ["Drift", "warn"],
  learned: ["Learned", "accent"],
  unlearned: ["Unlearned", "accent"],
  migrated: ["Migrated", "accent"],
  error: ["Error", "bad"],
};

const reasons = {
  signature: "it is not signed by enough keys",
  expired: "its signatures have expired",
  mixed: "its metadata do not belong together",
  endless: "it is longer than it was signed for",
  slow: "the source gives almost nothing",
  pointer: "the channel names another bundle",
  schema: "it was written for a newer agent",
  rollback: "it is older than what the device already has",
  checksum: "its bytes are not the ones that were signed",
  board: "it was built for another board",
  golden: "it did not reproduce the expected outputs",
  latency: "it was slower than the board allows",
  memory: "it needed more memory than the board allows",
  crash: "it crashed while it was tested",
  "learned-loss": "it would drop classes that the device was taught",
};
const spoken = ["reason", "message", "error", "detail"];
const hidden = new Set([...spoken, "name", "version", "model"]);

const words = (text) => reasons[text] ?? (/^[a-z]+([-_][a-z]+)*$/.test(text) ? text.replaceAll(/[-_]/g, " ") : text);
const plain = (value) => (isNumber(value) ? significant(value, 4) : typeof value === "string" ? value : JSON.stringify(value));
const cut = (text) => (text.length > 300 ? `${text.slice(0, 300)}…` : text);

function subject(data) {
  const model = typeof data.model === "object" && data.model !== null ? data.model : data;
  const name = typeof data.model === "string" ? data.model : model.name;
  return [name, model.version].filter((part) => typeof part === "string").join(" ");
}

export function eventItem(event, now) {
  const [title, tone] = kinds[event.kind] ?? [event.kind, "muted"];
  const { data } = event;
  const because = spoken.map((key) => data[key]).filter((text) => typeof text === "string" && text).map(words);
  const facts = Object.entries(data).filter(([key, value]) => !hidden.has(key) && value !== null).slice(0, 8);
  const about = subject(data);
  return h("li", { class: "event", "data-tone": tone },
    h("p", { class: "event-head" }, h("b", {}, title), about ? h("span", {}, cut(about)) : null, timeElement(event.time, now)),
    because.length ? h("p", { class: "event-why" }, cut([...new Set(because)].join("; "))) : null,
    facts.length ? h("p", { class: "event-facts" }, ...facts.map(([key, value]) =>
      h("span", {}, h("span", { class: "muted" }, `${key.replaceAll("_", " ")} `), cut(plain(value))))) : null);
}
