// A chat with the server that this page comes from. Nothing is fetched from anywhere else, and nothing is kept.

import { bytes, CacheView } from "./cache.js";

const at = (id) => document.getElementById(id);
const view = new CacheView();
const turns = [];
let key = sessionStorage.getItem("key") || "";
let status = null;
let running = null;

async function call(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const reply = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  if (reply.status === 401) at("key-form").hidden = false;
  if (!reply.ok) throw new Error((await reply.json()).error?.message || `status ${reply.status}`);
  return reply;
}

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      yield JSON.parse(part.slice("data: ".length));
    }
  }
}

function notice(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function addTurn(role, text) {
  const turn = element("div", `turn ${role}`);
  turn.append(element("b", "", role === "user" ? "you" : status?.model || "answer"));
  if (text !== undefined) turn.append(element("p", "", text));
  at("turns").append(turn);
  turn.scrollIntoView({ block: "end" });
  return turn;
}

// One answer, or several side by side.
function addSamples(turn, count) {
  if (count === 1) {
    const text = element("p");
    turn.append(text);
    return [{ text, box: text }];
  }
  const grid = element("div", "samples");
  turn.append(grid);
  return Array.from({ length: count }, (_, i) => {
    const box = element("div", "sample");
    const text = element("p");
    const end = element("small", "", `${i + 1}`);
    box.append(end, text);
    grid.append(box);
    return { text, box, end };
  });
}

function showVote(turn, samples, vote) {
  if (vote.index !== null) samples[vote.index].box.classList.add("won");
  const early = vote.stopped_early ? `; ${vote.stopped_early} ended early` : "";
  const tie = vote.tied.length ? `, a tie of ${vote.tied.join(" and ")}` : "";
  const text = vote.answer === null
    ? "Vote: no sample has an answer"
    : `Vote: ${vote.answer}${tie}, by ${vote.weights[vote.answer] ?? 0} of ${vote.voters}${early}`;
  turn.append(element("p", "vote", text));
}

async function send(text) {
  const count = Number(at("samples").value) || 1;
  turns.push({ role: "user", content: text });
  addTurn("user", text);
  const turn = addTurn("assistant");
  const samples = addSamples(turn, count);
  const body = {
    model: status.model,
    messages: turns,
    n: count,
    temperature: Number(at("temperature").value),
    max_tokens: Number(at("tokens").value) || 200,
    stream: true,
    watch: status.watchable,
  };
  if (count > 1 && at("vote").value) body.vote = { answer: at("vote").value };
  running = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  let chosen = 0;
  try {
    const reply = await call("v1/chat/completions", body, running.signal);
    for await (const chunk of events(reply)) {
      if (chunk.error) throw new Error(chunk.error.message);
      for (const choice of chunk.choices) {
        const sample = samples[choice.index];
        sample.text.textContent += choice.delta.content || "";
        if (choice.finish_reason && sample.end) sample.end.textContent = `${choice.index + 1}: ${choice.finish_reason}`;
      }
      if (chunk.cache) view.show(chunk.cache);
      if (chunk.vote) {
        showVote(turn, samples, chunk.vote);
        chosen = chunk.vote.index ?? 0;
      }
      at("turns").scrollTop = at("turns").scrollHeight;
    }
    notice("");
  } catch (error) {
    if (error.name !== "AbortError") notice(error.message);
  } finally {
    running = null;
    at("send").disabled = false;
    at("stop").disabled = true;
    turns.push({ role: "assistant", content: samples[chosen].text.textContent });
  }
}

function showStatus() {
  at("model").textContent = `${status.model} (${status.policy})`;
  at("running").textContent = status.running;
  at("waiting").textContent = status.waiting;
  at("pool").textContent = `${bytes(status.held_bytes)} of ${bytes(status.pool_bytes)}`;
  at("samples").max = Math.min(64, status.most_samples);
  const dial = status.dial;
  at("dial-box").hidden = !dial;
  if (!dial) return;
  at("dial").min = dial.low;
  at("dial").max = dial.high;
  at("dial").disabled = !dial.open;
  if (document.activeElement !== at("dial")) at("dial").value = dial.cr;
  at("dial-value").textContent = Number(dial.cr.toFixed(2));
}

async function watch() {
  try {
    status = await (await call("status")).json();
    at("key-form").hidden = true;
    showStatus();
  } catch (error) {
    notice(error.message);
  }
  setTimeout(watch, 1000);
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = at("text").value.trim();
  if (!text || running || !status) return;
  at("text").value = "";
  send(text);
});
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
at("stop").addEventListener("click", () => running?.abort());
at("clear").addEventListener("click", () => {
  running?.abort();
  turns.length = 0;
  at("turns").replaceChildren();
  view.clear();
  at("text").focus();
});
at("dial").addEventListener("change", async () => {
  try {
    status = await (await call("dial", { cr: Number(at("dial").value) })).json();
    showStatus();
  } catch (error) {
    notice(error.message);
  }
});
at("dial").addEventListener("input", () => {
  at("dial-value").textContent = at("dial").value;
});
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value;
  sessionStorage.setItem("key", key);
  at("key").value = "";
  notice("");
});
watch();
