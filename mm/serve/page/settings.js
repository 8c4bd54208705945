// The settings of answers: a form that is made here, kept in this browser, sent with every question.

import { byId, element } from "./dom.js";

const KEY = "mm.settings";

/** What can be set: name in the request, label, hint, and the bounds that an input of numbers takes. */
const FIELDS = [
  { name: "system", label: "System prompt", hint: "What the model is told before the chat.", rows: 4 },
  { name: "temperature", label: "Temperature", hint: "0 always takes the likeliest word; 1 is the default.", min: 0, max: 2, step: "any" },
  { name: "top_p", label: "Top p", hint: "Only the likeliest words that make up this share.", min: 0.01, max: 1, step: "any" },
  { name: "top_k", label: "Top k", hint: "Only so many of the likeliest words.", min: 1, max: 100000, step: 1 },
  { name: "seed", label: "Seed", hint: "The same seed draws the same answer again.", min: 0, max: 4294967295, step: 1 },
  { name: "max_tokens", label: "Longest answer", hint: "In tokens.", min: 1, step: 1 },
  { name: "thinking", label: "Think first", hint: "The model reasons before it answers.", checked: true },
];

export class Settings {
  /** `server`: what GET /v1/settings said. */
  constructor(server) {
    this.server = server;
    this.note = byId("settings-note");
    this.dialog = byId("settings");
    this.values = this.stored();
    this.fields = FIELDS.filter(({ name }) => name !== "thinking" || server.thinking).map((field) => this.drawn(field));
    byId("fields").replaceChildren(...this.fields.map(({ row }) => row));
    byId("reset-settings").addEventListener("click", () => this.reset());
    this.show();
  }

  open() {
    this.dialog.showModal();
  }

  get system() {
    return this.values.system?.trim() ?? "";
  }

  /** What a request says beside model and messages: what was set, and no more. */
  get options() {
    const { system, ...options } = this.values;
    return this.server.thinking ? { thinking: true, ...options } : options;
  }

  drawn(field) {
    const id = `setting-${field.name}`;
    const common = { id, name: field.name, "aria-describedby": `${id}-hint` };
    let input;
    if (field.rows) input = element("textarea", { ...common, rows: field.rows, dir: "auto" });
    else if ("checked" in field) input = element("input", { ...common, type: "checkbox" });
    else {
      const { min, max = this.server.max_length, step } = field;
      input = element("input", { ...common, type: "number", inputmode: "decimal", min, max, step, placeholder: "–" });
    }
    const hint = element("p", { id: `${id}-hint`, class: "soft" }, field.hint);
    const row = element("div", { class: `field ${input.type}` }, element("label", { for: id }, field.label), input, hint);
    input.addEventListener("input", () => this.take(field, input, hint));
    return { ...field, input, hint, row };
  }

  /** Keeps what was entered, unless it is out of bounds: then the hint says so, and what was kept stays. */
  take(field, input, hint) {
    const wrong = !input.validity.valid;
    input.setAttribute("aria-invalid", String(wrong));
    hint.classList.toggle("wrong", wrong);
    hint.textContent = wrong ? `${bounds(input)} Until then this setting is not used.` : field.hint;
    delete this.values[field.name];
    if (input.type === "checkbox") this.values[field.name] = input.checked;
    else if (!wrong && input.value.trim()) this.values[field.name] = field.rows ? input.value : Number(input.value);
    this.store();
  }

  reset() {
    this.values = {};
    this.store();
    this.show();
    this.note.textContent ||= "All settings are cleared.";
  }

  show() {
    for (const { name, input, hint, checked } of this.fields) {
      if (input.type === "checkbox") input.checked = this.values[name] ?? checked;
      else input.value = this.values[name] ?? "";
      input.setAttribute("aria-invalid", "false");
      hint.classList.remove("wrong");
      hint.textContent = FIELDS.find((each) => each.name === name).hint;
    }
  }

  stored() {
    try {
      return JSON.parse(localStorage.getItem(KEY)) ?? {};
    } catch {
      this.note.textContent = "This browser gave no settings of earlier visits."; // storage is off, or holds something else
      return {};
    }
  }

  store() {
    this.note.textContent = "";
    try {
      localStorage.setItem(KEY, JSON.stringify(this.values));
    } catch {
      this.note.textContent = "This browser keeps nothing for this page: the settings last until you leave it.";
    }
  }
}

function bounds({ min, max, step, validity }) {
  if (validity.badInput) return "This is not a number.";
  return `${step === "1" ? "A whole number" : "A number"} from ${min} to ${max}.`;
}
