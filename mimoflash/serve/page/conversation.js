/**
 * A conversation is a tree of messages; the reader sees one path through it. Pure: no DOM, no storage.
 *
 * @typedef {{id: string, name: string, arguments: string}} ToolCall
 * @typedef {{
 *   id: string, parent: string | null, chosen: string | null, role: "user" | "assistant" | "tool", content: string,
 *   created: number, reasoning?: string, thinkingMs?: number, toolCalls?: ToolCall[], toolCallId?: string,
 *   finish?: string, error?: {kind: string, text: string, retryAfter?: number}, model?: string,
 *   usage?: object, timings?: object,
 * }} Message   `chosen` is the child on the path; siblings are the branches.
 * @typedef {{
 *   id: string, title: string, created: number, updated: number, chosen: string | null, messages: Message[],
 * }} Conversation
 */

export const newId = () => crypto.randomUUID?.() ?? [...crypto.getRandomValues(new Uint8Array(16))]
  .map((byte) => byte.toString(16).padStart(2, "0")).join(""); // randomUUID is absent over plain http

/** @returns {Conversation} */
export function createConversation() {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, chosen: null, messages: [] };
}

/** @returns {Message | undefined} */
export const find = (conversation, id) => conversation.messages.find((message) => message.id === id);

/** Appends a message below `parent` (null: at the root) and leads the path to it. @returns {Message} */
export function add(conversation, parent, fields) {
  const message = { id: newId(), parent, chosen: null, created: Date.now(), content: "", ...fields };
  conversation.messages.push(message);
  choose(conversation, message.id);
  conversation.updated = message.created;
  return message;
}

/** Leads the path through a message; what was chosen below it stays chosen. */
export function choose(conversation, id) {
  for (let message = find(conversation, id); message; message = find(conversation, message.parent)) {
    (find(conversation, message.parent) ?? conversation).chosen = message.id;
  }
}

/** The messages the reader sees, in order. @returns {Message[]} */
export function path(conversation) {
  const byId = new Map(conversation.messages.map((message) => [message.id, message]));
  const seen = [];
  for (let message = byId.get(conversation.chosen); message; message = byId.get(message.chosen)) seen.push(message);
  return seen;
}

/** The branches at a message: itself and what else follows its parent. @returns {Message[]} */
export function siblings(conversation, id) {
  const { parent } = find(conversation, id);
  return conversation.messages.filter((message) => message.parent === parent);
}

/** The calls of an answer that nobody has answered yet. @returns {ToolCall[]} */
export function openCalls(conversation, assistant) {
  const answered = resultsOf(conversation, assistant);
  return (assistant.toolCalls ?? []).filter((call) => !answered.has(call.id));
}

/** Results on the path below an answer, by the call's id. @returns {Map<string, Message>} */
export function resultsOf(conversation, assistant) {
  const results = new Map();
  let message = find(conversation, assistant.chosen);
  for (; message?.role === "tool"; message = find(conversation, message.chosen)) results.set(message.toolCallId, message);
  return results;
}

/** What the chat completions API takes for a path. Thinking goes back with its answer. */
export function toRequest(messages, system) {
  const request = system.trim() ? [{ role: "system", content: system }] : [];
  const unanswered = new Set();
  const answerTheRest = () => { // the API refuses a call without a result
    for (const id of unanswered) request.push({ role: "tool", tool_call_id: id, content: "No result was given." });
    unanswered.clear();
  };
  for (const message of messages) {
    if (message.role === "tool") {
      unanswered.delete(message.toolCallId);
      request.push({ role: "tool", tool_call_id: message.toolCallId, content: message.content });
      continue;
    }
    answerTheRest();
    if (message.role === "user") request.push({ role: "user", content: message.content });
    else if (message.content || message.reasoning || message.toolCalls?.length) request.push(assistantTurn(message));
    message.toolCalls?.forEach((call) => unanswered.add(call.id));
  }
  answerTheRest();
  return request;
}

function assistantTurn(message) {
  const turn = { role: "assistant", content: message.content };
  if (message.reasoning) turn.reasoning_content = message.reasoning;
  if (message.toolCalls?.length) {
    turn.tool_calls = message.toolCalls.map(({ id, name, arguments: text }) => (
      { id, type: "function", function: { name, arguments: text } }));
  }
  return turn;
}

/** A delta's reasoning, under whichever of its two names: vLLM has the short one. */
export const thoughtIn = (delta) => delta.reasoning_content ?? delta.reasoning;

/** Takes one streamed delta into a message. Tool calls come in pieces that carry an index. */
export function takeDelta(message, delta) {
  const thought = thoughtIn(delta);
  if (thought) message.reasoning = (message.reasoning ?? "") + thought;
  if (delta.content) message.content += delta.content;
  for (const piece of delta.tool_calls ?? []) {
    message.toolCalls ??= [];
    const at = piece.index ?? message.toolCalls.length;
    const call = (message.toolCalls[at] ??= { id: piece.id ?? newId(), name: "", arguments: "" });
    if (piece.function?.name) call.name = piece.function.name;
    call.arguments += piece.function?.arguments ?? "";
  }
}

/** A title of at most 60 characters, cut between words. */
export function titleFrom(text) {
  const line = text.trim().split("\n")[0].replace(/\s+/g, " ");
  if (line.length <= 60) return line || "New conversation";
  return line.slice(0, 60).replace(/\s+\S*$/, "") + " …";
}

/** Whether every word of the query stands in the title or in what was said. */
export function matches(conversation, query) {
  const text = [conversation.title, ...conversation.messages.map((message) => message.content)].join("\n").toLowerCase();
  return query.toLowerCase().split(/\s+/).every((word) => text.includes(word));
}

/** Takes a message out that said nothing (a refused request), so that a retry leaves no empty branch. */
export function dropEmpty(conversation, message) {
  if (message.content || message.reasoning || message.toolCalls?.length || message.chosen) return;
  conversation.messages.splice(conversation.messages.indexOf(message), 1);
  const parent = find(conversation, message.parent) ?? conversation;
  parent.chosen = conversation.messages.findLast((other) => other.parent === message.parent)?.id ?? null;
}
