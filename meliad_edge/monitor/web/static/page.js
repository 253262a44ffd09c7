// The page of a running watch.

import { ask } from "./api.js";
import { Connection } from "./connection.js";
import { Detail } from "./detail.js";
import { byId, setState, setText } from "./dom.js";
import { EventList } from "./events.js";
import { ThresholdControl } from "./threshold.js";
import { Tiles } from "./tiles.js";
import { clockTime, overallState } from "./words.js";

const TOAST_MS = 4000;

let toastTimer = 0;

function say(text) {
  const toast = byId("toast");
  toast.hidePopover();
  toast.showPopover(); // Again, to lie above a dialog that was opened meanwhile.
  setText(toast, text);
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => toast.hidePopover(), TOAST_MS);
}

const detail = new Detail({ onJudge: (id, verdict) => events.judge(id, verdict) });
const open = (id) => detail.open(id).catch((problem) => say(problem.message));
const events = new EventList({ onOpen: open, onChange: (event) => detail.show(event), say });
const tiles = new Tiles(open);
const threshold = new ThresholdControl({ onStanding: (standing) => (tiles.lowestScore = standing.score_range[0]), say });

let shownVersion = null;

async function showAbout() {
  const { version, model, needs_token } = await ask("/about");
  setText(byId("model"), model.name);
  if (shownVersion !== null && shownVersion !== version) location.reload(); // The watch was updated meanwhile.
  shownVersion = version;
  setText(byId("model-facts"), `${model.version ? `version ${model.version} · ` : ""}${model.engine}, ${model.precision} · ${model.sha256.slice(0, 12)} · meliad-edge ${version}`);
  byId("log-out").hidden = !needs_token;
}

let thresholdNow = null;

function showState({ cameras, threshold: value }, timeS) {
  tiles.show(cameras, timeS);
  events.setCameras(cameras.map((camera) => camera.name));
  const overall = overallState(cameras);
  setState(byId("overall"), overall);
  document.title = `${overall.state === "anomaly" ? "▲ " : ""}${overall.word} · meliad-edge`;
  if (thresholdNow !== null && thresholdNow !== value) threshold.reload().catch(() => {});
  thresholdNow = value;
}

function showLost(since) {
  const lost = byId("lost");
  setText(lost, `No connection to the watch since ${clockTime(since / 1000)}. What is shown is old. Trying again …`);
  lost.hidden = false;
  document.body.classList.add("disconnected");
  setState(byId("overall"), { state: "lost", word: "No connection" });
}

function showFound() {
  byId("lost").hidden = true;
  document.body.classList.remove("disconnected");
  for (const load of [showAbout(), tiles.reload(), events.reload(), threshold.reload()]) {
    load.catch((problem) => say(problem.message));
  }
}

new Connection({
  onOpen: showFound,
  onMessage: ({ time_s: timeS, state, events: changed }) => {
    if (state) showState(state, timeS);
    if (changed) events.update(changed);
  },
  onLost: showLost,
}).open();

const KEYS = {
  j: () => step(1),
  k: () => step(-1),
  c: () => judge("confirmed"),
  r: () => judge("rejected"),
  u: () => events.undo(),
};

function step(by) {
  const id = events.move(by);
  if (id && detail.id) open(id);
}

function judge(verdict) {
  const id = detail.id ?? events.selected;
  if (id) events.judge(id, verdict);
  else say("No event is selected; j selects the newest");
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, select, textarea") || byId("threshold").open) return;
  if (event.key === "Enter" && event.target.matches(".event")) open(event.target.dataset.id);
  else if (Object.hasOwn(KEYS, event.key)) KEYS[event.key]();
  else return;
  event.preventDefault();
});

byId("log-out").addEventListener("click", async () => {
  await fetch("/logout", { method: "POST" });
  location.replace("/login");
});
