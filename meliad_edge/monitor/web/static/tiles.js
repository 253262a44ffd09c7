// One tile per camera.

import { ask } from "./api.js";
import { History } from "./chart.js";
import { byId, clone, element, fieldsOf, setFacts, setState, setText } from "./dom.js";
import { LivePicture } from "./live.js";
import { cameraState, clockTime, conditionWord, count, driftWord, milliseconds, score } from "./words.js";

const FACTS_INTERVAL_MS = 10000;
// Where the threshold is on the meter.
const THRESHOLD_SHARE = 0.7;

class Tile {
  constructor(camera, openEvent) {
    this.number = camera.number;
    this.name = camera.name;
    this.root = clone("tile");
    this.fields = fieldsOf(this.root);
    this.history = new History(this.fields.chart, this.fields.history);
    this.live = new LivePicture(this.fields.picture, camera.number);
    this.fields.evidence.addEventListener("change", () => this.live.setEvidence(this.fields.evidence.checked));
    this.fields.open.addEventListener("click", () => openEvent(this.anomaly));
    setText(this.fields.name, camera.name);
    this.root.setAttribute("aria-label", camera.name);
    this.fields.picture.alt = `Live picture of ${camera.name}`;
  }

  setEvidence(isShown) {
    this.fields.evidence.checked = isShown;
    this.live.setEvidence(isShown);
  }

  show(camera, nowS, lowestScore) {
    const { fields } = this;
    const state = cameraState(camera);
    this.anomaly = camera.anomaly;
    this.root.dataset.state = state.state;
    setState(fields.state, state);
    fields.open.hidden = !camera.anomaly;
    const isDelivering = camera.state === "streaming" && camera.condition !== "lost";
    this.live.isDelivering = isDelivering;
    this.live.fps = camera.fps;
    this.#cover(camera, isDelivering);
    this.#badges(camera);
    setText(fields.score, camera.frame === null ? "–" : score(camera.score));
    setText(fields.threshold, camera.threshold === null ? "" : `of ${score(camera.threshold)}`);
    const isAbove = camera.frame !== null && (camera.score === null || camera.score >= camera.threshold);
    const share = isAbove ? 1 : (camera.score - lowestScore) / (camera.threshold - lowestScore);
    const beyond = isAbove && camera.score !== null ? (camera.score - camera.threshold) / (camera.threshold - lowestScore) : 0;
    const filled = camera.frame === null ? 0 : THRESHOLD_SHARE * (Math.max(0, Math.min(1, share)) + Math.min(beyond, 0.428));
    fields.meter.style.width = `${(100 * filled).toFixed(1)}%`;
    fields.meter.classList.toggle("above", isAbove);
    setText(fields.fps, camera.fps.toFixed(camera.fps < 10 ? 1 : 0));
    setText(fields.p50, milliseconds(camera.p50_ms));
    setText(fields.p99, camera.p99_ms === null ? "" : `p99 ${milliseconds(camera.p99_ms)}`);
    this.history.add(camera.points);
    this.history.draw(nowS);
  }

  showFacts(camera) {
    const { frames } = camera;
    const counts = Object.entries(frames).filter(([outcome, number]) => number || outcome === "read" || outcome === "scored");
    setFacts(this.fields.facts, [
      ["Address", camera.address],
      ["Picture", camera.description || "unknown"],
      ["Latest news", camera.notice || "none"],
      ["Reconnects", count(camera.reconnects)],
      ["Anomaly events", count(camera.events)],
      ["Frames", counts.map(([outcome, number]) => `${count(number)} ${outcome}`).join(", ")],
    ]);
  }

  #cover(camera, isDelivering) {
    const { cover } = this.fields;
    cover.hidden = isDelivering && camera.frame !== null;
    if (!cover.hidden) {
      setText(cover, camera.frame === null ? "No picture yet" : `Last picture of ${clockTime(camera.captured_s)}`);
    }
  }

  #badges(camera) {
    const badges = [];
    if (camera.condition) badges.push(["condition", conditionWord(camera.condition), camera.condition_detail]);
    if (camera.drift) badges.push(["drift", driftWord(camera.drift), camera.drift_detail]);
    const key = JSON.stringify(badges);
    if (key === this.badgesKey) return;
    this.badgesKey = key;
    this.fields.badges.replaceChildren(
      ...badges.map(([kind, word, detail]) =>
        element("li", { "data-kind": kind }, element("strong", {}, word), detail ? `: ${detail}` : ""),
      ),
    );
  }
}

export class Tiles {
  #tiles = new Map();

  constructor(openEvent) {
    this.root = byId("tiles");
    this.openEvent = openEvent;
    this.lowestScore = 0;
    const all = byId("all-evidence");
    all.addEventListener("change", () => this.#tiles.forEach((tile) => tile.setEvidence(all.checked)));
    setInterval(() => this.showFacts().catch(() => {}), FACTS_INTERVAL_MS);
  }

  async reload() {
    await this.showFacts();
    for (const tile of this.#tiles.values()) {
      const { points } = await ask(`/cameras/${tile.number}/scores?limit=3600`);
      tile.history.replace(points);
    }
  }

  show(cameras, nowS) {
    const isOther = cameras.some(({ number, name }) => this.#tiles.has(number) && this.#tiles.get(number).name !== name);
    if (isOther || this.#tiles.size > cameras.length) location.reload(); // The watch was started with other cameras.
    for (const camera of cameras) this.#tile(camera).show(camera, nowS, this.lowestScore);
  }

  async showFacts() {
    const { cameras } = await ask("/cameras");
    for (const camera of cameras) this.#tile(camera).showFacts(camera);
  }

  #tile(camera) {
    let tile = this.#tiles.get(camera.number);
    if (!tile) {
      tile = new Tile(camera, this.openEvent);
      this.#tiles.set(camera.number, tile);
      this.root.append(tile.root);
    }
    return tile;
  }
}
