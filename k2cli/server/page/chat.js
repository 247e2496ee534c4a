// The chat: a conversation with the model, streamed, which lives in this page alone. It has no
// settings: the run's defaults hold.

import * as api from "./api.js";
import { byId, count, duration, element, number, object, rate, setText } from "./dom.js";
import { TextView, showPlain } from "./text.js";

const PAINT_MILLISECONDS = 50;
// Painting gets at most a sixth of the time, however long the answer is.
const PAINT_REST = 5;
const MAX_REST_MILLISECONDS = 1000;
const PIECE_LETTERS = 2000;
const MAX_PAINTED_PIECES = 4;
const END_PIXELS = 60;
const MAX_ANSWER_LETTERS = 4 * 2 ** 20;
const REASONS = {
  length: "The answer was cut off: it reached its limit of tokens.",
  tool_calls: "The model called a tool, and this page has none.",
  content_filter: "The answer was withheld.",
};

const turns = [];
let running = null;
let follows = true;
let refused = () => {};

/** Make the controls of the chat work; ``onRefused`` is called if the key is no longer right. */
export function startChat(onRefused) {
  refused = onRefused;
  const prompt = byId("prompt");
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    sendPrompt();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      sendPrompt();
    }
  });
  byId("chat").addEventListener("keydown", (event) => {
    if (event.key === "Escape") stop();
  });
  byId("stop").addEventListener("click", stop);
  byId("new-chat").addEventListener("click", begin);
  byId("to-end").addEventListener("click", scrollToEnd);
  byId("log").addEventListener("scroll", () => {
    follows = isAtEnd();
    byId("to-end").hidden = follows;
  }, { passive: true });
  new ResizeObserver(() => {
    if (follows) scrollToEnd();
    else byId("to-end").hidden = isAtEnd();
  }).observe(byId("turns"));
}

function sendPrompt() {
  const prompt = byId("prompt");
  const text = prompt.value.trim();
  if (!text || running) return;
  prompt.value = "";
  answer(text);
}

function stop() {
  running?.abort();
}

/** Forget the conversation. */
function begin() {
  stop();
  turns.length = 0;
  byId("turns").replaceChildren();
  byId("log-empty").hidden = false;
  byId("new-chat").disabled = true;
  byId("prompt").focus();
}

function messages(question) {
  const told = turns.filter((turn) => turn.text).flatMap((turn) => [
    { role: "user", content: turn.question },
    { role: "assistant", content: turn.text, ...(turn.reasoning ? { reasoning_content: turn.reasoning } : {}) },
  ]);
  return [...told, { role: "user", content: question }];
}

async function answer(question) {
  byId("log-empty").hidden = true;
  const asked = element("article", "turn user", element("h3", "unseen", "You"));
  showPlain(asked, question);
  byId("turns").append(asked);
  const view = new AnswerView();
  scrollToEnd();
  const turn = { question, text: "", reasoning: "" };
  const sent = messages(question);
  turns.push(turn);
  const control = new AbortController();
  setRunning(control);
  announce("The model is answering.");
  try {
    await receive(api.chat(sent, control.signal), turn, view);
    await view.shownWhole();
    view.end();
    announce("The answer is complete.");
  } catch (failure) {
    await view.shownWhole();
    if (control.signal.aborted) {
      view.stopped("Stopped.");
      announce("Stopped.");
    } else {
      if (!(failure instanceof api.Failure)) console.error(failure);
      view.failed(failure, () => again(turn, asked, view));
      if (failure.status === 401) refused(failure);
    }
  } finally {
    if (running === control) setRunning(null);
  }
}

/** Ask the same once more, in place of the turn that failed. */
function again(turn, asked, view) {
  if (running) return;
  turns.splice(turns.indexOf(turn), 1);
  asked.remove();
  view.remove();
  answer(turn.question);
}

async function receive(events, turn, view) {
  for await (const event of events) {
    if (event.k2) view.progress(object(event.k2));
    if (event.usage) view.usage = object(event.usage);
    const choice = Array.isArray(event.choices) ? object(event.choices[0]) : {};
    const delta = object(choice.delta);
    const reasoning = delta.reasoning_content ?? delta.reasoning;
    if (typeof reasoning === "string" && reasoning) {
      turn.reasoning += reasoning;
      view.addReasoning(reasoning);
    }
    if (typeof delta.content === "string" && delta.content) {
      turn.text += delta.content;
      view.addText(delta.content);
    }
    if (typeof choice.finish_reason === "string") view.reason = choice.finish_reason;
    if (turn.text.length + turn.reasoning.length > MAX_ANSWER_LETTERS) {
      throw new api.Failure(0, "The answer is too long for this page.");
    }
  }
}

function setRunning(control) {
  running = control;
  const stopHadFocus = document.activeElement === byId("stop");
  byId("send").hidden = control !== null;
  byId("stop").hidden = control === null;
  byId("new-chat").disabled = turns.length === 0;
  byId("log").setAttribute("aria-busy", String(control !== null));
  if (control === null && stopHadFocus) byId("prompt").focus();
}

function announce(text) {
  setText(byId("announcer"), text);
}

function isAtEnd() {
  const log = byId("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < END_PIXELS;
}

function scrollToEnd() {
  const log = byId("log");
  log.scrollTop = log.scrollHeight;
}

/** One answer on the page, as it arrives. */
class AnswerView {
  usage = {};
  reason = "";
  #turn;
  #reasoning;
  #summary;
  #line;
  #pending = [];
  #views;
  #timer = 0;
  #began = performance.now();
  #firstAt = 0;
  #reasonedMilliseconds = 0;
  #restMilliseconds = PAINT_MILLISECONDS;

  constructor() {
    this.#summary = element("summary", "", "Reasoning …");
    const thoughts = element("div", "thoughts");
    this.#reasoning = element("details", "reasoning", this.#summary, thoughts);
    this.#reasoning.hidden = true;
    const text = element("div", "text");
    this.#line = element("p", "answer-line quiet", "Sending …");
    this.#turn = element(
      "article", "turn model working", element("h3", "unseen", "Model"), this.#reasoning, text, this.#line);
    this.#views = { reasoning: new TextView(thoughts), text: new TextView(text) };
    byId("turns").append(this.#turn);
  }

  remove() {
    this.#turn.remove();
  }

  addReasoning(piece) {
    this.#reasoning.hidden = false;
    this.#add(this.#views.reasoning, piece);
    this.#reasonedMilliseconds = performance.now() - this.#began;
  }

  addText(piece) {
    this.#add(this.#views.text, piece);
  }

  /** Show how far the request is: in the queue, in the prompt, or in the answer. */
  progress(k2) {
    const tokens = number(k2.completion_tokens);
    if (number(k2.queue_position)) {
      setText(this.#line, `Waiting, number ${count(k2.queue_position)} in the queue`);
    } else if (number(k2.prefill_total) && !tokens) {
      const whole = `Reading the prompt, ${count(k2.prefill_done)} of ${count(k2.prefill_total)} tokens`;
      setText(this.#line, whole);
    } else if (tokens) {
      this.#firstAt ||= performance.now();
      const seconds = (performance.now() - this.#firstAt) / 1000;
      const speed = tokens > 1 && seconds > 0.5 ? ` · ${rate((tokens - 1) / seconds)} per second` : "";
      setText(this.#line, `${count(tokens)} tokens${speed}`);
    }
  }

  end() {
    this.#finish();
    const used = this.usage;
    const tokens = number(used.completion_tokens);
    const prompt = number(used.prompt_tokens);
    const cached = number(object(used.prompt_tokens_details).cached_tokens);
    const reasoning = number(object(used.completion_tokens_details).reasoning_tokens);
    const timings = object(used.timings);
    const seconds = number(timings.decode_seconds);
    const parts = [`${count(tokens)} tokens${reasoning ? ` (${count(reasoning)} of reasoning)` : ""}`];
    if (seconds && tokens > 1) parts.push(`${rate((tokens - 1) / seconds)} per second`);
    if (prompt) parts.push(`prompt ${count(prompt)}${cached ? `, ${count(cached)} from the cache` : ""}`);
    const first = number(timings.queue_seconds) + number(timings.prefill_seconds);
    if (first) parts.push(`first after ${duration(first)}`);
    setText(this.#line, parts.join(" · "));
    if (REASONS[this.reason]) this.#note(REASONS[this.reason], "note");
  }

  stopped(words) {
    this.#finish();
    const told = this.#firstAt ? `${words} ${this.#line.textContent}` : words;
    setText(this.#line, told);
  }

  /** Show why there is no whole answer, with a button that asks again. */
  failed(failure, again) {
    this.#finish();
    this.#line.remove();
    const words = failure instanceof api.Failure ? failure.message : "The page itself failed; reload it.";
    const problem = this.#note(words, "problem");
    problem.setAttribute("role", "alert");
    const button = element("button", "plain", "Ask again");
    button.type = "button";
    button.addEventListener("click", again);
    problem.append(" ", button);
    countDown(button, failure.retrySeconds ?? 0);
  }

  /** Wait until everything that has arrived is on the page. */
  async shownWhole() {
    while (this.#pending.length) {
      await new Promise((resolve) => { setTimeout(resolve, this.#restMilliseconds); });
      this.#paint();
    }
  }

  #add(view, text) {
    for (let at = 0; at < text.length; at += PIECE_LETTERS) {
      const last = this.#pending.at(-1);
      const piece = text.slice(at, at + PIECE_LETTERS);
      if (last?.[0] === view && last[1].length + piece.length <= PIECE_LETTERS) last[1] += piece;
      else this.#pending.push([view, piece]);
    }
    this.#paintSoon();
  }

  #paintSoon() {
    if (!this.#timer) this.#timer = setTimeout(() => this.#paint(), this.#restMilliseconds);
  }

  #paint() {
    const began = performance.now();
    clearTimeout(this.#timer);
    this.#timer = 0;
    for (const [view, piece] of this.#pending.splice(0, MAX_PAINTED_PIECES)) view.append(piece);
    setText(this.#summary, `Reasoning, ${duration(this.#reasonedMilliseconds / 1000)}`);
    if (follows) scrollToEnd(); // which lays out the page, so that this counts as painting
    const rest = PAINT_REST * (performance.now() - began);
    this.#restMilliseconds = Math.min(Math.max(rest, PAINT_MILLISECONDS), MAX_REST_MILLISECONDS);
    if (this.#pending.length) this.#paintSoon();
  }

  #finish() {
    this.#paint();
    this.#views.reasoning.finish();
    this.#views.text.finish();
    this.#turn.classList.remove("working");
  }

  #note(words, kind) {
    const note = element("p", kind, words);
    this.#turn.append(note);
    return note;
  }
}

/** Disable a button until the run wants to be asked again. */
function countDown(button, seconds) {
  const until = Date.now() + seconds * 1000;
  const step = () => {
    const left = Math.ceil((until - Date.now()) / 1000);
    button.disabled = left > 0;
    setText(button, left > 0 ? `Ask again in ${duration(left).replace(".0 s", " s")}` : "Ask again");
    if (left > 0 && button.isConnected) setTimeout(step, 1000);
  };
  step();
}
