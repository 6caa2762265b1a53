// The chat: messages are kept here, and each answer is a stream of OpenAI's chat completions.
"use strict";
const $ = id => document.getElementById(id);
const turns = [];
let running = null;

const headers = () => {
  const key = $("key").value.trim();
  return {"Content-Type": "application/json", ...(key ? {Authorization: `Bearer ${key}`} : {})};
};

function draw(turn) {
  if (!turn.box) {
    turn.box = document.createElement("div");
    turn.box.className = `turn ${turn.role}`;
    $("messages").append(turn.box);
  }
  turn.box.replaceChildren();
  if (turn.reasoning) {
    const details = document.createElement("details"), summary = document.createElement("summary");
    summary.textContent = "Reasoning";
    details.open = !turn.content;
    details.append(summary, turn.reasoning);
    turn.box.append(details);
  }
  turn.box.append(turn.content || (turn.role === "assistant" && !turn.reasoning ? "…" : ""));
  $("messages").scrollTop = $("messages").scrollHeight;
}

function setRunning(controller) {
  running = controller;
  $("send").disabled = Boolean(controller);
  $("stop").disabled = !controller;
  $("again").disabled = Boolean(controller) || !turns.some(turn => turn.role === "user");
}

function request() {
  const messages = turns.filter(turn => turn.role !== "error").map(({role, content}) => ({role, content}));
  const system = $("system").value.trim();
  if (system) messages.unshift({role: "system", content: system});
  const body = {messages, stream: true, stream_options: {include_usage: true}};
  for (const name of ["temperature", "top_p", "max_tokens", "seed"])
    if ($(name).value !== "") body[name] = Number($(name).value);
  return JSON.stringify(body);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    held += value;
    const blocks = held.split("\n\n");
    held = blocks.pop();
    for (const block of blocks)
      if (block.startsWith("data: ") && block !== "data: [DONE]") yield JSON.parse(block.slice(6));
  }
}

async function answer() {
  const body = request(), controller = new AbortController();
  const turn = {role: "assistant", content: "", reasoning: ""};
  turns.push(turn);
  draw(turn);
  setRunning(controller);
  let first = 0, tokens = 0;
  try {
    const response = await fetch("v1/chat/completions", {method: "POST", headers: headers(), body, signal: controller.signal});
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices.length ? event.choices[0].delta : {};
      turn.content += delta.content || "";
      turn.reasoning += delta.reasoning_content || "";
      if (delta.content || delta.reasoning_content) {
        first = first || performance.now();
        tokens += 1;
        draw(turn);
      }
      const seconds = (performance.now() - first) / 1000;
      if (tokens > 1) $("rate").textContent = `${event.usage ? event.usage.completion_tokens : tokens} tokens, ${((tokens - 1) / seconds).toFixed(1)} tok/s`;
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      const shown = {role: "error", content: error.message};
      turns.push(shown);
      draw(shown);
    }
    if (!turn.content && !turn.reasoning) {
      turns.splice(turns.indexOf(turn), 1);
      turn.box.remove();
    }
  } finally {
    setRunning(null);
    $("prompt").focus();
  }
}

$("ask").addEventListener("submit", event => {
  event.preventDefault();
  const content = $("prompt").value.trim();
  if (!content || running) return;
  $("prompt").value = "";
  const turn = {role: "user", content};
  turns.push(turn);
  draw(turn);
  answer();
});
$("prompt").addEventListener("keydown", event => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && running) running.abort();
});
$("stop").addEventListener("click", () => running && running.abort());
$("again").addEventListener("click", () => {
  while (turns.length && turns[turns.length - 1].role !== "user") turns.pop().box.remove();
  if (turns.length) answer();
});
$("clear").addEventListener("click", () => {
  if (running) running.abort();
  turns.length = 0;
  $("messages").replaceChildren();
  $("rate").textContent = "";
  setRunning(null);
  $("prompt").focus();
});
$("toggle").addEventListener("click", () => {
  const hidden = $("settings").toggleAttribute("hidden");
  $("toggle").setAttribute("aria-expanded", String(!hidden));
});
$("settings").addEventListener("submit", event => event.preventDefault());
$("key").value = sessionStorage.getItem("key") || "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  follow();
});
follow();
