// Numbers, times and states in words.

export function score(value) {
  return value === null || value === undefined ? "not a number" : value.toFixed(2);
}

export function milliseconds(value) {
  if (value === null) return "–";
  return value < 10 ? `${value.toFixed(1)} ms` : value < 10000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(1)} s`;
}

export function percent(rate) {
  const value = 100 * rate;
  return `${value >= 10 ? value.toFixed(0) : value >= 1 ? value.toFixed(1) : value.toPrecision(2)} %`;
}

export function count(value) {
  return value.toLocaleString("en");
}

export function clockTime(seconds) {
  return new Date(1000 * seconds).toLocaleTimeString(undefined, { hour12: false });
}

export function dateTime(seconds) {
  const date = new Date(1000 * seconds);
  const isToday = date.toDateString() === new Date().toDateString();
  return isToday ? clockTime(seconds) : `${date.toLocaleDateString()} ${clockTime(seconds)}`;
}

export function duration(span) {
  const seconds = Math.max(0, span); // A clock that was set meanwhile is no time before the beginning.
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

const CONDITIONS = {
  lost: "Lost",
  resolution: "Other resolution",
  frozen: "Frozen picture",
  black: "Black picture",
  overexposed: "Overexposed",
  blurred: "Blurred",
  moved: "Camera moved",
};

// Cameras in a state, the most urgent first.
const OVERALL = {
  anomaly: "with an anomaly",
  lost: "lost",
  condition: "to look after",
  connecting: "connecting",
  ended: "ended",
  normal: "normal",
};

export function conditionWord(condition) {
  return CONDITIONS[condition] ?? capitalised(condition);
}

export function driftWord(drift) {
  return drift === "drift" ? "Scores drift" : `Scores drift: ${drift}`;
}

// What matters most comes first; the state names a shape and a colour, the word says the same.
export function cameraState(camera) {
  if (camera.state === "failed") return { state: "lost", word: "Given up" };
  if (camera.state === "ended") return { state: "ended", word: "Ended" };
  if (camera.state === "waiting" || camera.condition === "lost") return { state: "lost", word: "Lost, trying again" };
  if (camera.state === "connecting") return { state: "connecting", word: "Connecting" };
  if (camera.anomaly) return { state: "anomaly", word: "Anomaly" };
  if (camera.condition) return { state: "condition", word: conditionWord(camera.condition) };
  if (camera.frame === null) return { state: "connecting", word: "Waiting for a frame" };
  return { state: "normal", word: "Normal" };
}

export function overallState(cameras) {
  const states = cameras.map((camera) => cameraState(camera).state);
  const amounts = Object.keys(OVERALL)
    .map((state) => ({ state, amount: states.filter((one) => one === state).length }))
    .filter(({ amount }) => amount);
  if (!amounts.length) return { state: "ended", word: "No cameras" };
  if (amounts.length === 1 && amounts[0].state === "normal") return { state: "normal", word: "All normal" };
  return { state: amounts[0].state, word: amounts.map(({ state, amount }) => `${amount} ${OVERALL[state]}`).join(" · ") };
}

export function eventState(event) {
  if (event.kind === "anomaly") return { state: "anomaly", word: event.state === "end" ? "Anomaly" : "Anomaly, going on" };
  const word = event.kind === "drift" ? driftWord(event.condition) : conditionWord(event.condition);
  return { state: event.condition === "lost" ? "lost" : "condition", word: event.state === "end" ? word : `${word}, going on` };
}

// "score 6.43 (threshold 1.58) · 2 regions · like ‘crack’"
export function eventSummary(event) {
  if (event.kind !== "anomaly") return event.detail;
  const parts = [`score ${score(event.score)} (threshold ${score(event.threshold)})`];
  if (event.regions.length) parts.push(event.regions.length === 1 ? "1 region" : `${event.regions.length} regions`);
  const like = event.regions.find((region) => region.resembles);
  if (like) parts.push(`like ‘${like.resembles.defect}’`);
  return parts.join(" · ");
}

function capitalised(word) {
  return word.charAt(0).toUpperCase() + word.slice(1);
}
