// A request as text to paste elsewhere. The API key is never part of it.

const address = () => new URL("v1", document.baseURI).href;

/** A command of curl. The body comes from standard input: images are longer than an argument may be. */
export function asCurl(body, hasKey) {
  const key = hasKey ? ' \\\n  -H "Authorization: Bearer $API_KEY"' : "";
  const data = JSON.stringify(body, null, 2);
  return `curl ${address()}/chat/completions \\
  -H "Content-Type: application/json"${key} \\
  --data-binary @- <<'END'
${data}
END
`;
}

/** A script for the package `openai`. */
export function asPython(body, hasKey) {
  const known = {}, extra = {};
  for (const [name, value] of Object.entries(body)) (name === "top_k" ? extra : known)[name] = value;
  if (Object.keys(extra).length) known.extra_body = extra;
  const fields = Object.entries(known).map(([name, value]) => `    ${name}=${python(value, 1)},\n`).join("");
  const key = hasKey ? 'os.environ["API_KEY"]' : '"EMPTY"';
  const end = body.stream
    ? `for chunk in answer:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
`
    : "print(answer.choices[0].message.content)\n";
  return `${hasKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${python(address())}, api_key=${key})
answer = client.chat.completions.create(
${fields})
${end}`;
}

/** `value` as Python writes it. */
function python(value, depth = 0) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  // A JSON string is a Python string, but for escapes of half characters, which JSON.stringify writes for broken text only.
  if (typeof value !== "object") return JSON.stringify(value);
  const inner = "    ".repeat(depth + 1), outer = "    ".repeat(depth);
  const items = Array.isArray(value)
    ? value.map((item) => python(item, depth + 1))
    : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${python(item, depth + 1)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  if (!items.length) return open + close;
  return `${open}\n${items.map((item) => `${inner}${item},\n`).join("")}${outer}${close}`;
}

/** Put `text` onto the clipboard, also where the page has no secure address. */
export async function copy(text) {
  if (navigator.clipboard && window.isSecureContext) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const field = document.createElement("textarea");
  field.value = text;
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}
