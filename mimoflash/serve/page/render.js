/** One message on the page: what was thought, said and called, and what the reader can do with it. */

import { documentsIn } from "./codeblock.js";
import { openCalls, resultsOf, siblings } from "./conversation.js";
import { copy, h, icon, iconButton } from "./dom.js";
import { GrowingMarkdown } from "./markdown.js";

/**
 * @typedef {object} Actions   what the reader may ask for; the page carries it out
 * @property {(message, text: string) => void} edit
 * @property {(message) => void} regenerate
 * @property {(message) => void} resume
 * @property {(id: string) => void} choose
 * @property {(message, call, text: string) => void} giveResult
 * @property {(message) => {thinkingSince: number | null} | null} running   null once the answer is there
 * @property {(key: string, block, streaming: boolean) => void} document   a document of HTML was written on
 */

export class MessageView {
  /** @param {Actions} actions */
  constructor(conversation, message, actions) {
    Object.assign(this, { conversation, message, actions });
    const assistant = message.role === "assistant";
    this.footer = h("footer");
    this.element = h("article", {
      class: `message ${message.role}`, "data-id": message.id, "aria-labelledby": `by-${message.id}`,
    }, h("h2", { class: "visually-hidden", id: `by-${message.id}` }, assistant ? "Answer" : "You"));
    if (assistant) this.#buildAnswer();
    else this.element.append(h("div", { class: "bubble" }, message.content), this.footer);
    this.update();
  }

  #buildAnswer() {
    this.thoughtTime = h("span");
    this.thoughts = h("div", { class: "prose" });
    this.thinking = h("details", { class: "thinking", hidden: true, ontoggle: () => this.#updateThinking() },
      h("summary", {}, this.thoughtTime), this.thoughts);
    this.body = h("div", { class: "prose" });
    this.calls = h("div", { class: "calls" });
    this.notice = h("div", { class: "notice", role: "note", hidden: true });
    this.thoughtText = new GrowingMarkdown(this.thoughts);
    this.bodyText = new GrowingMarkdown(this.body);
    this.element.append(this.thinking, this.body, this.calls, this.notice, this.footer);
  }

  /** Shows what the message has become. Called at most once a frame. */
  update() {
    const running = this.actions.running(this.message);
    this.element.classList.toggle("running", Boolean(running));
    this.element.setAttribute("aria-busy", String(Boolean(running)));
    if (this.message.role === "assistant") {
      this.#updateThinking();
      this.#updateBody(running);
      this.#updateCalls(running);
      this.#updateNotice(running);
    }
    if (running) this.footer.replaceChildren();
    else this.#updateFooter();
  }

  #updateThinking() {
    const { reasoning, thinkingMs } = this.message;
    this.thinking.hidden = !reasoning;
    if (!reasoning) return;
    const since = this.actions.running(this.message)?.thinkingSince;
    const seconds = ((thinkingMs ?? 0) + (since ? performance.now() - since : 0)) / 1000;
    this.thoughtTime.textContent = since ? `Thinking … ${seconds.toFixed(0)} s` : `Thought for ${seconds.toFixed(1)} s`;
    this.thinking.classList.toggle("running", Boolean(since));
    if (this.thinking.open) this.thoughtText.update(reasoning); // folded text costs nothing
  }

  #updateBody(running) {
    const { content } = this.message;
    if (running) this.bodyText.update(content);
    else this.bodyText.finish(content);
    documentsIn(this.body).forEach((block, at) => this.actions.document(this.documentKey(at), block, Boolean(running)));
  }

  documentKey(at) {
    return `${this.message.id}/${at}`;
  }

  #updateCalls(running) {
    const { toolCalls = [] } = this.message;
    const results = resultsOf(this.conversation, this.message);
    toolCalls.forEach((call, at) => {
      const result = results.get(call.id);
      const state = `${call.name}\n${call.arguments}\n${Boolean(running)}\n${result?.content}`;
      const shown = this.calls.children[at];
      if (shown?.dataset.state === state) return; // a half-typed result stays
      const card = this.#call(call, result, running);
      card.dataset.state = state;
      if (shown) shown.replaceWith(card);
      else this.calls.append(card);
    });
  }

  #call(call, result, running) {
    const card = h("section", { class: "call", "aria-label": `Tool call ${call.name}` },
      h("div", { class: "call-name" }, "Tool call ", h("code", {}, call.name)),
      h("pre", { tabindex: "0", role: "group", "aria-label": "Arguments" }, pretty(call.arguments)));
    if (result) {
      card.append(h("div", { class: "call-name" }, "Result"),
        h("pre", { tabindex: "0", role: "group", "aria-label": "Result" }, result.content));
    } else if (!running && this.message.finish !== "length") {
      const area = h("textarea", { rows: "2", "aria-label": `Result of ${call.name}`, placeholder: "Its result, by hand …" });
      const give = () => this.actions.giveResult(this.message, call, area.value);
      area.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) give(); });
      card.append(area, h("div", { class: "row" }, h("button", { type: "button", class: "quiet", onclick: give }, "Give result")));
    }
    return card;
  }

  #updateNotice(running) {
    clearInterval(this.countdown);
    const notice = running ? null : this.#noticeText();
    this.notice.hidden = !notice;
    if (!notice) return;
    const { content, reasoning, error, toolCalls } = this.message;
    const partial = content || reasoning;
    this.notice.classList.toggle("bad", Boolean(error));
    this.notice.replaceChildren(h("span", {}, notice));
    if (partial && !toolCalls?.length) {
      this.notice.append(h("button", { type: "button", class: "quiet", onclick: () => this.actions.resume(this.message) },
        icon("onward"), "Continue"));
    }
    if (error) {
      const retry = h("button", { type: "button", class: "quiet", onclick: () => this.actions.regenerate(this.message) },
        icon("again"), h("span", {}, "Retry"));
      this.notice.append(retry);
      if (error.retryAfter) this.#countDown(retry, error.retryAfter);
    }
  }

  #noticeText() {
    const { error, finish } = this.message;
    if (error) return error.text;
    if (finish === "length") return "The answer reached its limit of tokens.";
    if (finish === "stopped") return "Stopped.";
    return null;
  }

  #countDown(button, seconds) {
    const until = performance.now() + seconds * 1000;
    const tick = () => {
      const left = Math.ceil((until - performance.now()) / 1000);
      button.disabled = left > 0;
      button.lastChild.textContent = left > 0 ? `Retry in ${left} s` : "Retry";
      if (left <= 0) {
        clearInterval(this.countdown);
        delete this.message.error.retryAfter; // waited for: the next drawing does not wait again
      }
    };
    this.countdown = setInterval(tick, 250);
    tick();
  }

  #updateFooter() {
    const { message, actions } = this;
    const parts = [this.#branches()];
    if (message.role === "user") parts.push(iconButton("edit", "Edit", () => this.#edit()));
    parts.push(iconButton("copy", "Copy", (event) => copy(message.content, event.currentTarget)));
    if (message.role === "assistant") {
      parts.push(iconButton("again", "Regenerate", () => actions.regenerate(message)), this.#statistics());
    }
    this.footer.replaceChildren(...parts.filter(Boolean));
  }

  #branches() {
    const all = siblings(this.conversation, this.message.id);
    if (all.length < 2) return null;
    const at = all.indexOf(this.message);
    const to = (step, name, label) => iconButton(name, label, () => {
      this.actions.choose(all[at + step].id);
    }, { disabled: !all[at + step] });
    return h("div", { class: "branches", role: "group", "aria-label": "Versions" },
      to(-1, "previous", "Previous version"), h("span", {}, `${at + 1}/${all.length}`), to(1, "next", "Next version"));
  }

  #statistics() {
    const { usage, timings } = this.message;
    const parts = [];
    if (timings?.predicted_per_second) {
      parts.push(`${timings.estimated ? "≈ " : ""}${timings.predicted_per_second.toFixed(1)} tokens/s`);
    }
    if (timings?.accept_length) parts.push(`accept length ${timings.accept_length.toFixed(2)}`);
    if (usage?.completion_tokens) parts.push(`${usage.completion_tokens} tokens`);
    const cached = usage?.prompt_tokens_details?.cached_tokens;
    const title = usage ? `prompt ${usage.prompt_tokens} tokens${cached ? `, ${cached} of them cached` : ""}` : null;
    return parts.length ? h("span", { class: "statistics", title }, parts.join(" · ")) : null;
  }

  #edit() {
    const bubble = this.element.querySelector(".bubble");
    const area = h("textarea", { "aria-label": "Edit message", rows: String(Math.min(this.message.content.split("\n").length + 1, 12)) });
    area.value = this.message.content;
    const done = () => { editor.replaceWith(bubble); this.footer.hidden = false; };
    const send = () => { done(); if (area.value.trim()) this.actions.edit(this.message, area.value); };
    const editor = h("div", { class: "editor" }, area, h("div", { class: "row" },
      h("button", { type: "button", class: "quiet", onclick: done }, "Cancel"),
      h("button", { type: "button", class: "primary", onclick: send }, "Send")));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); done(); }
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); send(); }
    });
    bubble.replaceWith(editor);
    this.footer.hidden = true;
    area.focus();
  }

  /** Whether a person's result is what the conversation waits for. */
  get waits() {
    return this.message.role === "assistant" && openCalls(this.conversation, this.message).length > 0;
  }
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch { // still growing, or no JSON
    return text;
  }
}
