// The second tab: where an answer looked, as the server's own page, in a frame that runs nothing.

import { explanation, Refusal } from "./api.js";
import { byId, element } from "./dom.js";
import { showTrouble } from "./view.js";

export class Look {
  /** `turns()` are those that can be explained; `request(turn)` what the server is asked for one. */
  constructor({ turns, request }) {
    Object.assign(this, { turns, request });
    this.frame = byId("look-frame");
    this.state = byId("look-state");
    this.choice = byId("look-choice");
    this.save = byId("look-save");
    this.known = new Map(); // turn -> {answer, html}
    this.turn = null; // what is chosen
    this.choice.addEventListener("change", () => this.open(this.turns()[this.choice.selectedIndex]));
  }

  /** Shows a turn; without one the turn that was chosen last, if the chat has it still, or else the newest. */
  async open(turn = null) {
    const turns = this.turns();
    this.turn = turn ?? (turns.includes(this.turn) && !this.following ? this.turn : turns.at(-1));
    this.following = this.turn === turns.at(-1); // a newer answer, once there is one, takes its place
    byId("look-bar").hidden = !turns.length;
    const options = turns.map((each, at) => element("option", { selected: each === this.turn }, `${at + 1}. ${each.text || "(no text)"}`));
    this.choice.replaceChildren(...options);
    this.controller?.abort();
    if (this.turn) await this.find(this.turn);
    else this.say(element("h2", {}, "Nothing to look at yet"), element("p", { class: "soft" }, "Ask something in the chat. This tab then shows which places of a picture, sound or film the answer looked at, and which experts worked on each word."));
  }

  async find(turn) {
    const known = this.known.get(turn);
    if (known?.answer === turn.answer) return this.show(known.html);
    const controller = (this.controller = new AbortController());
    this.say(element("p", { class: "soft waiting" }, element("span", { class: "dots", "aria-hidden": "true" }, element("i"), element("i"), element("i")), "Looking again at the answer"));
    try {
      const html = await explanation(await this.request(turn), controller.signal);
      if (controller.signal.aborted) return;
      this.known.set(turn, { answer: turn.answer, html });
      this.show(html);
    } catch (error) {
      if (controller.signal.aborted) return; // another turn was chosen
      if (!(error instanceof Refusal)) throw error;
      const trouble = element("div", { class: "trouble" });
      this.say(trouble);
      showTrouble(trouble, error, () => this.open(turn));
    }
  }

  /** Forgets what was shown, with the chat that it belonged to. */
  clear() {
    this.controller?.abort();
    this.known.clear();
    this.turn = null;
    this.show("<!doctype html>");
  }

  say(...children) {
    this.state.replaceChildren(...children);
    this.state.hidden = false;
    this.frame.hidden = this.save.hidden = true;
  }

  show(html) {
    this.state.hidden = true;
    this.frame.hidden = this.save.hidden = false;
    fillFrame(this.frame, html);
    URL.revokeObjectURL(this.save.href);
    this.save.href = URL.createObjectURL(new Blob([html], { type: "text/html" }));
  }
}

/**
 * Puts a whole page of HTML into the frame. The frame's sandbox and this page's policy keep scripts from running; the same
 * policy refuses the styles that the page carries in itself, and complains of each as soon as it is parsed. So they are
 * parsed as something else, and go in as sheets and properties, which the policy leaves to scripts such as this one.
 */
function fillFrame(frame, html) {
  const page = new DOMParser().parseFromString(asData(html), "text/html");
  const place = frame.contentDocument;
  place.adoptedStyleSheets = [...page.querySelectorAll("script")].map((style) => {
    const sheet = new frame.contentWindow.CSSStyleSheet();
    sheet.replaceSync(style.textContent);
    style.remove();
    return sheet;
  });
  place.replaceChild(place.adoptNode(page.documentElement), place.documentElement);
  for (const node of place.querySelectorAll("[data-style]")) node.style.cssText = node.dataset.style;
  frame.contentWindow.scrollTo(0, 0);
}

/** HTML whose style elements are blocks of data, and whose style attributes are data- attributes. */
const asData = (html) =>
  html
    .replace(/<style(?=[\s>])/g, '<script type="text/css"')
    .replaceAll("</style>", "</script>")
    .replace(/(<[^<>]*\s)style="/g, '$1data-style="');
