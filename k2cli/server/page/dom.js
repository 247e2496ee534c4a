// Small helpers of the page: making elements, changing text only where it differs, and cleaning and
// formatting values of the server. Text reaches the document as text nodes alone.

// Controls, line separators, and changes of the writing direction, as in k2cli/units.py. What is
// removed there for a terminal shows here as U+FFFD.
const UNSAFE = /[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]/g;
const INVISIBLE = /[\u00ad\u061c\u180e\u200b\u200e\u200f\u2060-\u2064\u206a-\u206f\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]/gu;
const MAX_NAME_LETTERS = 200;
const MAX_CAUSE_LETTERS = 2000;

/** Make text of a model safe to show; line breaks and tabs stay. */
export function shown(text) {
  return text.replaceAll("\r\n", "\n").replace(UNSAFE, "\ufffd");
}

/** Make a name of the server safe to show on one line, cut off where it is too long. */
export function name(value, limit = MAX_NAME_LETTERS) {
  if (typeof value !== "string") return "";
  const cut = value.length > limit ? `${value.slice(0, limit)} …` : value;
  return cut.replace(/[\n\t\r]/g, " ").replace(UNSAFE, "\ufffd").replace(INVISIBLE, "\ufffd");
}

/** Make a sentence of the server safe to show. */
export function sentence(value) {
  return name(value, MAX_CAUSE_LETTERS);
}

/** Return a number of the server, or 0 for anything else. */
export function number(value) {
  return typeof value === "number" && Number.isFinite(value) && value >= 0 ? value : 0;
}

/** Return the objects of a list of the server, at most ``limit`` of them. */
export function objects(value, limit) {
  if (!Array.isArray(value)) return [];
  return value.slice(0, limit).filter((each) => typeof each === "object" && each !== null);
}

/** Return an object of the server; an empty one for anything else. */
export function object(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value) ? value : {};
}

/** Find an element of the page by its id. */
export function byId(id) {
  return document.getElementById(id);
}

/** Make an element with classes and children; a string becomes a text node. */
export function element(tag, classes = "", ...children) {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  made.append(...children);
  return made;
}

/** Set the text of an element, without touching it where it has that text already. */
export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/** Set an attribute, without touching it where it has that value already. */
export function setAttribute(target, attribute, value) {
  if (target.getAttribute(attribute) !== value) target.setAttribute(attribute, value);
}

/** Place a part of a bar: its beginning and its width as shares of the whole. */
export function setSpan(target, from, to) {
  const left = Math.min(1, Math.max(0, from));
  const width = Math.min(1, Math.max(0, to)) - left;
  target.style.left = `${(left * 100).toFixed(2)}%`;
  target.style.width = `${(Math.max(0, width) * 100).toFixed(2)}%`;
}

/** Keep as many children as there are values: make missing ones, remove others, update each. */
export function updateList(parent, values, make, update) {
  while (parent.children.length > values.length) parent.lastElementChild.remove();
  values.forEach((value, index) => {
    if (index === parent.children.length) parent.append(make());
    update(parent.children[index], value);
  });
}

export function count(value) {
  return Math.round(number(value)).toLocaleString("en-US");
}

/** Format bytes in decimal units, as the commands of k2 do. */
export function bytes(value) {
  const size = number(value);
  for (const [unit, unitName, digits] of [[1e12, "TB", 2], [1e9, "GB", 1], [1e6, "MB", 1], [1e3, "kB", 1]]) {
    if (size >= unit) return `${(size / unit).toFixed(digits)} ${unitName}`;
  }
  return `${size} B`;
}

export function rate(value) {
  const perSecond = number(value);
  return perSecond >= 100 ? count(perSecond) : perSecond.toFixed(1);
}

/** Format seconds, as the commands of k2 do. */
export function duration(value) {
  const seconds = number(value);
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${String(Math.floor(seconds % 60)).padStart(2, "0")} s`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return `${hours} h ${String(minutes % 60).padStart(2, "0")} min`;
  return `${Math.floor(hours / 24)} days ${hours % 24} h`;
}

export function share(value) {
  return `${(number(value) * 100).toFixed(0)} %`;
}
