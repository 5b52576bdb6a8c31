// The page of the API, made from /openapi.json.

import { byId, make } from "./elements.js";

let schemas = {};

const last = (reference) => reference.split("/").at(-1);

function resolved(schema) {
  return schema?.$ref ? schemas[last(schema.$ref)] ?? {} : schema ?? {};
}

/** A schema's type in a few words. */
function type(schema) {
  if (!schema) return "anything";
  if (schema.$ref) return last(schema.$ref);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  const parts = schema.anyOf ?? schema.oneOf ?? schema.allOf;
  if (parts) return parts.map(type).filter((name) => name !== "null").join(" | ");
  if (schema.type === "array") return `list of ${type(schema.items)}`;
  return schema.type ?? "anything";
}

function fieldTable(schema) {
  const { properties = {}, required = [] } = resolved(schema);
  const names = Object.keys(properties);
  if (!names.length) return make("p", { class: "note", textContent: type(schema) });
  // Required fields first.
  names.sort((a, b) => required.includes(b) - required.includes(a));
  const rows = names.map((name) => {
    const field = properties[name];
    const standard = field.default === undefined || field.default === null ? "" : JSON.stringify(field.default);
    return make("tr", {},
      make("th", { scope: "row" }, make("code", { textContent: name }), required.includes(name) ? " (required)" : ""),
      make("td", { textContent: type(field) }),
      make("td", { textContent: standard }),
      make("td", { textContent: field.description ?? "" }));
  });
  const head = ["Field", "Type", "Default", ""].map((text) => make("th", { scope: "col", textContent: text }));
  return make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
}

function examples(content) {
  const found = Object.entries(content?.examples ?? {}).map(([name, { summary, value }]) => [summary ?? name, value]);
  if (content?.example !== undefined) found.push(["Example", content.example]);
  for (const value of resolved(content?.schema).examples ?? []) found.push(["Example", value]);
  return found.map(([title, value]) => make("div", {},
    make("h3", { textContent: title }),
    make("pre", { tabIndex: 0, textContent: typeof value === "string" ? value : JSON.stringify(value, null, 2) })));
}

function endpoint(path, method, operation) {
  const inside = make("div", { class: "inside" });
  if (operation.description) inside.append(make("p", { textContent: operation.description }));
  for (const [kind, content] of Object.entries(operation.requestBody?.content ?? {})) {
    inside.append(make("h3", { textContent: `Body (${kind})` }), fieldTable(content.schema), ...examples(content));
  }
  for (const [status, response] of Object.entries(operation.responses ?? {})) {
    inside.append(make("h3", { textContent: `${status} ${response.description ?? ""}` }));
    for (const content of Object.values(response.content ?? {})) {
      inside.append(fieldTable(content.schema), ...examples(content));
    }
  }
  return make("details", { class: "endpoint" },
    make("summary", {},
      make("span", { class: "method", textContent: method.toUpperCase() }),
      make("span", { class: "path", textContent: path }),
      make("span", { class: "note", textContent: operation.summary ?? "" })),
    inside);
}

function show(document) {
  schemas = document.components?.schemas ?? {};
  byId("version").textContent = document.info?.version ?? "";
  byId("description").textContent = document.info?.description ?? "";
  const made = Object.entries(document.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => endpoint(path, method, operation)));
  byId("endpoints").replaceChildren(...made);
}

async function load() {
  const key = byId("key").value.trim();
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const response = await fetch("../openapi.json", { headers });
  const found = await response.json();
  byId("problem").textContent = response.ok ? "" : found.error.message;
  if (response.ok) show(found);
}

byId("key").value = sessionStorage.getItem("key") ?? "";
byId("key").addEventListener("change", () => {
  sessionStorage.setItem("key", byId("key").value.trim());
  load();
});
load();
