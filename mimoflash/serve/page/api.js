/** The OpenAI-compatible endpoint: models, and answers as a stream of deltas. */

/**
 * What went wrong, in a kind the page can act on:
 * "unreachable" (no answer at all), "key" (401, 403), "busy" (429, 503), "refused" (other statuses),
 * "failed" (the server said so mid-stream), "cut" (the stream ended before the answer did).
 */
export class ApiError extends Error {
  constructor(kind, message, { status, retryAfter } = {}) {
    super(message);
    Object.assign(this, { kind, status, retryAfter });
  }
}

/** "" is this page's own server; a bare host gets /v1, as OpenAI's clients expect it in the base URL. */
export function endpoint(baseUrl) {
  if (!baseUrl.trim()) return new URL("/v1", location.origin).href;
  const url = new URL(/^https?:\/\//.test(baseUrl.trim()) ? baseUrl.trim() : `http://${baseUrl.trim()}`);
  if (url.pathname === "/") url.pathname = "/v1";
  return url.href.replace(/\/+$/, "");
}

/** @returns {Promise<{id: string, context_length?: number}[]>} */
export async function listModels(server) {
  const response = await request(server, "/models", {});
  const { data } = await response.json();
  return Array.isArray(data) ? data.filter((model) => typeof model?.id === "string") : [];
}

/**
 * Yields {delta}, {finish}, {usage} and {timings} as they come; throws ApiError, or AbortError when `signal` stops it.
 * @param {{baseUrl: string, apiKey: string}} server
 */
export async function* streamChat(server, body, signal) {
  const response = await request(server, "/chat/completions", {
    method: "POST", signal, body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  let finished = false;
  try {
    for await (const data of serverSentData(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError("failed", chunk.error.message ?? String(chunk.error));
      const choice = chunk.choices?.[0];
      if (choice?.delta) yield { delta: choice.delta };
      if (choice?.finish_reason) {
        finished = true;
        yield { finish: choice.finish_reason };
      }
      if (chunk.usage) yield { usage: chunk.usage };
      if (chunk.timings) yield { timings: chunk.timings };
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    if (error instanceof SyntaxError) throw new ApiError("failed", "The server sent something that is not JSON.");
    throw new ApiError("cut", "The connection was lost in the middle of the answer.");
  }
  if (!finished) throw new ApiError("cut", "The connection ended before the answer did.");
}

async function request({ baseUrl, apiKey }, path, options) {
  const headers = { "Content-Type": "application/json" };
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  let response;
  try {
    response = await fetch(endpoint(baseUrl) + path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("unreachable", `No server answers at ${hostOf(baseUrl)}.`);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

function hostOf(baseUrl) {
  try {
    return new URL(endpoint(baseUrl)).host;
  } catch {
    return `“${baseUrl}”, which is no URL`;
  }
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const said = body?.error?.message ?? body?.detail ?? response.statusText;
  const message = typeof said === "string" ? said : JSON.stringify(said);
  const { status } = response;
  if (status === 401 || status === 403) return new ApiError("key", message, { status });
  if (status === 429 || status === 503) {
    return new ApiError("busy", message, { status, retryAfter: secondsUntil(response.headers.get("Retry-After")) });
  }
  return new ApiError("refused", `${message} (HTTP ${status})`, { status });
}

/** Retry-After is seconds or a date. */
function secondsUntil(header) {
  if (!header) return 5;
  const seconds = /^\d+$/.test(header) ? Number(header) : Math.ceil((Date.parse(header) - Date.now()) / 1000);
  return Math.min(Math.max(seconds || 0, 0), 3600);
}

/** The data of each server-sent event, however the bytes were cut. */
async function* serverSentData(stream) {
  let buffer = "";
  let data = [];
  for await (const text of chunksOf(stream.pipeThrough(new TextDecoderStream()))) {
    const lines = (buffer + text).split(/\r\n|\n|\r(?!$)/);
    buffer = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      else if (line === "" && data.length) {
        yield data.join("\n");
        data = [];
      }
    }
  }
  if (data.length) yield data.join("\n");
}

/** Streams are async iterables in Chromium and Firefox, not yet in every Safari. */
async function* chunksOf(stream) {
  const reader = stream.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {}); // leaving the loop early closes the connection
  }
}
