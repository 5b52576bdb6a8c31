// The settings beside the chat, and the body of a request that they make.

import { byId } from "./elements.js";

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

/** The API key. It is kept until this tab is closed. */
export const apiKey = () => byId("key").value.trim();

/** A schema that can't be read. */
export class BadSchema extends Error {}

/** The schema of the answer, or null if none is given. */
function schema() {
  const text = byId("schema").value.trim();
  if (!text) return null;
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new BadSchema(`The schema is not valid JSON: ${error.message}`);
  }
}

/** Fields of a request, but for its messages. Fields that are left empty are not sent. */
export function fields() {
  const found = { model: byId("model").value, stream: byId("stream").checked };
  for (const name of NUMBERS) {
    const value = byId(name).value;
    if (value !== "") found[name] = Number(value);
  }
  if (byId("stop_text").value) found.stop = byId("stop_text").value;
  const given = schema();
  if (given !== null) found.response_format = { type: "json_schema", json_schema: { name: "answer", schema: given } };
  return found;
}

/** The system prompt as messages: one or none. */
export function systemMessages() {
  const text = byId("system").value.trim();
  return text ? [{ role: "system", content: text }] : [];
}

/** Fill in the key of this tab, and check the schema as it is written. */
export function listen(onKey) {
  const key = byId("key");
  key.value = sessionStorage.getItem("key") ?? "";
  key.addEventListener("change", () => {
    sessionStorage.setItem("key", apiKey());
    onKey();
  });
  byId("schema").addEventListener("input", () => showSchemaError());
  if (matchMedia("(max-width: 60rem)").matches) byId("settings").open = false;
}

/** Show what is wrong with the schema; true if something is. */
export function showSchemaError() {
  const field = byId("schema"), note = byId("schema-error");
  let message = "";
  try {
    schema();
  } catch (error) {
    message = error.message;
  }
  note.textContent = message;
  field.setAttribute("aria-invalid", message ? "true" : "false");
  return message !== "";
}
