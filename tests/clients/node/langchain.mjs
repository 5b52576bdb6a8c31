import { HumanMessage } from "@langchain/core/messages";
import { tool } from "@langchain/core/tools";
import { ChatOpenAI, OpenAIEmbeddings } from "@langchain/openai";
import { createAgent } from "langchain";
import { z } from "zod";
import { asked, baseURL, embedder, greeting, model, question, request, run } from "./cases.mjs";

const configuration = { baseURL, apiKey: "EMPTY" };
const settings = { model, temperature: 0, apiKey: "EMPTY", configuration, maxRetries: 0 };
const chat = new ChatOpenAI(settings);
const about = (text) => new HumanMessage({ content: asked(text).content });
const schema = z.object({ color: z.string(), shape: z.string(), count: z.number().int() });
const reporter = (taken) =>
  tool(
    (given) => {
      taken.facts = given;
      return "saved";
    },
    { name: "report", description: "Reports a picture.", schema },
  );

await run({
  chat: async () => ({ text: (await chat.invoke(greeting)).content }),
  image: async () => ({ text: (await chat.invoke([about(question)])).content }),
  stream: async () => {
    const pieces = [];
    for await (const chunk of await chat.stream([about(question)])) pieces.push(chunk.content);
    return { text: pieces.join(""), pieces: pieces.length };
  },
  schema: async () => {
    const structured = chat.withStructuredOutput(schema, { method: "jsonSchema" });
    return { facts: await structured.invoke([about(question)]) };
  },
  tools: async () => {
    const [call] = (await chat.bindTools([reporter({})]).invoke([about(request)])).tool_calls;
    return { facts: call.args };
  },
  agent: async () => {
    const taken = {};
    const agent = createAgent({ model: chat, tools: [reporter(taken)] });
    const { messages } = await agent.invoke({ messages: [about(request)] });
    return { text: messages.at(-1).content, facts: taken.facts };
  },
  embeddings: async () => {
    const embeddings = new OpenAIEmbeddings({ model: embedder, apiKey: "EMPTY", configuration });
    const made = await embeddings.embedDocuments(["A red circle.", "Two stars."]);
    return { lengths: made.map((vector) => vector.length) };
  },
  responses: async () => {
    const found = await new ChatOpenAI({ ...settings, useResponsesApi: true }).invoke(greeting);
    return { text: found.text };
  },
});
