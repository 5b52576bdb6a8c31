// The chat: turns, sending, stopping, and what is said to screen readers.

import { byId, make } from "./elements.js";
import { facts } from "./facts.js";
import { images, listen as listenForImages, picture, setImages } from "./images.js";
import { answer, models } from "./server.js";
import { apiKey, fields, listen as listenToSettings, showSchemaError, systemMessages } from "./settings.js";
import { asCurl, asPython, copy } from "./snippets.js";

const turns = byId("turns"), prompt = byId("prompt"), status = byId("status");
/** Messages of the conversation, as the server wants them. */
let messages = [];
/** Stops the answer that is being written. */
let running = null;

function content(text, attached) {
  if (!attached.length) return text;
  const parts = attached.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  return text ? [...parts, { type: "text", text }] : parts;
}

function showUser(text, attached) {
  const pictures = attached.length
    ? make("div", { class: "pictures" }, ...attached.map(picture)) : null;
  const turn = make("li", { class: "turn user" },
    make("p", { class: "who", textContent: "You" }), pictures, make("p", { class: "text", textContent: text }));
  turns.append(turn);
  return turn;
}

function showAssistant(model) {
  const text = make("p", { class: "text" });
  const thoughts = make("p", { class: "thoughts" });
  const details = make("details", { hidden: true }, make("summary", { textContent: "Thoughts" }), thoughts);
  const turn = make("li", { class: "turn assistant", "aria-busy": "true" },
    make("p", { class: "who", textContent: model }), details, text);
  turns.append(turn);
  return { turn, text, thoughts, details };
}

function copyButton(title, snippet) {
  const button = make("button", { type: "button", textContent: title });
  button.addEventListener("click", async () => {
    await copy(snippet());
    button.textContent = "Copied";
    status.textContent = `${title}: copied`;
    setTimeout(() => { button.textContent = title; }, 1500);
  });
  return button;
}

function snippets(body) {
  const hasKey = apiKey() !== "";
  return make("div", { class: "row" },
    copyButton("Copy as curl", () => asCurl(body, hasKey)),
    copyButton("Copy as Python", () => asPython(body, hasKey)));
}

function setRunning(controller) {
  running = controller;
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
}

/** Change what is shown. The view stays at the end if it was there. */
function follow(change) {
  const rest = document.documentElement.scrollHeight - window.innerHeight - window.scrollY;
  change();
  if (rest < 60) window.scrollTo({ top: document.documentElement.scrollHeight });
}

async function send() {
  const text = prompt.value.trim(), attached = images();
  if (running || (!text && !attached.length)) return;
  if (showSchemaError()) return byId("schema").focus();
  const asked = [...messages, { role: "user", content: content(text, attached) }];
  const body = { ...fields(), messages: [...systemMessages(), ...asked] };
  byId("welcome").hidden = true;
  const user = showUser(text, attached);
  const shown = showAssistant(body.model);
  prompt.value = "";
  setImages([]);
  window.scrollTo({ top: document.documentElement.scrollHeight });
  status.textContent = "The answer is being written";
  const controller = new AbortController();
  setRunning(controller);
  byId("stop").focus();
  let usage = null, finish = null;
  try {
    await answer(body, apiKey(), controller.signal, (part) => follow(() => {
      if (part.content) shown.text.append(part.content);
      if (part.reasoning) {
        shown.thoughts.append(part.reasoning);
        shown.details.hidden = false;
      }
      usage = part.usage ?? usage;
      finish = part.finish ?? finish;
    }));
    keep(asked, shown);
  } catch (error) {
    if (error.name === "AbortError") {
      finish = "stopped";
      keep(asked, shown);
    } else {
      fail(error, shown, user, text, attached);
    }
  } finally {
    shown.turn.setAttribute("aria-busy", "false");
    setRunning(null);
    prompt.focus();
  }
  const note = finish === "stopped" ? make("p", { class: "note", textContent: "Stopped." }) : "";
  follow(() => shown.turn.append(usage ? facts(usage, finish) : note, snippets(body)));
}

/** The answer becomes part of the conversation, also if it was stopped. */
function keep(asked, shown) {
  messages = [...asked, { role: "assistant", content: shown.text.textContent }];
  status.textContent = `Answer: ${shown.text.textContent}`;
}

/** Show what went wrong, and let the message be sent again. */
function fail(error, shown, user, text, attached) {
  const message = error.status === 401 ? `${error.message} Put the key into the settings.` : error.message;
  shown.text.after(make("p", { class: "failed", role: "alert", textContent: message }));
  user.classList.add("unsent");
  prompt.value = text;
  setImages(attached);
  status.textContent = "";
}

async function loadModels() {
  const list = byId("model"), note = byId("model-note"), before = list.value;
  try {
    const found = await models(apiKey());
    list.replaceChildren(...found.map(({ id }) => make("option", { value: id, textContent: id })));
    if (found.some(({ id }) => id === before)) list.value = before;
    const describe = () => {
      const length = found.find(({ id }) => id === list.value)?.max_model_len;
      note.textContent = length ? `${length.toLocaleString("en")} tokens of context` : "";
    };
    list.onchange = describe;
    describe();
  } catch (error) {
    note.textContent = error.message;
    if (error.status === 401) {
      byId("settings").open = true;
      byId("key").focus();
    }
  }
}

function newChat() {
  running?.abort();
  messages = [];
  turns.replaceChildren();
  byId("welcome").hidden = false;
  status.textContent = "A new conversation";
  prompt.focus();
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
byId("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
byId("new-chat").addEventListener("click", newChat);
listenForImages();
listenToSettings(loadModels);
loadModels().then(() => document.activeElement === document.body && prompt.focus());
