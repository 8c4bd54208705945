// Turns of the chat as they are seen.

import { preview } from "./composer.js";
import { action, copyButton, element, icon } from "./dom.js";
import { render } from "./markdown.js";

const ENDS = {
  length: "The answer ends here because it reached its longest length.",
  content_filter: "The server held the rest of the answer back.",
};

/** One turn: `draw()` shows what it has become. `acts` are what its buttons do: {edit, again, look}, each with the turn. */
export class TurnView {
  constructor(turn, acts) {
    this.turn = turn;
    this.acts = acts;
    this.thoughts = element("div", { class: "text" });
    this.summary = element("summary");
    this.reasoning = element("details", { class: "reasoning" }, this.summary, this.thoughts);
    this.text = element("div", { class: "text" });
    this.state = element("p", { class: "state soft" });
    this.trouble = element("div", { class: "trouble" });
    this.foot = element("div", { class: "actions" });
    this.answer = element("article", { class: "answer", "aria-label": "Answer" }, this.reasoning, this.text, this.state, this.trouble, this.foot);
    this.row = element("li", { class: "turn" }, this.asked(), this.answer);
    this.draw();
  }

  asked() {
    const { turn } = this;
    const media = element("div", { class: "media" }, turn.attachments.map(preview));
    const text = element("p", { class: "said", dir: "auto" }, turn.text);
    const buttons = element("div", { class: "actions" }, turn.text && copyButton(() => turn.text), action("edit", "Edit", () => this.acts.edit(turn)));
    return element("article", { class: "question", "aria-label": "Question" }, turn.attachments.length > 0 && media, turn.text && text, buttons);
  }

  draw() {
    const { turn } = this;
    this.answer.setAttribute("aria-busy", String(turn.running)); // read aloud when it is whole
    this.answer.dataset.state = turn.state;
    this.reasoning.hidden = !turn.reasoning;
    if (turn.reasoning) {
      this.summary.textContent = turn.running && !turn.answer ? "Thinking …" : "Reasoning";
      render(turn.reasoning, this.thoughts);
    }
    render(turn.answer, this.text);
    this.state.replaceChildren(...this.said());
    this.state.hidden = !this.state.childNodes.length;
    if (this.shown === turn.state) return;
    this.shown = turn.state;
    this.drawTrouble();
    this.foot.replaceChildren(...(turn.running ? [] : this.buttons()));
    this.foot.hidden = !this.foot.childNodes.length;
  }

  /** What is to be said of the answer beside its text. */
  said() {
    const { state, answer, finish, reasoning } = this.turn;
    if (state === "waiting" && !reasoning) return [element("span", { class: "dots", "aria-hidden": "true" }, ...Array.from({ length: 3 }, () => element("i"))), "Reading"];
    if (state === "stopped") return [answer ? "Stopped here." : "Stopped before the first word."];
    if (state !== "done") return [];
    if (!answer) return ["The model answered without a word."];
    return ENDS[finish] ? [ENDS[finish]] : [];
  }

  buttons() {
    const { turn, acts } = this;
    const { tokens, seconds } = turn;
    const speed = tokens > 1 && seconds > 0.05 ? ` · ${Math.round((tokens - 1) / seconds)} a second` : "";
    return [
      turn.answer && copyButton(() => turn.answer),
      turn.state !== "failed" && action("again", "Regenerate", () => acts.again(turn), { class: "quiet small again" }),
      turn.answer && turn.state !== "failed" && action("look", "Where it looked", () => acts.look(turn)),
      tokens && element("span", { class: "soft facts" }, `${tokens} ${tokens === 1 ? "token" : "tokens"}${speed}`),
    ].filter(Boolean);
  }

  drawTrouble() {
    const { error, state } = this.turn;
    this.trouble.replaceChildren();
    this.trouble.hidden = state !== "failed";
    if (state === "failed") showTrouble(this.trouble, error, () => this.acts.again(this.turn));
  }
}

/** An error with its request id, and a button that waits for as long as the server asked. */
export function showTrouble(place, error, again) {
  const button = element("button", { type: "button", class: "quiet again", onclick: again }, icon("again"), element("span", {}, "Try again"));
  const told = element("p", { role: "alert" }, error.message);
  const id = error.id && element("p", { class: "soft" }, "Request ", element("code", {}, error.id));
  place.replaceChildren(told, ...(id ? [id] : []), button);
  if (error.wait) countDown(button, error.wait);
}

function countDown(button, seconds) {
  const label = button.querySelector("span");
  const until = Date.now() + 1000 * seconds;
  button.disabled = true;
  const tick = () => {
    const left = Math.ceil((until - Date.now()) / 1000);
    button.disabled = left > 0;
    label.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left > 0 && button.isConnected) setTimeout(tick, 250);
  };
  queueMicrotask(tick); // once it is in the page
}
