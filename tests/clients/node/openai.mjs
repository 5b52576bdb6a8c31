import OpenAI from "openai";
import { asked, baseURL, embedder, greeting, model, parameters, question, request, run } from "./cases.mjs";

const client = new OpenAI({ baseURL, apiKey: "EMPTY", maxRetries: 0 });
const ask = (messages, options = {}) =>
  client.chat.completions.create({ model, messages, temperature: 0, ...options });
const tools = [{ type: "function", function: { name: "report", parameters } }];

await run({
  chat: async () => ({ text: (await ask([{ role: "user", content: greeting }])).choices[0].message.content }),
  image: async () => ({ text: (await ask([asked(question)])).choices[0].message.content }),
  stream: async () => {
    const pieces = [];
    for await (const chunk of await ask([asked(question)], { stream: true }))
      pieces.push(chunk.choices[0]?.delta?.content ?? "");
    return { text: pieces.join(""), pieces: pieces.length };
  },
  schema: async () => {
    const response_format = { type: "json_schema", json_schema: { name: "facts", schema: parameters, strict: true } };
    return { facts: JSON.parse((await ask([asked(question)], { response_format })).choices[0].message.content) };
  },
  tools: async () => {
    const [call] = (await ask([asked(request)], { tools })).choices[0].message.tool_calls;
    return { facts: JSON.parse(call.function.arguments) };
  },
  agent: async () => {
    let facts;
    const report = (given) => {
      facts = given;
      return "saved";
    };
    const runner = client.chat.completions.runTools({
      model,
      messages: [asked(request)],
      temperature: 0,
      tools: [{ type: "function", function: { name: "report", function: report, parse: JSON.parse, parameters } }],
    });
    return { text: await runner.finalContent(), facts };
  },
  embeddings: async () => {
    const made = await client.embeddings.create({ model: embedder, input: ["A red circle.", "Two stars."] });
    return { lengths: made.data.map((entry) => entry.embedding.length) };
  },
  responses: async () => ({ text: (await client.responses.create({ model, input: greeting })).output_text }),
  completions: async () => {
    const made = await client.completions.create({ model, prompt: "Three red", max_tokens: 4 });
    return { length: made.choices[0].text.length };
  },
});
