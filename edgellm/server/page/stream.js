// What the server is asked, and what it tells.

/** The server has refused, and said why. */
export class Refused extends Error {
  constructor(status, { message, type, param, code } = {}) {
    super(message || `the server answered with status ${status}`);
    this.status = status;
    this.details = [status, type, param && `param ${param}`, code && `code ${code}`].filter(Boolean).join(" · ");
  }
}

/** The server is not there, or no longer. */
export class Dropped extends Error {}

/** Of a path, relative to the page: JSON. */
export async function get(path, key) {
  return (await request(path, key)).json();
}

/** The events of a stream, as objects. Raises Refused, Dropped, or the signal's AbortError. */
export async function* events(path, key, body, signal) {
  const response = await request(path, key, { method: "POST", body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reachable(reader.read(), "the connection was lost");
    if (done) throw new Dropped("the connection ended before the answer did");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (!line.startsWith("data: ")) continue;
      const told = JSON.parse(line.slice(6));
      if (told.error) throw new Refused(response.status, told.error);
      yield told;
    }
  }
}

async function request(path, key, options = {}) {
  const headers = { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const response = await reachable(fetch(path, { ...options, headers }), "the server cannot be reached");
  if (response.ok) return response;
  const body = await response.text();
  let error;
  try {
    error = JSON.parse(body).error;
  } catch {
    error = { message: body.slice(0, 2000) };
  }
  throw new Refused(response.status, error);
}

async function reachable(promise, otherwise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Dropped(`${otherwise} (${error.message})`);
  }
}

/** An event of chats or of completions -> {text, thought, tokens, finish, usage}. */
export function piece(event) {
  const choice = event.choices?.[0] ?? {};
  return {
    text: choice.delta?.content ?? choice.text ?? "",
    thought: choice.delta?.reasoning_content ?? "",
    tokens: choice.logprobs ? tokens(choice.logprobs) : [],
    finish: choice.finish_reason ?? null,
    usage: event.usage ?? null,
  };
}

/** [{text, logprob, bytes?, top: [{text, logprob, bytes?}]}]: bytes only where they are no characters of their own. */
function tokens(logprobs) {
  if (logprobs.content) return logprobs.content.map((each) => ({ ...token(each), top: each.top_logprobs.map(token) }));
  return logprobs.tokens.map((text, i) => ({
    text,
    logprob: logprobs.token_logprobs[i] ?? 0,
    top: Object.entries(logprobs.top_logprobs[i] ?? {}).map(([text, logprob]) => ({ text, logprob })).sort((a, b) => b.logprob - a.logprob),
  }));
}

function token({ token, logprob, bytes }) {
  return { text: token, logprob, ...(token.includes("\ufffd") ? { bytes } : {}) };
}

const encoder = new TextEncoder();

/** The text of tokens one after another; characters may be spread over several. */
export function joined(tokens) {
  const bytes = tokens.flatMap((each) => each.bytes ?? [...encoder.encode(each.text)]);
  return new TextDecoder().decode(new Uint8Array(bytes));
}
