// The score history of one camera as SVG, with its meaning in words.

import { setText, svg } from "./dom.js";
import { clockTime, score } from "./words.js";

const SHOWN_S = 600;
const HEIGHT = 84;
const GAP_S = 15;
const MARGIN = { top: 8, bottom: 6 };

export class History {
  #points = []; // [time_s, score, threshold], one per second, oldest first
  #width = 0;

  constructor(root, caption) {
    this.root = root;
    this.caption = caption;
    this.area = svg("path", { class: "area" });
    this.line = svg("path", { class: "line" });
    this.limit = svg("path", { class: "limit" });
    this.marks = svg("path", { class: "marks" });
    root.append(this.area, this.line, this.limit, this.marks);
    new ResizeObserver(([entry]) => {
      this.#width = Math.round(entry.contentRect.width);
      root.setAttribute("viewBox", `0 0 ${this.#width} ${HEIGHT}`);
      this.draw(this.nowS);
    }).observe(root);
  }

  replace(points) {
    this.#points = points.map((point) => [point.time_s, point.score, point.threshold]);
  }

  add(points) {
    for (const point of points) {
      while (this.#points.length && Math.floor(this.#points.at(-1)[0]) >= Math.floor(point[0])) this.#points.pop();
      this.#points.push(point);
    }
    while (this.#points.length && this.#points[0][0] < this.#points.at(-1)[0] - SHOWN_S) this.#points.shift();
  }

  draw(nowS) {
    this.nowS = nowS;
    const points = this.#points.filter(([timeS]) => timeS > nowS - SHOWN_S);
    if (!this.#width || !points.length) {
      for (const path of [this.area, this.line, this.limit, this.marks]) path.setAttribute("d", "");
      setText(this.caption, "No score in the last 10 minutes");
      this.root.setAttribute("aria-label", "No score in the last 10 minutes");
      return;
    }
    const values = points.flatMap(([, value, limit]) => [value, limit]).filter((value) => value !== null);
    const low = Math.min(...values);
    const high = Math.max(...values);
    const span = high - low || 1;
    const x = (timeS) => (this.#width * (1 - (nowS - timeS) / SHOWN_S)).toFixed(1);
    const y = (value) => {
      const share = value === null ? 1 : (value - low) / span; // What is not a number is drawn as the highest.
      return (HEIGHT - MARGIN.bottom - share * (HEIGHT - MARGIN.top - MARGIN.bottom)).toFixed(1);
    };
    let line = "";
    let area = "";
    let limit = "";
    let marks = "";
    let before = null;
    for (const [timeS, value, threshold] of points) {
      const place = `${x(timeS)} ${y(value)}`;
      const isGap = before === null || timeS - before > GAP_S;
      if (isGap) {
        if (before !== null) area += `V${HEIGHT}Z`;
        line += `M${place}h.01`; // A point of its own is a dot.
        area += `M${x(timeS)} ${HEIGHT}L${place}`;
      } else {
        line += `L${place}`;
        area += `L${place}`;
      }
      limit += `${limit ? "L" : "M"}${x(timeS)} ${y(threshold)}`;
      if (value === null || value >= threshold) marks += `M${x(timeS)} ${y(value) - 3}l3.500 6h-7z`;
      before = timeS;
    }
    this.line.setAttribute("d", line);
    this.area.setAttribute("d", `${area}V${HEIGHT}Z`);
    this.limit.setAttribute("d", `${limit}H${this.#width}`);
    this.marks.setAttribute("d", marks);
    this.#describe(points);
  }

  #describe(points) {
    const [, , threshold] = points.at(-1);
    const highest = points.reduce((best, point) => (point[1] === null || point[1] > best[1] ? point : best));
    const above = points.filter(([, value, limit]) => value === null || value >= limit).length;
    const alarms = above === 0 ? "never reached" : `reached in ${above} s`;
    const words = `Last 10 min: highest ${score(highest[1])} at ${clockTime(highest[0])}, threshold ${score(threshold)} ${alarms}`;
    setText(this.caption, words);
    if (this.root.getAttribute("aria-label") !== words) this.root.setAttribute("aria-label", words);
  }
}
