// The status of the run: asked for once a second while the page is seen, and shown.

import * as api from "./api.js";
import {
  byId, count, duration, element, name, number, object, objects, rate, sentence, setAttribute, setText, share,
} from "./dom.js";
import { showRanks } from "./ranks.js";
import { showRequests } from "./requests.js";

const POLL_MILLISECONDS = 1000;
const MAX_WAIT_MILLISECONDS = 10_000;
const HISTORY = 120;
const MAX_RANKS = 256;
const MAX_REQUESTS = 100;
const SVG = "http://www.w3.org/2000/svg";
const STATES = { starting: "Starting", ready: "Ready", restarting: "Restarting", stopping: "Stopping" };
const RESULTS = {
  completed: "completed", client_gone: "client gone", invalid: "invalid", unauthorized: "unauthorized",
  refused: "refused", failed: "failed",
};

const history = { run: "", generated: [], computed: [] };
const tiles = {};
let answeredAt = 0;
let waitMilliseconds = POLL_MILLISECONDS;
let timer = 0;
let watching = false;
let refused = () => {};

/** Show a status, and go on asking for it; ``onRefused`` is called if the key is no longer right. */
export function watch(first, onRefused) {
  refused = onRefused;
  if (!answeredAt) {
    makeTiles();
    document.addEventListener("visibilitychange", askSoon);
  }
  show(first);
  watching = true;
  waitMilliseconds = POLL_MILLISECONDS;
  askSoon();
}

/** Ask again after a while, unless nobody looks; at once where the page was hidden meanwhile. */
function askSoon() {
  if (document.hidden || !watching || timer) return;
  timer = setTimeout(ask, Date.now() - answeredAt > MAX_WAIT_MILLISECONDS ? 0 : waitMilliseconds);
}

async function ask() {
  try {
    show(await api.status());
    waitMilliseconds = POLL_MILLISECONDS;
  } catch (failure) {
    if (failure.status === 401 || failure.status === 403) {
      watching = false;
      refused(failure);
    } else {
      showLost(failure);
      waitMilliseconds = Math.min(waitMilliseconds * 2, MAX_WAIT_MILLISECONDS);
    }
  }
  timer = 0;
  if (watching && !document.hidden) timer = setTimeout(ask, waitMilliseconds);
}

function makeTiles() {
  const made = [
    ["generated", "Generating", "tokens per second"], ["computed", "Reading prompts", "tokens per second"],
    ["running", "In progress"], ["queue", "Waiting"], ["cache", "Prefix cache"], ["first", "First token"],
  ];
  byId("tiles").replaceChildren(...made.map(([id, label, unit]) => {
    const value = element("span", "value", "–");
    const note = element("span", "note", unit ?? "");
    const tile = element("div", `tile ${id}`, element("span", "label", label), value, note);
    tiles[id] = { value, note, line: unit ? tile.appendChild(makeLine()) : null };
    return tile;
  }));
}

function makeLine() {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${HISTORY - 1} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  svg.append(document.createElementNS(SVG, "polygon"), document.createElementNS(SVG, "polyline"));
  return svg;
}

function drawLine(svg, values) {
  const most = Math.max(...values, 1);
  const first = HISTORY - values.length;
  const points = values.map((value, index) => `${first + index},${(96 - (value / most) * 92).toFixed(1)}`);
  svg.lastChild.setAttribute("points", points.join(" "));
  svg.firstChild.setAttribute("points", [`${first},100`, ...points, `${HISTORY - 1},100`].join(" "));
}

function show(status) {
  answeredAt = Date.now();
  byId("status").classList.remove("stale");
  const state = name(status.state);
  const model = object(status.model);
  setText(byId("model"), name(model.name) || "model");
  document.title = `${name(model.name, 60) || "model"} · k2`;
  const pill = byId("state");
  pill.hidden = false;
  setText(pill, STATES[state] ?? state);
  setAttribute(pill, "class", `pill ${state === "ready" ? "good" : "warn"}`);
  const attempt = number(status.attempt) > 1 ? ` · start ${count(status.attempt)}` : "";
  setText(byId("since"), `up ${duration(status.uptime_seconds).replace(/\.\d s$/, " s")}${attempt}`);
  showBanner(state, status.cause);
  showFigures(status);
  showRanks(byId("ranks"), objects(status.ranks, MAX_RANKS));
  showListed(object(status.requests));
  showTotals(status);
}

function showBanner(state, cause) {
  const banner = byId("banner");
  const because = sentence(cause);
  banner.hidden = state === "ready";
  const words = {
    starting: "The run is starting; answers come once it is ready.",
    restarting: "The run failed and is starting again.",
    stopping: "The run is stopping, and takes no more requests.",
  };
  if (!banner.hidden) setText(banner, [words[state] ?? "The run is not ready.", because].filter(Boolean).join(" "));
}

function showLost(failure) {
  byId("status").classList.add("stale");
  const pill = byId("state");
  setText(pill, "No answer");
  setAttribute(pill, "class", "pill bad");
  const banner = byId("banner");
  banner.hidden = false;
  const since = new Date(answeredAt).toLocaleTimeString("en-GB");
  setText(banner, `${failure.message} The figures are from ${since}; the page keeps asking.`);
}

function showFigures(status) {
  const throughput = object(status.throughput);
  const requests = object(status.requests);
  const totals = object(status.totals);
  const run = name(status.run_id);
  if (run !== history.run) Object.assign(history, { run, generated: [], computed: [] });
  for (const [id, member] of [
    ["generated", "completion_tokens_per_second"], ["computed", "prompt_tokens_per_second"],
  ]) {
    const value = number(throughput[member]);
    history[id] = [...history[id], value].slice(-HISTORY);
    setText(tiles[id].value, rate(value));
    drawLine(tiles[id].line, history[id]);
  }
  const working = ["decode", "prefill", "reading"].filter((stage) => number(requests[stage]));
  setText(tiles.running.value, count(working.reduce((sum, stage) => sum + number(requests[stage]), 0)));
  const stages = { decode: "answering", prefill: "prompt", reading: "arriving" };
  setText(tiles.running.note, working.map((stage) => `${count(requests[stage])} ${stages[stage]}`).join(", ") || "idle");
  setText(tiles.queue.value, count(requests.queued));
  const waits = number(requests.queued) ? `oldest ${duration(requests.oldest_wait_seconds)}` : "none waiting";
  setText(tiles.queue.note, waits);
  const hit = totals.cache_hit_share;
  setText(tiles.cache.value, typeof hit === "number" ? share(hit) : "–");
  setText(tiles.cache.note, "of prompt tokens reused");
  const first = object(totals.first_token);
  setText(tiles.first.value, number(first.count) ? duration(first.mean_seconds) : "–");
  const between = object(totals.inter_token);
  setText(tiles.first.note, number(between.count) ? `mean; ${duration(between.mean_seconds)} between tokens` : "mean time");
}

function showListed(requests) {
  const listed = objects(requests.listed, MAX_REQUESTS);
  const all = ["reading", "queued", "prefill", "decode"].reduce((sum, stage) => sum + number(requests[stage]), 0);
  byId("requests").hidden = listed.length === 0;
  byId("requests-none").hidden = listed.length > 0;
  setText(byId("requests-more"), all > listed.length ? `${count(listed.length)} of ${count(all)}` : "");
  showRequests(byId("request-rows"), listed);
}

function showTotals(status) {
  const totals = object(status.totals);
  const results = object(totals.requests);
  const link = object(status.link);
  const model = object(status.model);
  const ended = Object.entries(RESULTS)
    .filter(([result]) => number(results[result]))
    .map(([result, word]) => `${count(results[result])} ${word}`);
  const cached = number(totals.cached_tokens);
  const reasoning = number(totals.reasoning_tokens);
  const how = [link.transport, link.strategy].map((each) => name(each)).filter(Boolean).join(", ");
  const interfaces = Array.isArray(link.interfaces) ? link.interfaces.slice(0, 16).map((each) => name(each)) : [];
  const facts = [
    ["Requests", ended.join(", ") || "none yet"],
    ["Prompts", `${count(totals.prompt_tokens)} tokens${cached ? `, ${count(cached)} from the cache` : ""}`],
    ["Answers", `${count(totals.completion_tokens)} tokens${reasoning ? `, ${count(reasoning)} of reasoning` : ""}`],
    ["Queue", number(object(totals.queue).count) ? `${duration(totals.queue.mean_seconds)} on average` : "no wait yet"],
    ["Context", `${count(model.context_length)} tokens`],
    ["Ranks", [how, sentence(link.reason), ...interfaces].filter(Boolean).join(" · ") || "–"],
    ["Run", [name(status.run_id), `k2 ${name(status.version, 40)}`].filter(Boolean).join(" · ")],
  ];
  const list = byId("totals");
  if (list.children.length !== facts.length) {
    list.replaceChildren(...facts.map(([term]) => element("div", "", element("dt", "", term), element("dd"))));
  }
  facts.forEach(([, text], index) => setText(list.children[index].lastChild, text));
}
