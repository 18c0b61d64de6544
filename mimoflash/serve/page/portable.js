/** Conversations as a file, out and in. What comes in is rebuilt field by field: a file is somebody else's. */

const FORMAT = "mimoflash-conversations";
const ROLES = ["user", "assistant", "tool"];

/** @returns {string} the text of an export file */
export const toFile = (conversations) => JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);

/** @returns {import("./conversation.js").Conversation[]} or throws an Error that says what is wrong with the file */
export function fromFile(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("not JSON");
  }
  if (file?.format !== FORMAT) throw new Error(`no export of this page (its "format" is not "${FORMAT}")`);
  if (file.version !== 1) throw new Error(`version ${file.version} is unknown here; this page reads version 1`);
  if (!Array.isArray(file.conversations)) throw new Error('"conversations" is not a list');
  return file.conversations.map((conversation, at) => {
    try {
      return checkedConversation(conversation);
    } catch (error) {
      throw new Error(`conversation ${at + 1}: ${error.message}`);
    }
  });
}

function checkedConversation(raw) {
  if (!Array.isArray(raw?.messages)) throw new Error('"messages" is not a list');
  const messages = raw.messages.map(checkedMessage);
  const byId = new Map(messages.map((message) => [message.id, message]));
  if (byId.size < messages.length) throw new Error("two messages have one id");
  const seen = new Set([null]);
  for (const message of messages) { // parents stand before children, so a circle cannot be written down
    if (!seen.has(message.parent)) throw new Error(`message ${message.id} has no parent before it`);
    seen.add(message.id);
  }
  const child = (id, parent) => (byId.get(id)?.parent === parent ? id : lastChild(messages, parent));
  for (const message of messages) message.chosen = child(message.chosen, message.id);
  return {
    id: identifier(raw.id, "id"), title: text(raw.title, "title"), created: number(raw.created, "created"),
    updated: number(raw.updated, "updated"), chosen: child(raw.chosen, null), messages,
  };
}

const lastChild = (messages, parent) => messages.findLast((message) => message.parent === parent)?.id ?? null;

function checkedMessage(raw, at) {
  const where = `message ${at + 1}: `;
  if (!ROLES.includes(raw?.role)) throw new Error(`${where}role is none of ${ROLES.join(", ")}`);
  const message = {
    id: identifier(raw.id, `${where}id`), parent: raw.parent === null ? null : identifier(raw.parent, `${where}parent`),
    chosen: raw.chosen ?? null, role: raw.role, content: text(raw.content, `${where}content`),
    created: number(raw.created, `${where}created`),
  };
  for (const key of ["reasoning", "toolCallId", "finish", "model"]) {
    if (raw[key] !== undefined) message[key] = text(raw[key], where + key);
  }
  if (raw.thinkingMs !== undefined) message.thinkingMs = number(raw.thinkingMs, `${where}thinkingMs`);
  if (raw.toolCalls !== undefined) {
    if (!Array.isArray(raw.toolCalls)) throw new Error(`${where}toolCalls is not a list`);
    message.toolCalls = raw.toolCalls.map((call) => ({
      id: text(call?.id, `${where}call id`), name: text(call.name, `${where}call name`),
      arguments: text(call.arguments, `${where}call arguments`),
    }));
  }
  if (raw.error) message.error = { kind: text(raw.error.kind, `${where}error`), text: text(raw.error.text, `${where}error`) };
  if (raw.usage) message.usage = numbers(raw.usage);
  if (raw.timings) message.timings = numbers(raw.timings);
  return message;
}

/** Counts, and groups of counts, as the server reports them; the rest is dropped. */
const numbers = (raw) => Object.fromEntries(Object.entries(raw).flatMap(([name, value]) => {
  if (Number.isFinite(value)) return [[name, value]];
  return value && typeof value === "object" ? [[name, numbers(value)]] : [];
}));

function text(value, name) {
  if (typeof value !== "string") throw new Error(`${name} is not a text`);
  return value;
}

function number(value, name) {
  if (!Number.isFinite(value)) throw new Error(`${name} is not a number`);
  return value;
}

function identifier(value, name) {
  if (!/^[\w-]{1,64}$/.test(value)) throw new Error(`${name} is not an identifier`);
  return value;
}
