// The stream of updates: notices when it is lost, by error or by silence, and comes back by itself.

import { ask } from "./api.js";

const SILENCE_MS = 15000;
const LONGEST_DELAY_MS = 10000;

export class Connection {
  #source = null;
  #delay = 500;
  #watchdog = 0;
  #lostSince = null;

  // onOpen comes with every new connection, onLost with the time since when there is none, again and again.
  constructor({ onOpen, onMessage, onLost }) {
    this.onOpen = onOpen;
    this.onMessage = onMessage;
    this.onLost = onLost;
  }

  open() {
    this.#source?.close();
    const source = (this.#source = new EventSource("/api/v1/updates"));
    this.#watch();
    source.onopen = () => {
      this.#delay = 500;
      this.#lostSince = null;
      this.onOpen();
    };
    source.onmessage = (message) => {
      this.#watch();
      this.onMessage(JSON.parse(message.data));
    };
    source.onerror = () => this.#retry();
  }

  #watch() {
    clearTimeout(this.#watchdog);
    this.#watchdog = setTimeout(() => this.#retry(), SILENCE_MS);
  }

  #retry() {
    clearTimeout(this.#watchdog);
    this.#source.close();
    this.#lostSince ??= new Date();
    this.onLost(this.#lostSince);
    setTimeout(() => this.#reopen(), this.#delay);
    this.#delay = Math.min(2 * this.#delay, LONGEST_DELAY_MS);
  }

  async #reopen() {
    try {
      await ask("/about"); // An event source does not tell a watch that is gone from one that wants a login.
    } catch {
      this.#retry();
      return;
    }
    this.open();
  }
}
