// Making elements. Text is only ever set as text: nothing in this page turns a string into HTML.

export const byId = (id) => document.getElementById(id);

/**
 * element("button", {class: "quiet", onclick: stop}, icon("stop"), "Stop")
 * Functions become listeners, true an empty attribute; false, null and undefined leave the attribute, or child, out.
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== false && child != null));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

/** One of the drawings at the top of index.html. */
export function icon(name) {
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  drawing.append(use);
  return drawing;
}

/** A small button of an icon and a word. */
export function action(name, label, onclick, attributes = {}) {
  return element("button", { type: "button", class: "quiet small", onclick, ...attributes }, icon(name), element("span", {}, label));
}

/** A button that copies what `text()` gives, and says that it did; null where the browser forbids copying. */
export function copyButton(text, label = "Copy") {
  if (!navigator.clipboard) return null; // a page that came over plain http from another machine
  const button = action("copy", label, async () => {
    let said = "Copied";
    try {
      await navigator.clipboard.writeText(text());
    } catch {
      said = "Not allowed";
    }
    button.replaceChildren(icon(said === "Copied" ? "done" : "close"), element("span", {}, said));
    setTimeout(() => button.replaceChildren(icon("copy"), element("span", {}, label)), 1600);
  });
  return button;
}

/** 1536 -> "1.5 kB", in powers of ten as the server's limits are. */
export function bytes(count) {
  if (count < 1000) return `${count} B`;
  const [size, unit] = count < 1e6 ? [count / 1e3, "kB"] : [count / 1e6, "MB"];
  return `${size < 10 ? Number(size.toFixed(1)) : Math.round(size)} ${unit}`;
}

/** 75 -> "1:15" */
export const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;

/** ["a", "b", "c"] -> "a, b or c" */
export const either = (words) => [words.slice(0, -1).join(", "), words.at(-1)].filter(Boolean).join(" or ");
