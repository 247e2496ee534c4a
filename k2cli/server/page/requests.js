// The requests in progress, each with how far it is.

import { count, duration, element, name, number, rate, setAttribute, setSpan, setText, updateList } from "./dom.js";

const DIALECTS = {
  chat: "Chat", completions: "Completions", responses: "Responses", messages: "Messages",
  count_tokens: "Count tokens", tokenize: "Tokenize",
};

/** Show the requests in the body of a table. */
export function showRequests(body, requests) {
  updateList(body, requests, makeRow, updateRow);
}

function makeRow() {
  const bar = element("div", "request-bar", element("i", "cached"), element("i", "done"));
  bar.setAttribute("role", "progressbar");
  return element("tr", "",
    element("th", "request-name", element("span", "request-id"), element("bdi", "request-key quiet")),
    element("td", "progress-cell", bar, element("span", "progress-text")),
    element("td", "figure tokens"), element("td", "figure speed"), element("td", "figure age"));
}

function updateRow(row, request) {
  const part = (selector) => row.querySelector(selector);
  setAttribute(part("th"), "scope", "row");
  setText(part(".request-id"), name(request.id, 12));
  const whose = [name(request.key, 40), DIALECTS[request.dialect] ?? name(request.dialect, 20)];
  setText(part(".request-key"), whose.filter(Boolean).join(" · "));
  const total = number(request.prompt_tokens);
  const done = Math.min(number(request.prompt_tokens_done), total);
  const cached = Math.min(number(request.cached_tokens), done);
  const whole = total || 1;
  setSpan(part(".cached"), 0, cached / whole);
  setSpan(part(".done"), cached / whole, done / whole);
  const bar = part(".request-bar");
  const text = progressText(request, done, total, cached);
  setAttribute(bar, "aria-label", "Prompt");
  setAttribute(bar, "aria-valuemax", String(whole));
  setAttribute(bar, "aria-valuenow", String(done));
  setAttribute(bar, "aria-valuetext", text);
  setAttribute(row, "data-state", name(request.state, 20));
  setText(part(".progress-text"), text);
  setText(part(".tokens"), count(request.generated_tokens));
  setText(part(".speed"), request.tokens_per_second === null ? "–" : rate(request.tokens_per_second));
  setText(part(".age"), duration(request.age_seconds));
}

function progressText(request, done, total, cached) {
  const fromCache = cached ? `, ${count(cached)} from the cache` : "";
  switch (request.state) {
    case "reading": return "reading the request";
    case "queued": {
      const position = number(request.queue_position);
      return position ? `waiting, number ${count(position)}` : "waiting";
    }
    case "prefill": return `prompt ${count(done)} of ${count(total)}${fromCache}`;
    case "decode": return `answering, prompt ${count(total)}${fromCache}`;
    default: return name(request.state, 40);
  }
}
