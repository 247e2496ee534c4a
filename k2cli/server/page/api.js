// Requests to the run, and its failures in words. The key is a variable of this module and nothing
// else: it is sent in a header, and is gone with the page.

import { object, sentence } from "./dom.js";

const STATUS_SECONDS = 10;
const MAX_DOCUMENT_BYTES = 4 * 2 ** 20;
const MAX_EVENT_LETTERS = 8 * 2 ** 20;

let key = "";

/** Keep a key for the requests to come; an empty one is none. */
export function useKey(entered) {
  key = entered.trim();
}

export function hasKey() {
  return key !== "";
}

/** A request that failed. ``status`` is 0 if there was no answer; ``retrySeconds`` may be 0. */
export class Failure extends Error {
  constructor(status, message, { code = "", retrySeconds = 0 } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retrySeconds = retrySeconds;
  }
}

/** Return the status of the run. */
export async function status() {
  return documentAt("v1/status");
}

/** Return the name of the served model. */
export async function modelName() {
  const models = await documentAt("v1/models");
  const first = Array.isArray(models.data) ? object(models.data[0]) : {};
  return typeof first.id === "string" ? first.id : "";
}

/** Answer a conversation; yield the objects of the stream up to its end. */
export async function* chat(messages, signal) {
  const body = {
    messages,
    stream: true,
    stream_options: { include_usage: true, include_progress: true },
  };
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  for await (const line of lines(response)) {
    if (!line.startsWith("data:")) continue;
    const data = line.slice(5).trim();
    if (data === "[DONE]") return;
    const event = parsed(data);
    if (event.error !== undefined) throw failureOf(0, event, 0);
    yield event;
  }
  throw lost("The connection was closed before the answer was complete.");
}

function lost(message) {
  return new Failure(0, message, { code: "connection_lost" });
}

/** Return the value of the header: the key's bytes, each as one letter, as HTTP has them. */
function authorization() {
  const bytes = new TextEncoder().encode(key);
  return `Bearer ${Array.from(bytes, (byte) => String.fromCharCode(byte)).join("")}`;
}

async function ask(path, options) {
  const headers = { ...options.headers, ...(key ? { Authorization: authorization() } : {}) };
  let response;
  try {
    // No cookies, no redirects: k2 has neither.
    response = await fetch(path, {
      ...options, headers, cache: "no-store", credentials: "omit", redirect: "error",
    });
  } catch (error) {
    if (options.signal?.aborted && options.signal.reason?.name !== "TimeoutError") throw error;
    throw lost("The run does not answer. It may have ended (see k2 ps), or the network is down.");
  }
  if (!response.ok) {
    const seconds = Number.parseInt(response.headers.get("retry-after") ?? "", 10);
    let found = {};
    try {
      found = parsed(await whole(response));
    } catch { /* the status says enough */ }
    throw failureOf(response.status, found, seconds > 0 ? Math.min(seconds, 86400) : 0);
  }
  return response;
}

async function documentAt(path) {
  const signal = AbortSignal.timeout(STATUS_SECONDS * 1000);
  return parsed(await whole(await ask(path, { signal })));
}

function parsed(text) {
  try {
    return object(JSON.parse(text));
  } catch {
    throw new Failure(0, "The server does not answer as k2 does. Another program may use this address.");
  }
}

async function whole(response) {
  const decoder = new TextDecoder();
  let text = "";
  for await (const part of parts(response)) {
    text += decoder.decode(part, { stream: true });
    if (text.length > MAX_DOCUMENT_BYTES) throw new Failure(0, "The answer of the server is too long.");
  }
  return text + decoder.decode();
}

async function* parts(response) {
  const reader = response.body.getReader();
  try {
    for (;;) {
      let read;
      try {
        read = await reader.read();
      } catch (error) {
        if (error?.name === "AbortError") throw error;
        throw lost("The connection was lost before the answer was complete.");
      }
      if (read.done) return;
      yield read.value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function* lines(response) {
  const decoder = new TextDecoder();
  let pending = [];
  let letters = 0;
  for await (const part of parts(response)) {
    const pieces = decoder.decode(part, { stream: true }).split("\n");
    for (const piece of pieces.slice(0, -1)) {
      yield pending.join("") + piece;
      pending = [];
      letters = 0;
    }
    const rest = pieces[pieces.length - 1];
    pending.push(rest);
    letters += rest.length;
    if (letters > MAX_EVENT_LETTERS) throw new Failure(0, "The server sends a line that is too long.");
  }
}

function failureOf(httpStatus, body, retrySeconds) {
  const error = object(body.error);
  const said = sentence(error.message);
  const code = typeof error.code === "string" ? error.code : "";
  return new Failure(httpStatus, inWords(httpStatus, code, said), { code, retrySeconds });
}

function inWords(httpStatus, code, said) {
  const because = said ? `: ${said}` : "";
  if (code === "context_length_exceeded") {
    return `The conversation is too long for the context of this run. Begin a new one${because}`;
  }
  switch (httpStatus) {
    case 0: return `The answer broke off${because || ", and the server does not say why"}`;
    case 401: return said ? said[0].toUpperCase() + said.slice(1) : "The run does not accept this key";
    case 403: return `The run does not allow this${because}`;
    case 413: return `The conversation is too large${because}`;
    case 429: return `The run has too much to do, or the key is at its limit${because}`;
    case 503: return `No run is ready${because}`;
    default:
      if (httpStatus >= 500) return `The run failed (HTTP ${httpStatus})${because}`;
      return `The run refuses the request (HTTP ${httpStatus})${because}`;
  }
}
