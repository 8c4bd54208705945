// The page as a whole: questions go to the server, answers come back, and the parts hear of it.

import { answerStream, Refusal, serverSettings } from "./api.js";
import { Chat, Turn } from "./chat.js";
import { Composer, welcome } from "./composer.js";
import { byId, element, icon } from "./dom.js";
import { Look } from "./look.js";
import { Settings } from "./settings.js";
import { Tabs } from "./tabs.js";
import { showTrouble, TurnView } from "./view.js";

class App {
  /** `server`: what GET /v1/settings said. */
  constructor(server) {
    this.server = server;
    this.chat = new Chat();
    this.views = new Map(); // turn -> TurnView
    this.edited = null; // the turn whose question is being changed
    this.controller = null; // of the answer that is being written
    this.settings = new Settings(server);
    this.composer = new Composer(server, {
      chatFiles: () => this.chat.files(this.edited),
      ask: (text, attachments) => this.ask(text, attachments),
    });
    this.look = new Look({
      turns: () => this.chat.turns.filter((turn) => turn.answer && !turn.running),
      request: async (turn) => ({ model: server.model, messages: await this.messages(turn), answer: turn.answer }),
    });
    this.tabs = new Tabs({ "tab-look": () => this.look.open() });
    this.conversation = byId("conversation");
    this.follow();
    byId("model").textContent = server.model;
    document.title = `${server.model} – mm`;
    welcome(server);
    this.listen();
    this.showEmpty();
    byId("composer").inert = false; // until here there was no server to ask
    this.composer.question.focus();
  }

  listen() {
    byId("new-chat").addEventListener("click", () => this.restart());
    byId("open-settings").addEventListener("click", () => this.settings.open());
    byId("stop").addEventListener("click", () => this.stop());
    byId("cancel-edit").addEventListener("click", () => this.endEdit());
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || document.querySelector("dialog[open]")) return; // a dialog closes by itself
      if (this.composer.recorder) this.composer.discardSound();
      else if (this.controller) this.stop();
      else if (this.edited) this.endEdit();
    });
  }

  /** A new question, or a changed one in the place of the old and of all that followed. */
  ask(text, attachments) {
    if (this.edited) this.cut(this.edited, attachments);
    this.endEdit(false);
    const turn = new Turn(text, attachments);
    this.chat.turns.push(turn);
    const view = new TurnView(turn, {
      edit: (turn) => this.edit(turn),
      again: (turn) => this.again(turn),
      look: (turn) => this.tabs.select("tab-look", () => this.look.open(turn)),
    });
    this.views.set(turn, view);
    byId("turns").append(view.row);
    this.showEmpty();
    this.answer(turn);
  }

  again(turn) {
    turn.restart();
    this.composer.question.focus();
    this.answer(turn);
  }

  /** Asks the server, and draws what comes until it is whole, stopped or refused. */
  async answer(turn) {
    const controller = (this.controller = new AbortController());
    const view = this.views.get(turn);
    this.composer.setBusy(true);
    view.draw();
    this.toEnd();
    let drawing = 0;
    try {
      const request = { model: this.server.model, messages: await this.messages(turn), ...this.settings.options };
      for await (const chunk of answerStream(request, controller.signal)) {
        turn.push(chunk);
        drawing ||= requestAnimationFrame(() => {
          drawing = 0;
          view.draw();
        });
      }
      turn.state = "done";
    } catch (error) {
      turn.state = controller.signal.aborted ? "stopped" : "failed";
      turn.error = error;
      if (!(error instanceof Refusal) && !controller.signal.aborted) console.error(error); // a fault of this page
    }
    cancelAnimationFrame(drawing);
    if (this.controller === controller) {
      this.controller = null;
      this.composer.setBusy(false);
    }
    view.draw();
  }

  messages(turn) {
    return this.chat.messages(turn, this.settings.system);
  }

  stop() {
    this.controller?.abort();
  }

  edit(turn) {
    this.stop();
    this.endEdit(false);
    this.edited = turn;
    byId("editing").hidden = false;
    let after = false;
    for (const [each, view] of this.views) view.row.classList.toggle("replaced", (after ||= each === turn));
    this.composer.fill(turn.text, turn.attachments);
  }

  /** `empty`: what was being changed is given up, and its text leaves the composer. */
  endEdit(empty = true) {
    if (this.edited && empty) this.composer.fill();
    this.edited = null;
    byId("editing").hidden = true;
    for (const view of this.views.values()) view.row.classList.remove("replaced");
  }

  /** Takes a turn and all after it away, with their files but those to keep. */
  cut(turn, kept = []) {
    for (const gone of this.chat.cut(turn)) {
      this.views.get(gone).row.remove();
      this.views.delete(gone);
      for (const file of gone.attachments) if (!kept.includes(file)) file.release();
    }
  }

  restart() {
    this.stop();
    this.endEdit(false);
    for (const file of this.composer.attachments) file.release();
    if (this.chat.turns.length) this.cut(this.chat.turns[0]);
    this.composer.fill();
    this.look.clear();
    this.showEmpty();
    this.tabs.select("tab-chat");
    this.composer.question.focus();
  }

  showEmpty() {
    byId("empty").hidden = this.chat.turns.length > 0;
    byId("turns").hidden = this.chat.turns.length === 0;
  }

  /** Keeps the end of the chat in sight, however it grows, until somebody scrolls up. */
  follow() {
    let before = 0;
    this.following = true;
    this.conversation.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.conversation;
      if (scrollHeight - scrollTop - clientHeight < 40) this.following = true;
      else if (scrollTop < before) this.following = false;
      before = scrollTop;
    });
    const observer = new ResizeObserver(() => this.following && this.toEnd());
    for (const each of [this.conversation, byId("turns")]) observer.observe(each);
  }

  toEnd() {
    this.following = true;
    this.conversation.scrollTop = this.conversation.scrollHeight;
  }
}

/** The buttons of an empty chat do what those of the composer do, by name. */
function offerStarts() {
  const starts = [["attach", "attach", "Choose a file"], ["camera", "camera", "Use the camera"], ["record", "microphone", "Record a sound"]];
  const offered = starts.filter(([id]) => !byId(id).hidden);
  byId("starts").replaceChildren(
    ...offered.map(([id, drawing, label]) => element("button", { type: "button", class: "quiet", onclick: () => byId(id).click() }, icon(drawing), element("span", {}, label))),
  );
}

async function start() {
  try {
    new App(await serverSettings());
    offerStarts();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    const trouble = element("div", { class: "trouble" });
    byId("empty").hidden = false;
    byId("starts").replaceChildren(trouble);
    showTrouble(trouble, error, () => {
      trouble.remove();
      start();
    });
  }
}

start();
