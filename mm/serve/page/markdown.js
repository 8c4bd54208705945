// Markdown of an answer -> blocks -> elements. HTML in it is text like all other; inline.js draws what is in a line.

import { copyButton, element } from "./dom.js";
import { inline } from "./inline.js";

const DEPTH = 8; // lists in lists, quotes in quotes; what is deeper is drawn as plain text
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}>[ ]?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:( {1,4})(?=\S)|[ \t]*$)/;
const DELIMITERS = /^[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

// Control characters, and directions that letters do not have of themselves: text that reads otherwise than it is spelled.
const UNSEEN = /[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]/g;

const drawn = new WeakMap(); // place -> the blocks that it shows

export const printable = (text) => text.replace(/\r\n?/g, "\n").replace(UNSEEN, "");

/** Text -> [{kind, source, ...}], its blocks in order. */
export function parse(text) {
  return blocks(printable(text).replace(/\t/g, "    ").split("\n"), 0);
}

/** Draws `text` into `place`. Blocks that are as they were keep their elements, so that a selection survives. */
export function render(text, place) {
  const before = drawn.get(place) ?? [];
  const found = parse(text);
  let same = 0;
  while (same < before.length && before[same].source === found[same]?.source && before[same].kind === found[same].kind) same++;
  while (place.childNodes.length > same) place.lastChild.remove();
  place.append(...found.slice(same).map(draw));
  drawn.set(place, found);
}

function blocks(lines, depth) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const read = (depth < DEPTH && structure(lines, at, depth)) || paragraph(lines, at);
    found.push({ ...read.block, source: lines.slice(at, read.end).join("\n") });
    at = read.end;
  }
  return found;
}

/** {block, end} of what starts at a line that is more than the start of a paragraph; null otherwise. */
function structure(lines, at, depth) {
  const line = lines[at];
  let match;
  if ((match = FENCE.exec(line))) return fence(lines, at, match);
  if ((match = HEADING.exec(line))) {
    return { block: { kind: "heading", level: match[1].length, text: match[2].trimEnd().replace(/ #+$/, "") }, end: at + 1 };
  }
  if (RULE.test(line)) return { block: { kind: "rule" }, end: at + 1 };
  if (QUOTE.test(line)) return quote(lines, at, depth);
  if (ITEM.test(line)) return list(lines, at, depth);
  if (line.includes("|") && DELIMITERS.test(lines[at + 1] ?? "")) return table(lines, at);
  return null;
}

const opens = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !opens(lines[end])) end++;
  return { block: { kind: "paragraph", text: lines.slice(at, end).map((line) => line.trim()).join("\n") }, end };
}

/** A fence that does not close, as while it is being written, holds all that follows. */
function fence(lines, at, [, marks, language]) {
  const closes = new RegExp(`^ {0,3}\\${marks[0]}{${marks.length},}[ ]*$`);
  let end = at + 1;
  while (end < lines.length && !closes.test(lines[end])) end++;
  const block = { kind: "code", language: language.trim().split(" ")[0], text: lines.slice(at + 1, end).join("\n") };
  return { block, end: Math.min(end + 1, lines.length) };
}

function quote(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && (QUOTE.test(lines[end]) || (lines[end].trim() && !opens(lines[end])))) end++;
  const inside = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return { block: { kind: "quote", blocks: blocks(inside, depth + 1) }, end };
}

function list(lines, at, depth) {
  const first = ITEM.exec(lines[at])[2];
  const kind = /\d/.test(first) ? "numbers" : "bullets";
  const items = [];
  let end = at;
  while (end < lines.length) {
    const match = ITEM.exec(lines[end]);
    if (!match || RULE.test(lines[end]) || /\d/.test(match[2]) !== (kind === "numbers")) break;
    const inside = [lines[end].slice(match[0].length)];
    const indent = match[1].length + match[2].length + (match[3]?.length ?? 1);
    const least = match[1].length + 2; // many indent by two what should stand below the item's text
    end++;
    while (end < lines.length && belongs(lines, end, least)) inside.push(dedent(lines[end++], indent));
    items.push(blocks(inside, depth + 1));
    while (end + 1 < lines.length && !lines[end].trim() && ITEM.test(lines[end + 1])) end++; // a blank line between items
  }
  return { block: { kind, start: parseInt(first, 10), items }, end };
}

/** Whether a line goes on with an item: it is indented, or the text above merely runs on. */
function belongs(lines, at, least) {
  if (lines[at].trim()) return lines[at].search(/\S/) >= least || (lines[at - 1].trim() && !opens(lines[at]));
  let next = at + 1;
  while (next < lines.length && !lines[next].trim()) next++;
  return next < lines.length && lines[next].search(/\S/) >= least;
}

const dedent = (line, count) => line.slice(Math.min(count, Math.max(line.search(/\S/), 0)));

function table(lines, at) {
  const head = cells(lines[at]);
  const sides = cells(lines[at + 1]).map((cell) => (/:$/.test(cell) ? (/^:/.test(cell) ? "mid" : "end") : ""));
  const rows = [];
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) rows.push(cells(lines[end++]).slice(0, head.length));
  return { block: { kind: "table", head, sides, rows }, end };
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim());

function draw(block) {
  switch (block.kind) {
    case "heading": // below the page's own headings, at most as small as text
      return element(`h${Math.min(block.level + 2, 6)}`, { dir: "auto" }, inline(block.text));
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", {}, block.blocks.map(draw));
    case "bullets":
      return element("ul", {}, block.items.map(item));
    case "numbers":
      return element("ol", { start: block.start !== 1 && block.start }, block.items.map(item));
    case "code":
      return code(block);
    case "table":
      return drawTable(block);
    default:
      return element("p", { dir: "auto" }, inline(block.text));
  }
}

/** An item of one paragraph is drawn without its margins. */
function item(inside) {
  const [first, ...rest] = inside;
  if (first?.kind !== "paragraph") return element("li", {}, inside.map(draw));
  return element("li", { dir: "auto" }, inline(first.text), rest.map(draw));
}

function code(block) {
  const name = block.language || "code";
  const head = element("div", { class: "code-head" }, element("span", {}, name), copyButton(() => block.text));
  const body = element("pre", { tabindex: "0", role: "region", "aria-label": name }, element("code", {}, block.text));
  return element("div", { class: "code" }, head, body);
}

function drawTable({ head, sides, rows }) {
  const row = (tag, texts) => texts.map((text, at) => element(tag, { class: sides[at] || null }, inline(text)));
  const made = element(
    "table",
    {},
    element("thead", {}, element("tr", {}, row("th", head))),
    element("tbody", {}, rows.map((texts) => element("tr", {}, row("td", texts)))),
  );
  return element("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Table" }, made);
}
