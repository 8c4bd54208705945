// Files that are attached to a question: what they are by their first bytes, whether the server takes them, how they are sent.

import { bytes, either } from "./dom.js";

const STARTS = [
  ["JPEG", [0xff, 0xd8, 0xff]],
  ["PNG", [0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a]],
  ["GIF", [0x47, 0x49, 0x46, 0x38]],
  ["FLAC", [0x66, 0x4c, 0x61, 0x43]],
  ["OGG", [0x4f, 0x67, 0x67, 0x53]],
  ["MP3", [0x49, 0x44, 0x33]],
  ["WebM", [0x1a, 0x45, 0xdf, 0xa3]],
];
const TYPES = {
  JPEG: "image/jpeg", PNG: "image/png", GIF: "image/gif", WebP: "image/webp",
  WAV: "audio/wav", MP3: "audio/mpeg", FLAC: "audio/flac", OGG: "audio/ogg",
};
export const NAMES = { image: "a picture", audio: "a sound", video: "a film" };

/** "JPEG", "WAV", ...: the server decides by the first bytes too; null for what it does not know. */
function formatOf(head) {
  const letters = (from, to) => String.fromCharCode(...head.slice(from, to));
  if (letters(0, 4) === "RIFF") return { WEBP: "WebP", WAVE: "WAV" }[letters(8, 12)] ?? null;
  if (letters(4, 8) === "ftyp") return "MP4";
  for (const [name, start] of STARTS) if (start.every((byte, at) => head[at] === byte)) return name;
  return head[0] === 0xff && (head[1] & 0xe6) === 0xe2 ? "MP3" : null;
}

/** The kind of file that a format is of; MP4 and WebM hold films, or sounds alone, and only their type tells. */
function kindOf(format, type, offered) {
  const kinds = Object.keys(offered).filter((kind) => offered[kind].includes(format));
  const declared = type.split("/")[0];
  return kinds.includes(declared) ? declared : (kinds.find((kind) => kind === "video") ?? kinds[0]);
}

/** What the model takes, of the server's settings: {image: ["JPEG", ...], ...}. */
export const offeredBy = (server) => Object.fromEntries(server.kinds.map((kind) => [kind, server.formats[kind] ?? []]));

/** A sentence that says what can be attached. */
export function taken(server) {
  const formats = [...new Set(Object.values(offeredBy(server)).flat())];
  return formats.length ? `This model takes ${either(formats)}.` : "This model reads text only.";
}

/**
 * A file that the server takes. `url` shows it in this page; `part()` is what is sent of it.
 */
export class Attachment {
  constructor(file, kind, format) {
    this.kind = kind;
    this.format = format;
    this.name = file.name || NAMES[kind].replace(/^a /, "");
    this.size = file.size;
    this.url = URL.createObjectURL(file);
    this.sent = false; // it belongs to a question: the chat shows it
    this.file = file;
  }

  /** Reads and checks a file; throws Error with a sentence for the person who chose it. */
  static async of(file, server) {
    const offered = offeredBy(server);
    const head = new Uint8Array(await file.slice(0, 16).arrayBuffer());
    const format = formatOf(head);
    const kind = format && kindOf(format, file.type, offered);
    const name = file.name || "This file";
    if (!file.size) throw new Error(`${name} is empty.`);
    if (!kind) throw new Error(`${name} is ${format ?? "of a format that is not known here"}. ${taken(server)}`);
    const most = server.limits[`${kind}_bytes`];
    if (file.size > most) throw new Error(`${name} has ${bytes(file.size)}; the server takes ${NAMES[kind]} of at most ${bytes(most)}.`);
    if (kind === "image") await checkSides(file, name, server.limits);
    return new Attachment(file, kind, format);
  }

  get type() {
    return TYPES[this.format] ?? `${this.kind}/${this.format.toLowerCase()}`;
  }

  /** A part of a message, in the form of OpenAI's API. */
  async part() {
    const data = await (this.encoded ??= base64(this.file));
    const url = `data:${this.type};base64,${data}`;
    if (this.kind === "image") return { type: "image_url", image_url: { url } };
    if (this.kind === "video") return { type: "video_url", video_url: { url } };
    if (this.format === "WAV" || this.format === "MP3") {
      return { type: "input_audio", input_audio: { data, format: this.format.toLowerCase() } };
    }
    return { type: "audio_url", audio_url: { url } };
  }

  /** Lets the file go, once nothing shows it. */
  release() {
    URL.revokeObjectURL(this.url);
  }
}

/** Sides in pixels against the server's limit; a picture that cannot be opened is refused here too. */
async function checkSides(file, name, limits) {
  const image = new Image();
  image.src = URL.createObjectURL(file);
  try {
    await image.decode();
  } catch {
    throw new Error(`${name} cannot be opened: the file seems to be damaged.`);
  } finally {
    URL.revokeObjectURL(image.src);
  }
  const { naturalWidth: width, naturalHeight: height } = image;
  const most = limits.image_side ?? Infinity;
  if (Math.max(width, height) > most) {
    throw new Error(`${name} has ${width} × ${height} pixels; the server takes at most ${most} a side.`);
  }
}

function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(new Error(`${file.name} can no longer be read. Attach it again.`));
    reader.readAsDataURL(file);
  });
}
