// The ranks of a run: what each one does, and its memory as bars against the plan.

import {
  bytes, count, duration, element, name, number, object, setAttribute, setSpan, setText, updateList,
} from "./dom.js";

const PLANNED = ["weights", "cache", "activation", "overhead"];
const PLANNED_BYTES = {
  weights: "weights_bytes", cache: "kv_cache_bytes", activation: "activation_bytes", overhead: "overhead_bytes",
};
const PHASES = {
  initialising: "starting", loading: "loading", checking: "self-test", "warming up": "warming up", idle: "idle",
  busy: "computing", waiting: "waiting for another rank", ending: "ending",
  "computing a new shape": "computing a new shape",
};
// Ranks report each second; idle ones make progress, too.
const SILENT_SECONDS = 10;
// A bar ends at the limit, or earlier where the plan is far below it.
const MOST_OF_PLAN = 1.25;

/** Show the ranks in a list. */
export function showRanks(list, ranks) {
  updateList(list, ranks, makeRank, updateRank);
}

function makeRank() {
  const bar = element("div", "bar",
    ...["used", "kept", "program", "planned", "peak"].map((part) => element("i", part)));
  bar.setAttribute("role", "meter");
  const plan = element("div", "plan-bar", ...PLANNED.map((part) => element("i", part)));
  plan.setAttribute("aria-hidden", "true");
  return element("li", "rank",
    element("p", "rank-title", element("strong", "rank-name"), element("bdi", "node"), element("span", "quiet what"),
      element("span", "pill phase")),
    bar, plan,
    element("p", "rank-memory", element("span", "now"), element("span", "quiet plan-text")));
}

function updateRank(item, rank) {
  const part = (selector) => item.querySelector(selector);
  const memory = object(rank.memory);
  const label = `Rank ${count(rank.rank)}`;
  setText(part(".rank-name"), label);
  setText(part(".node"), name(rank.node));
  setText(part(".what"), described(rank));
  updatePhase(part(".phase"), rank);
  const figures = figuresOf(memory, rank.device);
  updateBar(part(".bar"), label, figures);
  let from = 0;
  for (const planned of PLANNED) {
    const size = number(memory[PLANNED_BYTES[planned]]);
    setSpan(part(`.plan-bar .${planned}`), from / figures.scale, (from + size) / figures.scale);
    from += size;
  }
  item.classList.toggle("over", figures.over);
  setText(part(".now"), nowText(rank, memory, figures));
  setText(part(".plan-text"), planText(memory, figures));
}

function figuresOf(memory, device) {
  const used = number(memory.used_bytes);
  const kept = number(memory.kept_bytes);
  const peak = number(memory.peak_bytes);
  const planned = number(memory.planned_bytes);
  const limit = number(memory.limit_bytes);
  // On a CPU the process contains everything; elsewhere the arrays are beside it.
  const program = device === "cpu" ? Math.max(0, number(memory.resident_bytes) - used - kept) : 0;
  const shownLimit = planned ? Math.min(limit || planned, MOST_OF_PLAN * planned) : limit;
  const scale = Math.max(shownLimit, planned, used + kept + program, peak, 1);
  return { used, kept, program, peak, planned, limit, scale, over: planned > 0 && peak + kept > planned };
}

function updateBar(bar, label, figures) {
  const { used, kept, program, peak, planned, scale } = figures;
  const span = (kind, from, to) => setSpan(bar.querySelector(`.${kind}`), from / scale, to / scale);
  span("planned", 0, planned);
  span("used", 0, used);
  span("kept", used, used + kept);
  span("program", used + kept, used + kept + program);
  span("peak", peak, peak);
  bar.querySelector(".peak").hidden = peak <= used;
  setAttribute(bar, "aria-label", `Memory of ${label.toLowerCase()}`);
  setAttribute(bar, "aria-valuemin", "0");
  setAttribute(bar, "aria-valuemax", String(Math.round(scale)));
  setAttribute(bar, "aria-valuenow", String(Math.round(used + kept)));
  setAttribute(bar, "aria-valuetext", `${bytes(used)} used and ${bytes(kept)} kept, ${bytes(planned)} planned`);
}

function described(rank) {
  const layers = Array.isArray(rank.layers) ? rank.layers : [];
  const device = { metal: "Metal", cuda: "CUDA", cpu: "CPU" }[rank.device] ?? name(rank.device);
  const parts = [name(rank.gpu) || device];
  if (layers.length === 2) parts.push(`layers ${count(layers[0])} to ${count(Math.max(0, number(layers[1]) - 1))}`);
  return parts.filter(Boolean).join(" · ");
}

function updatePhase(pill, rank) {
  const phase = name(rank.phase);
  const age = number(rank.progress_age_seconds);
  const silent = age >= SILENT_SECONDS;
  const words = PHASES[phase] ?? (phase || "not reported yet");
  setText(pill, silent ? `${words}, no progress for ${duration(age)}` : words);
  const kinds = { busy: "active", "computing a new shape": "active", idle: "calm", waiting: "calm" };
  const kind = silent ? "warn" : kinds[phase] ?? "";
  setAttribute(pill, "class", `pill phase ${kind}`.trim());
}

function nowText(rank, memory, figures) {
  const loading = number(rank.load_bytes);
  const loaded = number(rank.loaded_bytes);
  if (loading > 0 && loaded < loading) return `${bytes(loaded)} of ${bytes(loading)} of weights loaded`;
  const parts = [`${bytes(figures.used)} used`];
  if (figures.kept) parts.push(`${bytes(figures.kept)} kept for reuse`);
  if (figures.peak) parts.push(`peak ${bytes(figures.peak)}`);
  const resident = number(memory.resident_bytes);
  if (resident) parts.push(`process ${bytes(resident)}`);
  return parts.join(" · ");
}

function planText(memory, figures) {
  if (!figures.planned) return "no plan";
  const limit = figures.limit ? `, limit ${bytes(figures.limit)}` : "";
  return `${figures.over ? "over the plan of" : "plan"} ${bytes(figures.planned)}${limit}`;
}
