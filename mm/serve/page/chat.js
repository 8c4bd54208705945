// The chat as data: turns of a question and its answer, held in memory alone.

/** One question and what became of it. `state`: waiting, writing, done, stopped or failed. */
export class Turn {
  constructor(text, attachments) {
    this.text = text;
    this.attachments = attachments;
    for (const each of attachments) each.sent = true;
    this.restart();
  }

  restart() {
    this.state = "waiting";
    this.answer = "";
    this.reasoning = "";
    this.error = null; // a Refusal
    this.finish = null; // why the model stopped
    this.tokens = null;
    this.seconds = 0; // from the first token to the last
  }

  get running() {
    return this.state === "waiting" || this.state === "writing";
  }

  /** Takes in a chunk of the stream. */
  push(chunk) {
    if (chunk.usage) this.tokens = chunk.usage.completion_tokens;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const { content, reasoning_content: reasoning } = choice.delta ?? {};
    if (content || reasoning) {
      if (this.state === "waiting") this.started = performance.now();
      this.state = "writing";
      this.seconds = (performance.now() - this.started) / 1000;
    }
    this.answer += content ?? "";
    this.reasoning += reasoning ?? "";
    this.finish = choice.finish_reason ?? this.finish;
  }

  /** Whether later questions follow on this one: a question that got no answer is not part of what the model reads. */
  get counts() {
    return this.answer !== "" || this.state === "done";
  }

  async question() {
    const parts = await Promise.all(this.attachments.map((each) => each.part()));
    const text = this.text ? [{ type: "text", text: this.text }] : [];
    return { role: "user", content: parts.length ? [...parts, ...text] : this.text };
  }
}

export class Chat {
  constructor() {
    this.turns = [];
  }

  get last() {
    return this.turns.at(-1) ?? null;
  }

  /** Takes a turn and all after it out of the chat. */
  cut(turn) {
    return this.turns.splice(this.turns.indexOf(turn));
  }

  /** What the model is to read for this turn: the system's text, the turns before it, its question. */
  async messages(turn, system) {
    const before = this.turns.slice(0, this.turns.indexOf(turn)).filter((each) => each.counts);
    const messages = system ? [{ role: "system", content: system }] : [];
    for (const each of before) messages.push(await each.question(), { role: "assistant", content: each.answer });
    return [...messages, await turn.question()];
  }

  /** How many files the model would read with the next question, `without` a turn and those after it. */
  files(without = null) {
    const turns = without ? this.turns.slice(0, this.turns.indexOf(without)) : this.turns;
    return turns.filter((each) => each.counts).flatMap((each) => each.attachments);
  }
}
