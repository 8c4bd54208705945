// The camera: a dialog that takes a photo (JPEG) or a short clip (WebM, without sound), and hands the file on.

import { byId, clock } from "./dom.js";
import { deviceTrouble } from "./sound.js";

const LONGEST = 30; // seconds of a clip
const CLIPS = ["video/webm;codecs=vp8", "video/webm", "video/mp4"]; // the first that the browser can record

export class Camera {
  /** `kinds` are those that the model takes; `take(file)` gets what was taken. */
  constructor(kinds, take) {
    this.take = take;
    this.dialog = byId("camera-dialog");
    this.view = byId("viewfinder");
    this.state = byId("camera-state");
    this.photo = byId("take-photo");
    this.clip = byId("take-clip");
    this.type = globalThis.MediaRecorder && CLIPS.find((type) => MediaRecorder.isTypeSupported(type));
    this.photo.hidden = !kinds.includes("image");
    this.clip.hidden = !kinds.includes("video") || !this.type;
    this.photo.addEventListener("click", () => this.takePhoto());
    this.clip.addEventListener("click", () => (this.recorder ? this.recorder.stop() : this.record()));
    byId("close-camera").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("close", () => this.release());
  }

  async open() {
    this.say("Waiting for the camera …");
    this.ready(false);
    this.dialog.showModal();
    try {
      const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment", width: { ideal: 1280 } } });
      if (!this.dialog.open) return stop(stream); // closed before the browser had asked
      this.stream = stream;
      this.view.srcObject = stream;
      await this.view.play();
      this.say("");
      this.ready(true);
    } catch (error) {
      if (this.dialog.open) this.say(deviceTrouble(error, "camera"));
    }
  }

  takePhoto() {
    const canvas = document.createElement("canvas");
    canvas.width = this.view.videoWidth;
    canvas.height = this.view.videoHeight;
    canvas.getContext("2d").drawImage(this.view, 0, 0);
    canvas.toBlob((blob) => this.finish(new File([blob], "photo.jpg", { type: "image/jpeg" })), "image/jpeg", 0.92);
  }

  record() {
    const pieces = [];
    const recorder = new MediaRecorder(this.stream, { mimeType: this.type, videoBitsPerSecond: 2_500_000 });
    const begun = Date.now();
    const tick = setInterval(() => {
      const seconds = (Date.now() - begun) / 1000;
      this.say(`Recording ${clock(seconds)} of at most ${clock(LONGEST)}`);
      if (seconds >= LONGEST) recorder.stop();
    }, 250);
    recorder.ondataavailable = ({ data }) => pieces.push(data);
    recorder.onstop = () => {
      clearInterval(tick);
      const kept = this.recorder === recorder; // the dialog was not closed meanwhile
      this.recording(null);
      const type = this.type.split(";")[0];
      if (kept) this.finish(new File(pieces, `clip.${type.split("/")[1]}`, { type }));
    };
    recorder.start();
    this.recording(recorder);
  }

  finish(file) {
    this.dialog.close();
    this.take(file);
  }

  recording(recorder) {
    this.recorder = recorder;
    this.clip.textContent = recorder ? "Stop and attach" : "Record a clip";
    this.clip.setAttribute("aria-pressed", String(Boolean(recorder)));
    this.photo.disabled = Boolean(recorder);
  }

  release() {
    const recorder = this.recorder;
    this.recording(null);
    if (recorder?.state === "recording") recorder.stop();
    if (this.stream) stop(this.stream);
    this.stream = this.view.srcObject = null;
  }

  ready(yes) {
    this.photo.disabled = this.clip.disabled = !yes;
  }

  say(text) {
    this.state.textContent = text;
  }
}

function stop(stream) {
  for (const track of stream.getTracks()) track.stop();
}
