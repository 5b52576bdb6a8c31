// Calls of the server: its models, and answers whole or as they are written.

/** An answer of the server that says what went wrong. */
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

function headers(key) {
  const found = { "Content-Type": "application/json" };
  if (key) found.Authorization = `Bearer ${key}`;
  return found;
}

async function failure(response) {
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // No error of the application: a proxy in front of it may have answered.
  }
  return new ServerError(message, response.status);
}

/** The models that can chat or not, as `/v1/models` lists them. */
export async function models(key) {
  const response = await fetch("v1/models", { headers: headers(key) });
  if (!response.ok) throw await failure(response);
  return (await response.json()).data;
}

/**
 * Ask for an answer.
 *
 * Calls `onPart` with each new piece: `{content}`, `{reasoning}`, `{finish}` or `{usage}`. A whole answer comes as
 * the same pieces.
 */
export async function answer(body, key, signal, onPart) {
  const sent = { ...body, include_timings: true };
  const response = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(key), body: JSON.stringify(sent), signal,
  });
  if (!response.ok) throw await failure(response);
  if (!body.stream) {
    const { choices: [choice], usage } = await response.json();
    tell(choice.message, choice.finish_reason, usage, onPart);
    return;
  }
  for await (const data of events(response.body)) {
    if (data.error) throw new ServerError(data.error.message, 200);
    const choice = data.choices[0];
    tell(choice?.delta ?? {}, choice?.finish_reason, data.usage, onPart);
  }
}

function tell(message, finish, usage, onPart) {
  if (message.reasoning_content) onPart({ reasoning: message.reasoning_content });
  if (message.content) onPart({ content: message.content });
  if (finish) onPart({ finish });
  if (usage) onPart({ usage });
}

/** The JSON objects of a stream of server-sent events. */
async function* events(stream) {
  const decoder = new TextDecoder();
  const reader = stream.getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    waiting += done ? decoder.decode() : decoder.decode(value, { stream: true });
    const blocks = waiting.split("\n\n");
    waiting = blocks.pop();
    for (const block of blocks) {
      const data = block.replace(/^data: /, "");
      if (data === "[DONE]") return;
      if (block.startsWith("data: ")) yield JSON.parse(data);
    }
    if (done) throw new ServerError("The connection ended before the answer did.", 200);
  }
}
