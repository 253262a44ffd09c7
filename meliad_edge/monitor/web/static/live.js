// The live picture of one tile: always the newest, one request at a time, none while nobody can see it.

const SHORTEST_MS = 100;
const SLOWEST_MS = 1000;
const PAUSE_MS = 2000;
// More would cost the watch too much of its machine; tiles beyond these take turns.
const TILES_AT_FULL_RATE = 2;

let visibleTiles = 0;

export class LivePicture {
  #address = "";
  #shown = "";
  #isVisible = false;
  #wake = () => {};

  constructor(image, number) {
    this.image = image;
    this.number = number;
    this.fps = 0;
    this.isDelivering = false;
    this.withEvidence = true;
    new IntersectionObserver(([entry]) => {
      if (entry.isIntersecting === this.#isVisible) return;
      this.#isVisible = entry.isIntersecting;
      visibleTiles += this.#isVisible ? 1 : -1;
      this.#wake();
    }).observe(image.parentElement);
    document.addEventListener("visibilitychange", () => this.#wake());
    this.#run();
  }

  setEvidence(withEvidence) {
    this.withEvidence = withEvidence;
    this.#shown = "";
    this.#wake();
  }

  async #run() {
    for (;;) {
      if (document.hidden || !this.#isVisible) {
        await this.#sleep(PAUSE_MS);
        continue;
      }
      const begun = performance.now();
      const isFine = await this.#load().catch(() => false);
      const wanted = Math.min(SLOWEST_MS, Math.max(SHORTEST_MS, 1000 / (this.fps || 1)));
      const interval = isFine && this.isDelivering ? wanted * Math.max(1, visibleTiles / TILES_AT_FULL_RATE) : PAUSE_MS;
      await this.#sleep(Math.max(10, interval - (performance.now() - begun)));
    }
  }

  async #load() {
    const overlay = this.withEvidence ? 1 : 0;
    const response = await fetch(`/api/v1/cameras/${this.number}/snapshot.jpg?overlay=${overlay}`, {
      cache: "no-store",
      headers: this.#shown ? { "If-None-Match": this.#shown } : {},
    });
    if (response.status === 304) return true;
    if (!response.ok) return false;
    const address = URL.createObjectURL(await response.blob());
    const before = this.#address;
    this.image.src = this.#address = address;
    this.#shown = response.headers.get("ETag") ?? "";
    await this.image.decode().catch(() => {});
    if (before) URL.revokeObjectURL(before);
    return true;
  }

  #sleep(ms) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}
