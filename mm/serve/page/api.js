// What the page asks of the server, and how its refusals are told.

const WORDS = {
  unreachable: "The server cannot be reached. Is it still running?",
  interrupted: "The connection ended in the middle of the answer.",
  invalid_api_key: "The server asks for its key. Reload this page and enter it as the password.",
  model_not_found: "The server now serves another model. Reload this page.",
  too_many_requests: "You have as many answers under way as one visitor may. One of them has to end first.",
  server_busy: "The server is busy with other questions.",
  decoder_busy: "The server is busy with other files.",
  deadline_exceeded: "The answer took longer than the server allows. A lower limit of tokens in Settings helps, or less media.",
  context_length_exceeded: "The chat has become longer than the model can read. Start a new chat, or edit an earlier question.",
  body_too_large: "The files of this chat are larger together than the server takes. Start a new chat, or attach fewer.",
  too_many_items: "The chat has more files than the server takes. Start a new chat, or attach fewer.",
  media_too_large: "A file is larger, or longer, than the server takes.",
  media_unreadable: "A file cannot be read: it is damaged, cut off or empty.",
  media_unsuitable: "A file can be read, but this model cannot take it: it may be too long, or too short.",
  unsupported_media_type: "A file has a format that this model does not take.",
  decoding_failed: "A file could not be decoded. It may be damaged.",
  decoding_timeout: "A file took too long to decode. A shorter or smaller one may do.",
};

/** A refusal, or a broken connection. `wait`: seconds after which the server wants to be asked again, if it said so. */
export class Refusal extends Error {
  constructor(code, { message, param, request_id: id } = {}, wait = null) {
    const setting = code === "invalid_value" && param ? ` It is about “${param}”: see Settings.` : "";
    super(WORDS[code] ?? (message || `The server refused, and said only “${code}”.`) + setting);
    this.code = code;
    this.id = id ?? null;
    this.wait = wait;
  }
}

const requestId = (response) => response.headers.get("X-Request-Id");

/** GET or POST of JSON; throws Refusal, or AbortError once `signal` says so. */
async function ask(path, body, signal) {
  const post = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, { ...post, signal, cache: "no-store" });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refusal("unreachable");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const body = await response.json().catch(() => ({})); // something between here and the server may answer in HTML
  const error = body.error ?? {};
  const wait = Number(response.headers.get("Retry-After"));
  const told = { ...error, request_id: error.request_id ?? requestId(response) };
  return new Refusal(error.code ?? `HTTP ${response.status}`, told, wait > 0 ? wait : null);
}

/** What the page needs to know of the server; see GET /v1/settings. */
export const serverSettings = async () => (await ask("/v1/settings")).json();

/** The page that shows where an answer looked, as HTML. */
export async function explanation(request, signal) {
  return (await (await ask("/v1/explain", request, signal)).json()).html;
}

/** Yields the chunks of an answer as they come; see POST /v1/chat/completions. */
export async function* answerStream(request, signal) {
  const response = await ask("/v1/chat/completions", { ...request, stream: true, stream_options: { include_usage: true } }, signal);
  for await (const data of events(response, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal(chunk.error.code, chunk.error);
    yield chunk;
  }
  throw new Refusal("interrupted", { request_id: requestId(response) });
}

/** The data of server-sent events, each of one line. */
async function* events(response, signal) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } catch (error) {
    throw signal.aborted ? error : new Refusal("interrupted", { request_id: requestId(response) });
  } finally {
    reader.cancel().catch(() => {}); // it may be over already
  }
}
