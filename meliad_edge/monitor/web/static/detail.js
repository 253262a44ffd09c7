// One event at full size: its pictures, its facts, its regions.

import { ask } from "./api.js";
import { byId, element, setFacts, setText } from "./dom.js";
import { showVerdict } from "./events.js";
import { dateTime, duration, eventState, score } from "./words.js";

const VIEWS = { "picture.jpg": "Evidence", "frame.png": "Frame" };

export class Detail {
  #id = null;
  #view = "picture.jpg";
  #clip = [];

  constructor({ onJudge }) {
    this.root = byId("detail");
    this.slider = byId("clip-slider");
    this.root.addEventListener("click", (event) => {
      const judged = event.target.closest("button[data-verdict]");
      if (judged) onJudge(this.#id, judged.dataset.verdict);
      if (event.target.closest("[data-close]") || event.target === this.root) this.root.close();
    });
    this.root.addEventListener("close", () => (this.#id = null));
    this.slider.addEventListener("input", () => this.#showFrame());
  }

  get id() {
    return this.#id;
  }

  async open(id) {
    const event = await ask(`/events/${id}`);
    this.#id = id;
    this.#view = "picture.jpg";
    this.show(event);
    if (!this.root.open) this.root.showModal();
  }

  // Only what is open is shown.
  show(event) {
    if (event.id !== this.#id) return;
    setText(byId("detail-heading"), `${event.camera}: ${eventState(event).word}`);
    setFacts(byId("facts"), [
      ["Began", dateTime(event.started_s)],
      event.state === "end" ? ["Lasted", duration(event.last_seen_s - event.started_s)] : ["Ended", "not yet"],
      ...(event.source === event.camera ? [] : [["Picture", event.source]]),
      ...(event.kind === "anomaly"
        ? [["Highest score", score(event.score)], ["Threshold then", score(event.threshold)]]
        : [["What is wrong", event.detail]]),
      ...(event.kind === "anomaly" ? [["Verdict", event.verdict ?? "not judged"]] : []),
    ]);
    byId("regions").hidden = !event.regions.length;
    byId("regions").tBodies[0].replaceChildren(...event.regions.map(regionRow));
    showVerdict(this.root, event);
    this.#showViews(event);
  }

  #showViews(event) {
    this.#clip = event.files.filter((name) => name.startsWith("clip-"));
    const views = Object.keys(VIEWS).filter((name) => event.files.includes(name));
    if (this.#clip.length) views.push("clip");
    if (!views.includes(this.#view)) this.#view = views[0] ?? "";
    byId("views").replaceChildren(
      ...views.map((view) => {
        const button = element("button", { type: "button", "aria-pressed": String(view === this.#view) }, VIEWS[view] ?? "Clip");
        button.addEventListener("click", () => {
          this.#view = view;
          this.#showViews(event);
        });
        return button;
      }),
    );
    byId("no-picture").hidden = views.length > 0;
    byId("stage").parentElement.hidden = !views.length;
    byId("clip").hidden = this.#view !== "clip";
    if (!views.length) return;
    byId("stage").alt = `${VIEWS[this.#view] ?? "Clip"} of the event on ${event.camera}`;
    if (this.#view === "clip") {
      this.slider.max = this.#clip.length - 1;
      this.#showFrame();
    } else {
      this.#showFile(`${this.#view}?score=${event.score}`);
    }
  }

  #showFrame() {
    const at = Number(this.slider.value);
    const words = `Frame ${at + 1} of ${this.#clip.length}`;
    setText(byId("clip-place"), words);
    this.slider.setAttribute("aria-valuetext", words);
    this.#showFile(this.#clip[at]);
  }

  #showFile(name) {
    const address = `/api/v1/events/${this.#id}/files/${name}`;
    const stage = byId("stage");
    if (stage.getAttribute("src") !== address) stage.src = address;
  }
}

function regionRow(region) {
  const like = region.resembles ? `‘${region.resembles.defect}’ (${region.resembles.source})` : "no labelled defect";
  return element(
    "tr",
    {},
    element("td", {}, `${region.x}, ${region.y}: ${region.width} × ${region.height}`),
    element("td", { class: "figure" }, score(region.peak)),
    element("td", {}, like),
  );
}
