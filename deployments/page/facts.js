// What an answer cost: tokens, times of the stages, and the images.

import { make } from "./elements.js";

const STAGES = [
  ["fetch", "Fetch"], ["prepare", "Prepare"], ["prompt", "Prompt"], ["encode", "Encode"], ["queue", "Queue"],
  ["prefill", "Prefill"], ["decode", "Decode"],
];

const ms = (value) => (value >= 1000 ? `${(value / 1000).toFixed(2)} s` : `${value.toFixed(value < 10 ? 1 : 0)} ms`);

function number(value, what) {
  return make("span", {}, make("strong", { textContent: value }), ` ${what}`);
}

/** The element that shows a usage with `timings` and `media`, as `include_timings` asks for. */
export function facts(usage, finish) {
  const times = usage.timings ?? {};
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  const numbers = make("p", { class: "numbers" },
    number(usage.prompt_tokens, `prompt tokens, ${cached} cached`),
    number(usage.completion_tokens, usage.completion_tokens === 1 ? "token" : "tokens"),
    times.first_token_ms === undefined ? null : number(ms(times.first_token_ms), "to the first token"),
    times.per_token_ms === undefined ? null : number(ms(times.per_token_ms), "per token"),
    times.total_ms === undefined ? null : number(ms(times.total_ms), "in all"),
    finish && finish !== "stop" ? number(finish, "ended it") : null,
  );
  return make("div", { class: "facts" }, numbers, ...stages(times), media(usage.media ?? []));
}

function stages(times) {
  const found = { ...times };
  // Whatever follows the first token.
  if (times.first_token_ms !== undefined) found.decode_ms = times.total_ms - times.first_token_ms;
  const known = STAGES.filter(([name]) => found[`${name}_ms`] !== undefined);
  if (!known.length) return [];
  const bar = make("div", { class: "stages", "aria-hidden": "true" });
  const legend = make("ul", { class: "legend", "aria-label": "Times of the stages" });
  for (const [name, title] of known) {
    const value = found[`${name}_ms`];
    const part = make("span", { class: name, title: `${title}: ${ms(value)}` });
    part.style.flex = `${Math.max(value, 0)} 0 0`;
    bar.append(part);
    legend.append(make("li", { class: name }, `${title} ${ms(value)}`));
  }
  return [bar, legend];
}

function media(items) {
  if (!items.length) return null;
  const head = ["Image", "Size", "Tokens", "Fetch", "Prepare", "Encode"];
  const rows = items.map((item, index) => make("tr", {},
    make("th", { scope: "row", textContent: `${item.type === "video" ? "Video" : "Image"} ${index + 1}` }),
    ...[
      `${item.width} × ${item.height}`, item.tokens, ms(item.fetch_ms), ms(item.prepare_ms),
      item.cached ? "cached" : ms(item.encode_ms),
    ].map((text) => make("td", { textContent: text })),
  ));
  const table = make("table", {},
    make("caption", { class: "hidden", textContent: "Images of this conversation" }),
    make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col", textContent: text })))),
    make("tbody", {}, ...rows),
  );
  return make("div", { class: "wide" }, table);
}
