// Text of a model as it arrives: paragraphs, headings, lists and blocks of code, built line by line
// from text nodes. A finished line is never touched again, and the line in progress only grows, so
// that the cost of a long answer is that of its length.

import { element, shown } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const MAYBE_FENCE = /^ {0,3}(`{1,}|~{1,})[^`]*$/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+/;
const BULLET = /^(\s*)[-*+](?=\s)/;
const INLINE = /`([^`\n]{1,500})`|\*\*([^*\n]{1,500})\*\*/g;
const MAX_HELD_LETTERS = 80;
const MAX_CELLS = 32;
// A block is laid out as a whole when it grows: many lines, and lines without an end, are divided.
const MAX_BLOCK_LINES = 100;
const MAX_BLOCK_LETTERS = 4000;
// So is a text: blocks are in parts, of which the browser lays out those that are seen.
const MAX_PART_BLOCKS = 40;
const MAX_PART_LINES = 200;

/** A growing text within an element of the page. */
export class TextView {
  #root;
  #part = null;
  #partLines = 0;
  #fence = "";
  #line = "";
  #node = null;
  #block = null;
  #blockLines = 0;
  #blockLetters = 0;
  #code = null;

  constructor(root) {
    this.#root = root;
  }

  /** Add a piece, which may end anywhere. */
  append(piece) {
    const pieces = shown(piece).split("\n");
    pieces.forEach((part, index) => {
      if (index > 0) this.#endLine();
      if (part) this.#grow(part);
    });
  }

  /** Show what is held back at the end of the text. */
  finish() {
    if (this.#line) this.#endLine();
  }

  #grow(part) {
    this.#line += part;
    if (this.#isHeld()) return;
    if (this.#node === null) {
      this.#open(this.#kindOf(this.#line));
      this.#node = document.createTextNode("");
      this.#block.append(this.#node);
      part = this.#line;
    }
    for (let at = 0; at < part.length;) {
      const end = wholeLetters(part, Math.min(at + MAX_BLOCK_LETTERS - this.#blockLetters, part.length));
      if (end <= at) {
        this.#continueLine();
        continue;
      }
      this.#node.appendData(part.slice(at, end));
      this.#blockLetters += end - at;
      at = end;
    }
  }

  /** Hold back the beginning of a line that may open or close a block of code. */
  #isHeld() {
    return this.#node === null && this.#line.length <= MAX_HELD_LETTERS && MAYBE_FENCE.test(this.#line);
  }

  #endLine() {
    const line = this.#line;
    this.#partLines += 1;
    const fence = FENCE.exec(line);
    if (this.#node === null && line && !this.#changesCode(fence)) {
      this.#open(this.#kindOf(line));
      this.#node = document.createTextNode(line);
      this.#block.append(this.#node);
    }
    if (this.#node !== null) {
      // A line that was divided is left as it is.
      if (!this.#code && this.#node.data === line) format(this.#node, line);
      if (this.#block.dataset.kind !== "rows") this.#block.append("\n");
      this.#blockLines += 1;
    } else if (this.#code && !fence) {
      this.#open("code");
      this.#block.append("\n");
      this.#blockLines += 1;
    } else if (!line) {
      this.#block = null;
    }
    this.#line = "";
    this.#node = null;
  }

  /** Open or close a block of code, if the line is its fence; return true if it was one. */
  #changesCode(fence) {
    if (!fence) return false;
    if (!this.#code) {
      this.#fence = fence[1];
      const made = codeBlock(fence[2].trim().slice(0, 40));
      this.#place(made);
      this.#code = made.lastChild;
      this.#block = null;
      return true;
    }
    const closes = fence[1][0] === this.#fence[0] && fence[1].length >= this.#fence.length && !fence[2].trim();
    if (closes) {
      this.#code = null;
      this.#block = null;
    }
    return closes;
  }

  #kindOf(line) {
    if (this.#code) return "code";
    const heading = HEADING.exec(line);
    if (heading) return `heading level-${Math.min(heading[1].length, 4)}`;
    if (line.startsWith("|")) return "rows";
    return ITEM.test(line) ? "item" : "text";
  }

  /** Make the current block one of a kind; lines of text, code and tables share blocks. */
  #open(kind) {
    const shares = kind === "code" || kind === "rows" || kind === "text";
    const full = this.#blockLines >= MAX_BLOCK_LINES || this.#blockLetters >= MAX_BLOCK_LETTERS;
    if (this.#block?.dataset.kind === kind && shares && !full) return;
    this.#block = element("div", `block ${kind}`);
    this.#block.dataset.kind = kind;
    this.#block.dir = kind === "code" || kind === "rows" ? "ltr" : "auto";
    if (this.#code) this.#code.append(this.#block);
    else this.#place(this.#block);
    this.#blockLines = 0;
    this.#blockLetters = 0;
  }

  #place(block) {
    const full = this.#part?.children.length >= MAX_PART_BLOCKS || this.#partLines >= MAX_PART_LINES;
    if (this.#part === null || full) {
      this.#partLines = 0;
      this.#part = element("div", "part");
      this.#root.append(this.#part);
    }
    this.#part.append(block);
  }

  /** Go on with a very long line in another block. */
  #continueLine() {
    this.#blockLetters = MAX_BLOCK_LETTERS;
    this.#open(this.#block.dataset.kind);
    this.#node = document.createTextNode("");
    this.#block.append(this.#node);
  }
}

/** Move a place where a text is cut back by one, if it is in the middle of a character. */
function wholeLetters(text, at) {
  return at < text.length && /[\ud800-\udbff]/.test(text[at - 1] ?? "") ? at - 1 : at;
}

/** Show a whole text without any format. */
export function showPlain(root, text) {
  const view = element("div", "block text");
  view.dir = "auto";
  view.append(shown(text));
  root.append(view);
}

function codeBlock(language) {
  const block = element("pre", "code-block", element("code"));
  block.tabIndex = 0;
  block.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
  if (language) block.dataset.language = language;
  return block;
}

/** Replace a line in a text node by the same with its format: a row, a heading, bold, code. */
function format(node, line) {
  if (line.startsWith("|")) {
    addRow(node, line);
    return;
  }
  const heading = HEADING.exec(line);
  node.replaceWith(...inline(heading ? heading[2] : line.replace(BULLET, "$1•")));
}

/** Add a line as a row to the table before it, or to a new one. */
function addRow(node, line) {
  const cells = line.trim().replace(/\|$/, "").split("|").slice(1, MAX_CELLS + 1).map((cell) => cell.trim());
  const before = node.previousSibling instanceof HTMLTableElement ? node.previousSibling : null;
  if (before !== null && cells.every((cell) => /^:?-+:?$/.test(cell))) {
    node.remove();
    return;
  }
  const table = before ?? element("table");
  const tag = before === null ? "th" : "td";
  table.append(element("tr", "", ...cells.map((cell) => element(tag, "", ...inline(cell)))));
  if (before === null) node.replaceWith(table);
  else node.remove();
}

/** Return the parts of a line: text, and elements for what is bold or code. */
function inline(text) {
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(INLINE)) {
    parts.push(text.slice(end, match.index));
    parts.push(match[1] !== undefined ? element("code", "", match[1]) : element("strong", "", match[2]));
    end = match.index + match[0].length;
  }
  return [...parts, text.slice(end)];
}
