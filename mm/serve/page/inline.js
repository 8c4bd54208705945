// What stands in a line of Markdown: emphasis, code, links. What is none of them stays the text that it is.

import { element } from "./dom.js";

const DEPTH = 8; // emphasis in emphasis
const MARKS = { "**": "strong", "__": "strong", "~~": "del", "*": "em", _: "em" };
const ADDRESS = /https?:\/\/[^\s<>"'`]+/y;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}]/u;

/** Text -> strings and elements, for append(). `links` false: what a link is called, which holds no other link. */
export function inline(text, depth = 0, links = true) {
  const made = [];
  let plain = "";
  let at = 0;
  const closed = new Set(); // marks that are known to have no end in what follows
  while (at < text.length) {
    const found = depth < DEPTH && special(text, at, { depth, links, closed });
    if (!found) {
      plain += text[at++];
      continue;
    }
    if (plain) made.push(plain);
    plain = "";
    made.push(...found.nodes);
    at = found.end;
  }
  if (plain) made.push(plain);
  return made;
}

/** {nodes, end} of what starts here and is more than a character; null otherwise. */
function special(text, at, within) {
  switch (text[at]) {
    case "\n":
      return { nodes: [element("br")], end: at + 1 };
    case "\\":
      return PUNCTUATION.test(text[at + 1] ?? "") ? { nodes: [text[at + 1]], end: at + 2 } : null;
    case "`":
      return codeSpan(text, at, within.closed);
    case "!":
      return text[at + 1] === "[" ? linked(text, at + 1, within) : null; // a picture is elsewhere: its address is shown
    case "[":
      return linked(text, at, within);
    case "<":
    case "h":
      return bareLink(text, at, within);
    case "*":
    case "_":
    case "~":
      return emphasis(text, at, within);
    default:
      return null;
  }
}

function codeSpan(text, at, closed) {
  const marks = /^`+/.exec(text.slice(at, at + 64))[0];
  if (!closed.has(marks)) {
    for (let end = text.indexOf(marks, at + marks.length); end >= 0; end = text.indexOf(marks, end + 1)) {
      if (text[end - 1] === "`" || text[end + marks.length] === "`") continue; // part of a longer run
      const inside = text.slice(at + marks.length, end).replace(/\n/g, " ");
      const shown = /^ .*[^ ].* $/.test(inside) ? inside.slice(1, -1) : inside;
      return { nodes: [element("code", {}, shown)], end: end + marks.length };
    }
    closed.add(marks);
  }
  return { nodes: [marks], end: at + marks.length };
}

function emphasis(text, at, { depth, links, closed }) {
  const mark = [text.slice(at, at + 2), text[at]].find((each) => each in MARKS);
  if (!mark || closed.has(mark)) return null;
  const inner = at + mark.length;
  if (!text[inner]?.trim() || (mark[0] === "_" && WORD.test(text[at - 1] ?? ""))) return null;
  const end = closing(text, inner, mark);
  if (end < 0) {
    closed.add(mark);
    return null;
  }
  return { nodes: [element(MARKS[mark], {}, inline(text.slice(inner, end), depth + 1, links))], end: end + mark.length };
}

/** Where a mark's end is, beyond code and escapes; -1 if nowhere. */
function closing(text, from, mark) {
  for (let at = from; at < text.length; at++) {
    if (text[at] === "\\") at++;
    else if (text[at] === "`") {
      const end = text.indexOf("`", at + 1);
      if (end > 0) at = end;
    } else if (text.startsWith(mark, at) && at > from && text[at - 1].trim()) {
      const next = text[at + mark.length] ?? "";
      if (mark.length === 1 && next === mark) at++; // two of them are another mark
      else if (mark[0] !== "_" || !WORD.test(next)) return mark.length === 2 && next === mark[0] ? at + 1 : at;
    }
  }
  return -1;
}

/** [label](address); anything but an http(s) address leaves all of it as text. */
function linked(text, open, { depth, links }) {
  if (!links) return null;
  const label = between(text, open, "[", "]");
  if (label < 0 || text[label + 1] !== "(") return null;
  const end = between(text, label + 1, "(", ")");
  if (end < 0) return null;
  const href = address(text.slice(label + 2, end).trim().split(/\s/)[0].replace(/^<|>$/g, ""));
  return href && { nodes: link(href, inline(text.slice(open + 1, label), depth + 1, false)), end: end + 1 };
}

function bareLink(text, at, { links }) {
  const framed = text[at] === "<";
  if (!links) return null;
  if (!framed && WORD.test(text[at - 1] ?? "")) return null;
  ADDRESS.lastIndex = at + (framed ? 1 : 0);
  let written = ADDRESS.exec(text)?.[0];
  if (!written) return null;
  if (!framed) {
    written = written.replace(/[.,;:!?*_~|]+$/, ""); // the sentence's, not the address's
    if (written.endsWith(")") && !written.includes("(")) written = written.slice(0, -1);
  } else if (text[at + 1 + written.length] !== ">") return null;
  const href = address(written);
  return href && { nodes: link(href, [href]), end: at + written.length + (framed ? 2 : 0) };
}

/** Where the bracket at `open` is closed, on a stretch that a link may have; -1 if nowhere. */
function between(text, open, opening, close) {
  let level = 0;
  for (let at = open; at < Math.min(text.length, open + 2000); at++) {
    if (text[at] === "\\") at++;
    else if (text[at] === opening) level++;
    else if (text[at] === close && --level === 0) return at;
  }
  return -1;
}

/** The address as the browser reads it, so that a look-alike name is seen for what it is; null if it is not http(s). */
function address(written) {
  const url = URL.canParse(written) ? new URL(written) : null;
  return url && /^https?:$/.test(url.protocol) && !url.username && !url.password ? url.href : null;
}

/** A link says where it leads, unless that is what it is called. */
function link(href, label) {
  const anchor = element("a", { href, target: "_blank", rel: "noopener noreferrer" }, label);
  return anchor.textContent === href ? [anchor] : [anchor, element("span", { class: "address" }, ` (${href})`)];
}
