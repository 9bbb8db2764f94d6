"use strict";
// Asks /v1/completions, or for a chat /v1/chat/completions, for a stream with neighbors and shows, for every chunk,
// what it read. All text goes into the page as text nodes, never as markup.

const RUN = 3; // shared words in a row that count as overlap
const SHADES = 4; // of attention
const NAMES = { live: "Neighbors on", none: "Neighbors off", random: "Random neighbors" };
const element = (id) => document.getElementById(id);
let controller = null;

async function describeModel() {
  const answer = await fetch("/v1/models", { headers: keyHeader() });
  if (answer.status === 401) { element("key-label").hidden = false; return; }
  if (!answer.ok) return;
  const model = (await answer.json()).data[0];
  element("model").textContent = model.id;
  for (const choice of document.querySelectorAll("input[name=mode], #compare option")) {
    choice.disabled = choice.value !== "" && !model.retrieval_modes.includes(choice.value);
  }
  const chosen = document.querySelector("input[name=mode]:checked");
  if (element("compare").selectedOptions[0].disabled || model.retrieval_modes.length < 2) element("compare").value = "";
  if (chosen.disabled) document.querySelector(`input[name=mode][value=${model.retrieval_modes[0]}]`).checked = true;
}

function keyHeader() {
  const key = element("key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function generate(event) {
  event.preventDefault();
  const modes = [document.querySelector("input[name=mode]:checked").value];
  const other = element("compare").value;
  if (other && other !== modes[0]) modes.push(other);
  element("answers").replaceChildren();
  controller = new AbortController();
  running(true, "generating…");
  try {
    await Promise.all(modes.map((mode, number) => answer(mode, number, controller.signal)));
    running(false, "done");
  } catch (error) {
    controller.abort();
    const stopped = error.name === "AbortError";
    running(false, stopped ? "stopped" : error.message, !stopped);
  }
}

function running(active, words, failed = false) {
  element("go").disabled = active;
  element("stop").disabled = !active;
  element("status").textContent = words;
  element("status").classList.toggle("failed", failed);
}

async function answer(mode, number, signal) {
  const prompt = element("prompt").value;
  const chat = element("chat").checked;
  const view = newView(mode, number, prompt, chat);
  const attention = element("attention").checked;
  const asked = chat ? { messages: [{ role: "user", content: prompt }] } : { prompt, attention };
  const body = { ...asked, ...settings(mode), stream: true, retrieval: true, retrieval_mode: mode };
  const response = await fetch(chat ? "/v1/chat/completions" : "/v1/completions", {
    method: "POST", signal, body: JSON.stringify(body), headers: { "Content-Type": "application/json", ...keyHeader() },
  });
  if (response.status === 401) element("key-label").hidden = false;
  if (!response.ok) throw new Error(await errorText(response));
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    for (const choice of event.choices) view.add(choice);
  }
}

// What the fields say; the service has its own values for those that are empty.
function settings(mode) {
  const body = { max_tokens: Number(element("tokens").value), temperature: Number(element("temperature").value) };
  for (const field of document.querySelectorAll("details input[name]")) {
    if (field.value !== "") body[field.name] = Number(field.value);
  }
  const passages = element("passages").value.split(/\n\s*\n/).map((one) => one.trim()).filter(Boolean);
  if (passages.length && mode !== "none") body.passages = passages;
  if (element("stop-text").value) body.stop = element("stop-text").value;
  return body;
}

async function errorText(response) {
  try { return (await response.json()).error.message; } catch { return `${response.status} ${response.statusText}`; }
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function newView(mode, number, prompt, chat) {
  const section = element("answer-template").content.cloneNode(true).firstElementChild;
  section.id = `answer-${number}`;
  const heading = section.querySelector("h2");
  heading.textContent = NAMES[mode];
  heading.id = `answer-${number}-name`;
  section.setAttribute("aria-labelledby", heading.id);
  section.querySelector(".text").setAttribute("aria-labelledby", heading.id);
  section.querySelector(".prompt").textContent = chat ? `${prompt}\n\n` : prompt;
  element("answers").append(section);
  const text = section.querySelector(".new");
  const chunks = [];
  const boxes = [];
  return {
    add(choice) {
      text.append(choice.text ?? choice.delta.content ?? "");
      const found = choice.retrieval || [];
      // with attention all of them come once more, at the end
      const again = found.some((chunk) => chunk.neighbors.some((neighbor) => neighbor.attention));
      if (again) boxes.forEach((box, place) => box.replace(found[place]));
      for (const chunk of again ? found.slice(chunks.length) : found) {
        chunks.push(chunk);
        boxes.push(newChunk(section, chunk));
      }
      // of a chat's prompt, which its template writes, only the chunks are known
      const before = chat ? chunks.map((chunk) => chunk.query).join("") : prompt;
      const whole = before + text.textContent;
      boxes.forEach((box, place) => {
        const last = place >= boxes.length - 2;
        if (last || choice.finish_reason) box.show(textAfter(chunks, place, whole));
      });
      if (choice.finish_reason) {
        section.querySelector(".end").textContent = `ended: ${choice.finish_reason}`;
        section.dataset.ended = choice.finish_reason;
      }
    },
  };
}

// What could read the neighbors of a chunk: the next chunk, or what the text has beyond the last one.
function textAfter(chunks, place, whole) {
  if (place + 1 < chunks.length) return chunks[place + 1].query;
  return whole.slice(chunks.reduce((sum, chunk) => sum + chunk.query.length, 0));
}

function newChunk(section, chunk) {
  section.querySelector("h3").hidden = false;
  const details = document.createElement("details");
  details.className = "chunk";
  const summary = document.createElement("summary");
  const where = document.createElement("span");
  where.className = "where";
  where.textContent = `tokens ${chunk.query_start}–${chunk.query_stop - 1} `;
  summary.append(where, shortened(chunk.query));
  details.append(summary);
  section.querySelector(".chunks").append(details);
  const bodies = chunk.neighbors.map((neighbor) => {
    const box = document.createElement("div");
    box.className = "neighbor";
    const id = document.createElement("span");
    id.className = "id";
    const distance = neighbor.distance === null ? "" : `, distance ${neighbor.distance.toPrecision(4)}`;
    id.textContent = neighbor.id < 0 ? "given passage" : `chunk ${neighbor.id}${distance}`;
    const body = document.createElement("span");
    box.append(id, body);
    details.append(box);
    return { id, body, title: id.textContent };
  });
  if (bodies.length === 0) details.append("no neighbor was found");
  let shown = chunk;
  return {
    replace(newer) { shown = newer; },
    show(after) {
      bodies.forEach(({ id, body, title }, number) => {
        const neighbor = shown.neighbors[number];
        if (neighbor.worth !== null) id.textContent = `${title}, worth ${signed(neighbor.worth)} nats`;
        body.replaceChildren(...highlighted(neighbor.text, shown.query, after, shades(neighbor.attention || [])));
      });
    },
  };
}

function signed(value) {
  return `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;
}

function shortened(text) {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length > 90 ? `${line.slice(0, 87)}…` : line;
}

function words(text) {
  return [...text.matchAll(/[\p{L}\p{N}]+/gu)].map((match) => ({
    word: match[0].toLowerCase(), start: match.index, stop: match.index + match[0].length,
  }));
}

function runsOf(text) {
  const found = words(text).map((one) => one.word);
  const runs = new Set();
  for (let place = 0; place + RUN <= found.length; place += 1) runs.add(found.slice(place, place + RUN).join(" "));
  return runs;
}

// How much each token of a neighbor was attended to, from 0 to SHADES, and where it ends. The first one does not count:
// attention rests there that finds nothing.
function shades(attention) {
  const most = Math.max(0, ...attention.slice(1).map(([, weight]) => weight));
  let stop = 0;
  return attention.map(([piece, weight], place) => {
    stop += piece.length;
    return { stop, weight, shade: place && most > 0 ? Math.round((SHADES * weight) / most) : 0 };
  });
}

// A stretch of the text as nodes, tokens that were attended to underlined.
function shaded(text, start, stop, tokens) {
  const nodes = [];
  let written = start;
  for (const { stop: end, weight, shade } of tokens) {
    if (end <= written || written >= stop) continue;
    const piece = text.slice(written, Math.min(end, stop));
    written += piece.length;
    if (!shade) { nodes.push(piece); continue; }
    const span = document.createElement("span");
    span.className = `read-${shade}`;
    span.title = `attention ${weight.toPrecision(3)}`;
    span.textContent = piece;
    nodes.push(span);
  }
  return written < stop ? [...nodes, text.slice(written, stop)] : nodes;
}

// The neighbor's text as nodes: words in runs that the chunk or the text after it has too are marked.
function highlighted(text, before, after, tokens) {
  const found = words(text);
  const kinds = new Array(found.length).fill("");
  for (const [kind, runs] of [["before", runsOf(before)], ["after", runsOf(after)]]) {
    for (let place = 0; place + RUN <= found.length; place += 1) {
      if (runs.has(found.slice(place, place + RUN).map((one) => one.word).join(" "))) kinds.fill(kind, place, place + RUN);
    }
  }
  const nodes = [];
  let written = 0;
  for (let place = 0; place < found.length; place += 1) {
    if (!kinds[place]) continue;
    let last = place;
    while (kinds[last + 1] === kinds[place]) last += 1;
    nodes.push(...shaded(text, written, found[place].start, tokens));
    const mark = document.createElement("mark");
    mark.className = kinds[place];
    mark.append(...shaded(text, found[place].start, found[last].stop, tokens));
    nodes.push(mark);
    written = found[last].stop;
    place = last;
  }
  return [...nodes, ...shaded(text, written, text.length, tokens)];
}

element("form").addEventListener("submit", generate);
element("stop").addEventListener("click", () => controller && controller.abort());
element("key").addEventListener("change", describeModel);
element("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) element("form").requestSubmit();
});
describeModel();
