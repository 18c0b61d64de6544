/** An answer from its request to its end: streaming, thinking time, tools of the browser, stop, continue. */

import { ApiError, streamChat } from "./api.js";
import { add, openCalls, path, takeDelta, thoughtIn, toRequest } from "./conversation.js";
import { definitions, runTool } from "./tools.js";

const MAX_ROUNDS = 8; // of tool calls that the browser answers by itself

export class Turns {
  /**
   * @param {() => import("./settings.js").Settings} settings
   * @param {{changed: (conversation, message) => void, grew: (conversation, message) => void,
   *          started: () => void, ended: (conversation, message) => void, save: (conversation) => void}} hooks
   *   `changed`: the path did; `grew`: a message on it did.
   */
  constructor(settings, hooks) {
    Object.assign(this, { settings, hooks, running: new Map() }); // conversation id -> {conversation, message, controller, …}
  }

  /** @returns {{thinkingSince: number | null} | null} */
  runs(message) {
    for (const run of this.running.values()) if (run.message === message) return run;
    return null;
  }

  stop(conversationId) {
    this.running.get(conversationId)?.controller.abort();
  }

  /** Stops an answer whose conversation was deleted; it is not stored again. */
  forget(conversationId) {
    const run = this.running.get(conversationId);
    if (run) run.forgotten = true;
    this.stop(conversationId);
  }

  #save(run) {
    if (!run.forgotten) this.hooks.save(run.conversation);
  }

  /** Answers what stands at `parent`, and goes on after each round of tools that run in the browser. */
  async answer(conversation, parent) {
    await this.#alone(conversation, async (run) => {
      for (let round = 0; ; round += 1) {
        const message = add(conversation, parent, { role: "assistant", model: this.settings().model });
        await this.#stream(run, message, {});
        if (message.error || message.finish === "stopped" || message.finish === "length") return;
        if (!message.toolCalls?.length || !this.#runTools(conversation, message)) return;
        if (round === MAX_ROUNDS) {
          message.error = { kind: "rounds", text: `Stopped after ${MAX_ROUNDS} rounds of tool calls.` };
          return;
        }
        parent = path(conversation).at(-1).id;
      }
    });
  }

  /** Writes on at an answer that was cut off. */
  async resume(conversation, message) {
    await this.#alone(conversation, (run) => (
      this.#stream(run, message, { continue_final_message: true, add_generation_prompt: false })));
  }

  async #alone(conversation, work) {
    if (this.running.has(conversation.id)) return;
    const run = { conversation, message: null, controller: new AbortController(), thinkingSince: null };
    this.running.set(conversation.id, run);
    this.hooks.started();
    try {
      await work(run);
    } finally {
      this.running.delete(conversation.id);
      this.#save(run);
      this.hooks.changed(conversation, run.message);
      this.hooks.ended(conversation, run.message);
    }
  }

  #runTools(conversation, message) {
    const { tools } = this.settings();
    for (const call of openCalls(conversation, message)) {
      const content = runTool(call, tools);
      if (content !== null) add(conversation, path(conversation).at(-1).id, { role: "tool", toolCallId: call.id, content });
    }
    return openCalls(conversation, message).length === 0;
  }

  async #stream(run, message, extra) {
    const { conversation, controller } = run;
    run.message = message;
    delete message.error;
    delete message.finish;
    this.hooks.changed(conversation, message);
    this.#save(run);
    const upTo = path(conversation);
    const settings = this.settings();
    let first = null; // when the first token came
    let saved = performance.now();
    try {
      for await (const event of streamChat(settings, this.#request(upTo, message, extra, settings), controller.signal)) {
        const now = performance.now();
        first ??= now;
        if (event.delta) this.#take(run, event.delta, now);
        if (event.finish) message.finish = event.finish;
        if (event.usage) message.usage = event.usage;
        if (event.timings) message.timings = event.timings;
        this.hooks.grew(conversation, message);
        if (now - saved > 1000) { // a closed tab loses a second at most
          saved = now;
          this.#save(run);
        }
      }
    } catch (error) {
      if (error.name === "AbortError") message.finish = "stopped";
      else if (error instanceof ApiError) message.error = { kind: error.kind, text: explain(error), retryAfter: error.retryAfter };
      else throw error;
    } finally {
      this.#endThinking(run, performance.now());
      if (!message.timings && message.usage && first) message.timings = estimate(message.usage, performance.now() - first);
    }
  }

  #request(upTo, message, extra, settings) {
    const messages = upTo.slice(0, upTo.indexOf(message) + ("continue_final_message" in extra ? 1 : 0));
    const body = { model: settings.model, messages: toRequest(messages, settings.system), ...extra };
    for (const key of ["temperature", "top_p", "max_tokens", "seed"]) {
      if (settings[key] !== null) body[key] = settings[key];
    }
    if (settings.thinking !== "unsaid") body.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
    const tools = definitions(settings.tools, settings.ownTools);
    if (tools.length) body.tools = tools;
    return body;
  }

  #take(run, delta, now) {
    if (thoughtIn(delta)) run.thinkingSince ??= now;
    if (delta.content || delta.tool_calls) this.#endThinking(run, now);
    takeDelta(run.message, delta);
  }

  #endThinking(run, now) {
    if (run.thinkingSince === null) return;
    run.message.thinkingMs = (run.message.thinkingMs ?? 0) + now - run.thinkingSince;
    run.thinkingSince = null;
  }
}

/** Where the server tells no timings. */
const estimate = (usage, milliseconds) => ({
  predicted_n: usage.completion_tokens, predicted_per_second: usage.completion_tokens / (milliseconds / 1000), estimated: 1,
});

function explain({ kind, message }) {
  if (kind === "key") return `The server wants another API key: ${message} It is set in the settings.`;
  if (kind === "busy") return `The server is busy: ${message}`;
  if (kind === "refused") return `The server refused: ${message}`;
  if (kind === "failed") return `The server failed: ${message}`;
  return message;
}
