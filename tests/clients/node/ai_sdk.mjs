import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { PICTURE, baseURL, embedder, greeting, model, question, request, run } from "./cases.mjs";

const provider = createOpenAICompatible({
  name: "sightline",
  baseURL,
  apiKey: "EMPTY",
  supportsStructuredOutputs: true,
});
// The Responses API, which is this provider's default.
const responses = createOpenAI({ baseURL, apiKey: "EMPTY" });
const chat = { model: provider(model), temperature: 0, maxRetries: 0 };
const asked = (text) => [
  { role: "user", content: [{ type: "image", image: PICTURE }, { type: "text", text }] },
];
const schema = z.object({ color: z.string(), shape: z.string(), count: z.number().int() });

const loop = async (options) => {
  let facts;
  const execute = async (given) => {
    facts = given;
    return "saved";
  };
  const report = tool({ description: "Reports a picture.", inputSchema: schema, execute });
  const messages = asked(request);
  const made = await generateText({ ...options, messages, tools: { report }, stopWhen: stepCountIs(4) });
  return { text: made.text, facts };
};

await run({
  chat: async () => ({ text: (await generateText({ ...chat, prompt: greeting })).text }),
  image: async () => ({ text: (await generateText({ ...chat, messages: asked(question) })).text }),
  stream: async () => {
    const pieces = [];
    for await (const piece of streamText({ ...chat, messages: asked(question) }).textStream) pieces.push(piece);
    return { text: pieces.join(""), pieces: pieces.length };
  },
  schema: async () => ({ facts: (await generateObject({ ...chat, messages: asked(question), schema })).object }),
  agent: () => loop(chat),
  embeddings: async () => {
    const made = await embedMany({
      model: provider.textEmbeddingModel(embedder),
      values: ["A red circle.", "Two stars."],
      maxRetries: 0,
    });
    return { lengths: made.embeddings.map((vector) => vector.length) };
  },
  responses: () => loop({ model: responses(model), maxRetries: 0 }),
  completions: async () => {
    const made = await generateText({
      model: provider.completionModel(model),
      prompt: "Three red",
      maxOutputTokens: 4,
      maxRetries: 0,
    });
    return { length: made.text.length };
  },
});
