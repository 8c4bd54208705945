// The settings of answers: a form that is made here, kept in this browser, sent with every question.

import { byId, element } from "./dom.js";

const KEY = "mm.settings";

/** What can be set: name in the request, label, hint, what it is at first, and the bounds of a number. */
const FIELDS = [
  { name: "system", label: "System prompt", hint: "What the model is told before the chat.", rows: 4 },
  {
    name: "temperature",
    label: "Temperature",
    hint: "0 always takes the likeliest word, 1 draws as the model would.",
    initial: "0",
    min: 0,
    max: 2,
    step: "any",
  },
  {
    name: "top_p",
    label: "Top p",
    hint: "Only the likeliest words that make up this share.",
    min: 0.01,
    max: 1,
    step: "any",
  },
  { name: "top_k", label: "Top k", hint: "Only so many of the likeliest words.", min: 1, max: 100000, step: 1 },
  { name: "seed", label: "Seed", hint: "The same seed draws the same answer again.", min: 0, max: 4294967295, step: 1 },
  { name: "max_tokens", label: "Longest answer", hint: "In tokens.", min: 1, step: 1 },
  { name: "thinking", label: "Think first", hint: "The model reasons before it answers.", initial: true },
];

const NUMBER = { type: "number", inputmode: "decimal", placeholder: "–" };

/** The form is the one place of their values; the browser's storage gets a copy of what was entered. */
export class Settings {
  /** `server`: what GET /v1/settings said. */
  constructor(server) {
    this.dialog = byId("settings");
    this.note = byId("settings-note");
    this.fields = FIELDS.filter(({ name }) => name !== "thinking" || server.thinking).map((field) =>
      drawn(field, server),
    );
    byId("fields").replaceChildren(...this.fields.map(({ row }) => row));
    this.show(this.stored());
    for (const field of this.fields) {
      field.input.addEventListener("input", () => {
        check(field);
        this.store();
      });
    }
    byId("reset-settings").addEventListener("click", () => {
      this.show({});
      this.store();
      this.note.textContent ||= "These are the defaults.";
    });
  }

  open() {
    this.note.textContent = "";
    this.dialog.showModal();
  }

  /** {name: value} of what was set, and is in bounds. */
  get values() {
    const values = {};
    for (const { name, input } of this.fields) {
      if (input.type === "checkbox") values[name] = input.checked;
      else if (input.validity.valid && input.value.trim())
        values[name] = input.type === "number" ? input.valueAsNumber : input.value.trim();
    }
    return values;
  }

  get system() {
    return this.values.system ?? "";
  }

  /** What a request says beside model and messages. */
  get options() {
    const options = this.values;
    delete options.system; // a message of its own
    return options;
  }

  show(values) {
    for (const field of this.fields) {
      const { name, input, initial } = field;
      if (input.type === "checkbox") input.checked = values[name] ?? initial;
      else input.value = values[name] ?? initial ?? "";
      check(field);
    }
  }

  stored() {
    try {
      return JSON.parse(localStorage.getItem(KEY)) ?? {};
    } catch (error) {
      console.warn("No settings of earlier visits:", error.message); // storage is forbidden, or holds something else
      return {};
    }
  }

  store() {
    this.note.textContent = "";
    try {
      const entered = ({ name, input }) => [name, input.type === "checkbox" ? input.checked : input.value];
      localStorage.setItem(KEY, JSON.stringify(Object.fromEntries(this.fields.map(entered))));
    } catch {
      this.note.textContent = "This browser keeps nothing for this page: the settings last until you leave it.";
    }
  }
}

/** The field with its input, its hint and the row that holds them. */
function drawn(field, server) {
  const id = `setting-${field.name}`;
  const common = { id, name: field.name, "aria-describedby": `${id}-hint` };
  const { min, max = server.max_length, step } = field;
  let input;
  if (field.rows) input = element("textarea", { ...common, rows: field.rows, dir: "auto" });
  else if (field.initial === true) input = element("input", { ...common, type: "checkbox" });
  else input = element("input", { ...common, ...NUMBER, min, max, step });
  const told = element("p", { id: `${id}-hint`, class: "soft" });
  const row = element("div", { class: `field ${input.type}` }, element("label", { for: id }, field.label), input, told);
  return { ...field, input, told, row };
}

/** Says what is wrong with a value where its hint stands. */
function check({ input, told, hint }) {
  const wrong = !input.validity.valid;
  const kind = input.step === "1" ? "A whole number" : "A number";
  input.setAttribute("aria-invalid", String(wrong));
  told.classList.toggle("wrong", wrong);
  told.textContent = wrong ? `${kind} from ${input.min} to ${input.max}. Until then this setting is not used.` : hint;
}
