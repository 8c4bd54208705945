// Where a question is written: text, attached files, sound from the microphone.

import { Camera } from "./camera.js";
import { byId, bytes, clock, either, element, icon } from "./dom.js";
import { Attachment, NAMES, offeredBy, taken } from "./media.js";
import { deviceTrouble, Recorder } from "./sound.js";

export class Composer {
  /** `chatFiles()` are the files that the chat holds already; `ask(text, attachments)` takes a question over. */
  constructor(server, { chatFiles, ask }) {
    Object.assign(this, { server, chatFiles, ask });
    this.attachments = [];
    this.adding = Promise.resolve();
    this.recorder = null;
    this.busy = false; // an answer is being written
    this.question = byId("question");
    this.list = byId("attachments");
    this.notice = byId("notice");
    this.offer();
    this.listen();
    this.grow();
  }

  /** Shows what this model, and this browser, can take. */
  offer() {
    const { kinds } = this.server;
    const devices = Boolean(navigator.mediaDevices?.getUserMedia); // only on a page from this machine, or by https
    byId("attach").hidden = !kinds.length;
    byId("record").hidden = !kinds.includes("audio") || !devices;
    byId("camera").hidden = !(kinds.includes("image") || kinds.includes("video")) || !devices;
    byId("files").accept = kinds.map((kind) => `${kind}/*`).join(",");
    this.camera = new Camera(kinds, (file) => this.add([file]));
  }

  listen() {
    const files = byId("files");
    byId("attach").addEventListener("click", () => files.click());
    files.addEventListener("change", () => {
      this.add([...files.files]);
      files.value = ""; // the same file may be chosen again
    });
    byId("camera").addEventListener("click", () => this.camera.open());
    byId("record").addEventListener("click", () => this.record());
    byId("keep-sound").addEventListener("click", () => this.keepSound());
    byId("discard-sound").addEventListener("click", () => this.discardSound());
    this.notice.querySelector("button").addEventListener("click", () => this.say(""));
    this.question.addEventListener("input", () => this.grow());
    this.question.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return; // composing: the key ends a word of its own
      event.preventDefault();
      this.send();
    });
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    document.addEventListener("paste", (event) => {
      if (event.clipboardData.files.length && this.open()) {
        event.preventDefault();
        this.add([...event.clipboardData.files]);
      }
    });
    this.listenToDrops();
  }

  listenToDrops() {
    const hint = byId("drop");
    let inside = 0; // elements that the files were dragged into and not out of
    const over = (event) => {
      if (!event.dataTransfer?.types.includes("Files") || !this.open()) return;
      event.preventDefault();
      if (event.type === "dragenter") inside++;
      if (event.type === "drop") this.add([...event.dataTransfer.files]);
      hint.hidden = event.type === "drop";
      if (event.type === "drop") inside = 0;
    };
    for (const type of ["dragenter", "dragover", "drop"]) document.addEventListener(type, over);
    document.addEventListener("dragleave", () => {
      inside = Math.max(0, inside - 1);
      hint.hidden = inside === 0;
    });
  }

  /** Whether files may come in: the chat is what is seen, and the model takes some. */
  open() {
    return !byId("panel-chat").hidden && !document.querySelector("dialog[open]") && this.server.kinds.length > 0;
  }

  /** One after another; `adding` is over when all are checked. */
  add(files) {
    return (this.adding = this.adding.then(() => this.addAll(files)));
  }

  async addAll(files) {
    this.say("");
    const troubles = [];
    for (const file of files) {
      try {
        this.checkCount();
        this.attachments.push(await Attachment.of(file, this.server));
      } catch (error) {
        troubles.push(error.message);
      }
    }
    this.say(troubles.join(" "));
    this.show();
    this.question.focus();
  }

  checkCount() {
    const most = this.server.limits.items;
    if (this.attachments.length + this.chatFiles().length >= most) {
      throw new Error(`A chat can have ${most} files at most. Start a new one for more.`);
    }
  }

  remove(attachment, row) {
    this.attachments = this.attachments.filter((each) => each !== attachment);
    if (!attachment.sent) attachment.release();
    const next = row.nextElementSibling ?? row.previousElementSibling;
    row.remove();
    this.list.hidden = !this.attachments.length;
    (next?.querySelector("button") ?? this.question).focus();
  }

  show() {
    this.list.replaceChildren(...this.attachments.map((each) => {
      const close = element("button", { type: "button", class: "icon small", "aria-label": `Remove ${each.name}` }, icon("close"));
      const row = element("li", { class: each.kind }, preview(each), about(each), close);
      close.addEventListener("click", () => this.remove(each, row));
      return row;
    }));
    this.list.hidden = !this.attachments.length;
  }

  /** Puts a question here to be changed, or, without one, empties the place. */
  fill(text = "", attachments = []) {
    this.question.value = text;
    this.attachments = [...attachments];
    this.say("");
    this.show();
    this.grow();
    this.question.focus();
  }

  async send() {
    await this.adding; // a file that was dropped just before
    const text = this.question.value.trim();
    if (this.busy || this.recorder || !(text || this.attachments.length)) return;
    const attachments = this.attachments;
    this.fill();
    this.ask(text, attachments);
  }

  setBusy(busy) {
    const held = document.activeElement === byId(busy ? "send" : "stop");
    this.busy = busy;
    byId("send").hidden = busy;
    byId("stop").hidden = !busy;
    if (held) this.question.focus();
  }

  async record() {
    this.say("");
    byId("record").disabled = true; // until the browser has asked
    try {
      this.recorder = await Recorder.start((loudness, seconds) => this.heard(loudness, seconds));
      this.showRecording(true);
    } catch (error) {
      this.say(deviceTrouble(error, "microphone"));
    }
    byId("record").disabled = false;
  }

  heard(loudness, seconds) {
    byId("recording").querySelector("meter").value = loudness;
    byId("recording").querySelector(".clock").textContent = clock(seconds);
    if (seconds >= (this.server.limits.audio_seconds ?? 300) - 1) this.keepSound();
  }

  async keepSound() {
    const { recorder } = this;
    if (!recorder) return; // it has reached its longest already
    this.showRecording(false);
    try {
      await this.add([await recorder.stop()]);
    } catch (error) {
      this.say(error.message);
    }
  }

  discardSound() {
    this.recorder.discard();
    this.showRecording(false);
  }

  showRecording(on) {
    if (!on) this.recorder = null;
    byId("recording").hidden = !on;
    byId("record").hidden = on;
    byId(on ? "keep-sound" : "question").focus();
  }

  say(text) {
    this.notice.firstElementChild.textContent = text;
    this.notice.hidden = !text;
  }

  /** As high as its text, up to what the style allows. */
  grow() {
    this.question.style.height = "auto";
    this.question.style.height = `${this.question.scrollHeight}px`;
  }
}

/** What an attachment looks or sounds like. */
export function preview(attachment) {
  const { kind, url, name } = attachment;
  if (kind === "image") return element("img", { src: url, alt: name });
  if (kind === "video") return element("video", { src: url, controls: true, playsinline: true, "aria-label": name });
  return element("audio", { src: url, controls: true, "aria-label": name });
}

const about = ({ name, size }) => element("span", { class: "about soft" }, element("span", {}, name), ` ${bytes(size)}`);

/** The first words of an empty chat. */
export function welcome(server) {
  const kinds = Object.keys(offeredBy(server));
  const list = either(kinds.map((kind) => NAMES[kind]));
  byId("invitation").textContent = list ? `Ask about ${list}` : "Ask something";
  byId("ways").textContent = kinds.length ? `Drop a file here, paste one, or choose one. ${taken(server)}` : taken(server);
}
