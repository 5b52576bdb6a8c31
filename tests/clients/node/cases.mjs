// What every client asks. `node FILE USE` prints one JSON object, which the test reads.
export const { SIGHTLINE_URL, PICTURE } = process.env;
export const baseURL = `${SIGHTLINE_URL}/v1`;
export const model = "pocket-tools";
export const embedder = "pocket-embed";
export const greeting = "Hello!";
export const question = "Describe the picture.";
export const request = "Report what you see.";
export const parameters = {
  type: "object",
  properties: { color: { type: "string" }, shape: { type: "string" }, count: { type: "integer" } },
  required: ["color", "shape", "count"],
  additionalProperties: false,
};
export const asked = (text) => ({
  role: "user",
  content: [
    { type: "image_url", image_url: { url: PICTURE } },
    { type: "text", text },
  ],
});

export async function run(uses) {
  const found = await uses[process.argv[2]]();
  console.log(JSON.stringify(found));
}
