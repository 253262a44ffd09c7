// The list of events, newest first, and what people say of them.

import { ask } from "./api.js";
import { byId, clone, element, fieldsOf, setState, setText } from "./dom.js";
import { clockTime, dateTime, eventState, eventSummary, score } from "./words.js";

const PAGE = 30;
const MOST_SHOWN = 300;

export class EventList {
  #events = new Map(); // shown, by id
  #items = new Map();
  #next = null;
  #selected = null;
  #undo = [];
  #work = Promise.resolve();
  #known = new Set(); // announced, or older than this page

  constructor({ onOpen, onChange, say }) {
    this.root = byId("event-list");
    this.filter = byId("filter");
    this.onOpen = onOpen;
    this.onChange = onChange;
    this.say = say;
    this.filter.addEventListener("change", () => this.reload());
    this.filter.addEventListener("submit", (event) => event.preventDefault());
    byId("older").addEventListener("click", () => this.#load(this.#next));
    this.root.addEventListener("click", (event) => this.#click(event));
    this.root.addEventListener("focusin", (event) => this.#select(event.target.closest(".event")?.dataset.id ?? null));
  }

  get selected() {
    return this.#selected;
  }

  event(id) {
    return this.#events.get(id);
  }

  setCameras(names) {
    const { camera } = this.filter.elements;
    if (camera.options.length === names.length + 1) return;
    const chosen = camera.value;
    camera.replaceChildren(element("option", { value: "" }, "all"), ...names.map((name) => element("option", { value: name }, name)));
    camera.value = chosen;
  }

  async reload() {
    await this.#load(null);
  }

  // Events that are new or have changed, as the stream of updates tells them.
  update(events) {
    for (const event of [...events].reverse()) {
      const isNews = !this.#known.has(event.id);
      this.#known.add(event.id);
      if (isNews && event.kind === "anomaly" && event.state !== "end") {
        byId("announcements").append(
          element("p", {}, `Anomaly on ${event.camera} at ${clockTime(event.started_s)}, score ${score(event.score)}`),
        );
        while (byId("announcements").childElementCount > 5) byId("announcements").firstElementChild.remove();
      }
      if (this.#events.has(event.id) || this.#matches(event)) this.#put(event, isNews);
      this.onChange(event);
    }
    this.#trim();
    this.#count();
  }

  move(step) {
    const ids = [...this.root.children].map((item) => item.dataset.id);
    if (!ids.length) return null;
    const at = ids.indexOf(this.#selected);
    const id = ids[at < 0 ? 0 : Math.max(0, Math.min(ids.length - 1, at + step))];
    this.#select(id);
    const item = this.#items.get(id);
    if (!document.querySelector("dialog[open]")) item.focus({ preventScroll: true });
    item.scrollIntoView({ block: "nearest" });
    return id;
  }

  // Asking for the verdict that an event has takes it back. One after the other: an undo may come before the answer.
  judge(id, verdict) {
    this.#work = this.#work.then(() => this.#judge(id, verdict));
  }

  undo() {
    this.#work = this.#work.then(() => this.#takeBack());
  }

  async #judge(id, verdict) {
    const event = this.#events.get(id) ?? (await ask(`/events/${id}`).catch(() => null));
    if (!event) return;
    if (event.kind !== "anomaly") {
      this.say("Only anomalies are judged");
      return;
    }
    const given = event.verdict === verdict ? null : verdict;
    if (await this.#putVerdict(id, given)) this.#undo.push([id, event.verdict]);
  }

  async #takeBack() {
    const last = this.#undo.pop();
    if (!last) {
      this.say("Nothing to undo");
      return;
    }
    await this.#putVerdict(...last);
  }

  async #putVerdict(id, verdict) {
    try {
      const event = await ask(`/events/${id}/verdict`, { method: "PUT", body: { verdict } });
      if (this.#events.has(id)) this.#put(event, false);
      this.onChange(event);
      this.say(`${event.camera}, ${dateTime(event.started_s)}: ${verdict ?? "not judged"}`);
      return true;
    } catch (problem) {
      this.say(`Not kept: ${problem.message}`);
      return false;
    }
  }

  async #load(before) {
    const query = new URLSearchParams({ limit: PAGE });
    for (const { name, value } of this.filter.elements) if (value) query.set(name, value);
    if (before) query.set("before", before);
    const empty = byId("no-events");
    try {
      const { events, next } = await ask(`/events?${query}`);
      if (!before) {
        this.#events.clear();
        this.#items.clear();
        this.root.replaceChildren();
      }
      this.#next = next;
      for (const event of events) {
        this.#known.add(event.id);
        this.#put(event, false);
      }
      setText(empty, this.filter.matches(":has(option:checked:not([value='']))") ? "No event matches the filter." : "Nothing has happened yet.");
    } catch (problem) {
      setText(empty, problem.message);
    }
    byId("older").hidden = this.#next === null;
    this.#count();
  }

  #matches(event) {
    const { camera, kind, verdict } = this.filter.elements;
    const said = event.verdict ?? "none";
    return (
      (!camera.value || camera.value === event.camera) &&
      (!kind.value || kind.value === event.kind) &&
      (!verdict.value || verdict.value === said)
    );
  }

  #put(event, isNews) {
    this.#events.set(event.id, event);
    let item = this.#items.get(event.id);
    if (!item) {
      item = clone("event");
      item.dataset.id = event.id;
      this.#items.set(event.id, item);
      const older = [...this.root.children].find((other) => this.#isOlder(this.#events.get(other.dataset.id), event));
      this.root.insertBefore(item, older ?? null);
      if (isNews) item.classList.add("news");
    }
    this.#show(item, event);
  }

  #isOlder(one, other) {
    return one.started_s < other.started_s || (one.started_s === other.started_s && one.id < other.id);
  }

  #show(item, event) {
    const fields = fieldsOf(item);
    const state = eventState(event);
    item.setAttribute("aria-label", `${state.word}, ${event.camera}, ${dateTime(event.started_s)}`);
    setState(fields.state, state);
    setText(fields.time, dateTime(event.started_s));
    fields.time.dateTime = new Date(1000 * event.started_s).toISOString();
    setText(fields.camera, event.source === event.camera ? event.camera : `${event.camera}: ${event.source}`);
    setText(fields.what, eventSummary(event));
    const thumb = item.querySelector(".thumb");
    const hasPicture = event.files.includes("picture.jpg");
    thumb.classList.toggle("none", !hasPicture);
    thumb.setAttribute("aria-label", `Details of ${state.word}, ${event.camera}, ${dateTime(event.started_s)}`);
    // The score names the picture: it is replaced when a higher one comes.
    const address = `/api/v1/events/${event.id}/files/picture.jpg?score=${event.score}`;
    if (hasPicture && fields.picture.getAttribute("src") !== address) fields.picture.src = address;
    showVerdict(item, event);
  }

  #click(event) {
    const item = event.target.closest(".event");
    if (!item) return;
    const { id } = item.dataset;
    const judged = event.target.closest("button[data-verdict]");
    if (judged) this.judge(id, judged.dataset.verdict);
    else if (event.target.closest("[data-open]")) this.onOpen(id);
  }

  #select(id) {
    if (id === this.#selected) return;
    this.#items.get(this.#selected)?.removeAttribute("aria-current");
    this.#selected = id;
    this.#items.get(id)?.setAttribute("aria-current", "true");
  }

  // A page that is open for weeks must not grow; older events come back with the button.
  #trim() {
    while (this.root.childElementCount > MOST_SHOWN) {
      const { id } = this.root.lastElementChild.dataset;
      this.root.lastElementChild.remove();
      this.#events.delete(id);
      this.#items.delete(id);
      this.#next = this.root.lastElementChild.dataset.id;
    }
    byId("older").hidden = this.#next === null;
  }

  #count() {
    const number = this.#events.size;
    byId("no-events").hidden = number > 0;
    setText(byId("event-count"), number ? `${number}${this.#next ? " newest" : ""} shown` : "");
  }
}

export function showVerdict(root, event) {
  root.dataset.verdict = event.verdict ?? "";
  root.dataset.kind = event.kind;
  for (const button of root.querySelectorAll("button[data-verdict]")) {
    button.setAttribute("aria-pressed", String(button.dataset.verdict === event.verdict));
  }
}
