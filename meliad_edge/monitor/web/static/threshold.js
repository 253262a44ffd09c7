// The threshold: what another one would promise is shown before it is set, and setting it takes a second click.

import { ask } from "./api.js";
import { byId, element, setFacts, setText } from "./dom.js";
import { percent, score } from "./words.js";

const PREVIEW_DELAY_MS = 150;

export class ThresholdControl {
  #standing = null;
  #preview = null;
  #timer = 0;
  #asked = 0;

  constructor({ onStanding, say }) {
    this.root = byId("threshold");
    this.form = byId("threshold-form");
    this.onStanding = onStanding;
    this.say = say;
    byId("open-threshold").addEventListener("click", () => this.open());
    for (const close of this.root.querySelectorAll("[data-close]")) close.addEventListener("click", () => this.root.close());
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("change", (event) => event.target.name === "by" && this.#choose());
    this.#pair("rate-slider", "rate", (place) => percentOf(10 ** place), (value) => Math.log10(value / 100), "false_alarm_rate");
    this.#pair("value-slider", "value", (place) => Number(place).toFixed(2), Number, "value");
    byId("apply-threshold").addEventListener("click", () => this.#ask());
    byId("cancel-threshold").addEventListener("click", () => this.#settle());
    byId("move-threshold").addEventListener("click", () => this.#move());
    byId("reset-threshold").addEventListener("click", () => this.#reset());
  }

  async reload() {
    this.#show(await ask("/threshold"));
  }

  async open() {
    await this.reload().catch(() => {});
    if (!this.#standing) return;
    const { threshold, target_false_alarm_rate: rate, score_range: [low, high] } = this.#standing;
    const slider = byId("value-slider");
    slider.min = low;
    slider.max = Math.max(high, threshold) + 0.25 * (Math.max(high, threshold) - low);
    slider.value = threshold;
    byId("value").value = threshold.toFixed(2);
    byId("rate").value = percentOf(rate);
    byId("rate-slider").value = Math.log10(rate);
    this.#settle();
    this.#choose();
    this.root.showModal();
  }

  #pair(sliderId, fieldId, toField, toSlider, way) {
    const slider = byId(sliderId);
    const field = byId(fieldId);
    const chosen = () => {
      this.form.elements.by.value = way;
      this.#choose();
    };
    slider.addEventListener("input", () => {
      field.value = toField(slider.value);
      chosen();
    });
    field.addEventListener("input", () => {
      slider.value = toSlider(field.value);
      chosen();
    });
  }

  get #choice() {
    const isRate = this.form.elements.by.value === "false_alarm_rate";
    const field = byId(isRate ? "rate" : "value");
    if (field.value === "") return null;
    return isRate ? { false_alarm_rate: Number(field.value) / 100 } : { value: Number(field.value) };
  }

  #choose() {
    const isRate = this.form.elements.by.value === "false_alarm_rate";
    byId("by-rate").classList.toggle("unused", !isRate);
    byId("by-value").classList.toggle("unused", isRate);
    this.#preview = null;
    this.#settle();
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#look(), PREVIEW_DELAY_MS);
  }

  async #look() {
    const choice = this.#choice;
    const number = ++this.#asked;
    setText(byId("threshold-problem"), "");
    if (!choice) return;
    try {
      const preview = await ask("/threshold/preview", { method: "POST", body: choice });
      if (number !== this.#asked) return; // A later question has been asked meanwhile.
      this.#preview = { choice, ...preview };
      this.#showPreview(preview);
    } catch (problem) {
      if (number !== this.#asked) return;
      byId("preview").replaceChildren();
      setText(byId("threshold-problem"), problem.message);
    }
    this.#settle();
  }

  #showPreview(preview) {
    const { guaranteed_false_alarm_rate: rate, target_false_alarm_rate: target, upper_bound: bound, calibration_images: images } = preview;
    const parts = [
      element("p", {}, "Threshold ", element("strong", {}, score(preview.threshold)), ": expect at most ",
        element("strong", {}, percent(rate)), " of normal pictures to alarm."),
      element("p", { class: "note" }, `From ${images} calibration images; with 95 % confidence below ${percent(bound)}.`),
    ];
    if (rate > target + 1e-9) {
      parts.push(element("p", { class: "warning" }, `So few images cannot promise ${percent(target)}: calibrate with more normal pictures.`));
    }
    byId("preview").replaceChildren(...parts);
  }

  #ask() {
    if (!this.#preview) return;
    const { threshold, guaranteed_false_alarm_rate: rate, upper_bound: bound } = this.#preview;
    setText(
      byId("confirm-text"),
      `Change the threshold from ${score(this.#standing.threshold)} to ${score(threshold)}? Expect at most ${percent(rate)} false alarms (bound ${percent(bound)}).`,
    );
    byId("confirm-threshold").hidden = false;
    byId("move-threshold").focus();
  }

  async #move() {
    await this.#change({ method: "PUT", body: this.#preview.choice });
  }

  async #reset() {
    await this.#change({ method: "DELETE" });
  }

  async #change(request) {
    try {
      this.#show(await ask("/threshold", request));
      this.root.close();
      this.say(`Threshold is ${score(this.#standing.threshold)} now`);
    } catch (problem) {
      setText(byId("threshold-problem"), problem.message);
      this.#settle();
    }
  }

  #settle() {
    byId("confirm-threshold").hidden = true;
    byId("apply-threshold").disabled = !this.#preview;
  }

  #show(standing) {
    this.#standing = standing;
    setText(byId("threshold-now"), score(standing.threshold));
    setFacts(byId("threshold-facts"), [
      ["In force", `${score(standing.threshold)}${standing.is_own ? ", set on this device" : ", the model’s own"}`],
      ...(standing.is_own ? [["The model’s own", score(standing.bundle_threshold)]] : []),
      ["False alarms", `at most ${percent(standing.guaranteed_false_alarm_rate)} expected, bound ${percent(standing.upper_bound)}`],
      ["Calibration images", String(standing.calibration_images)],
    ]);
    byId("reset-threshold").hidden = !standing.is_own;
    this.onStanding(standing);
  }
}

function percentOf(rate) {
  return String(Number((100 * rate).toPrecision(2)));
}
