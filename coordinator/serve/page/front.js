// The front, drawn from server-sent events: a row for each layer, whose colours are the shares of the workers.
"use strict";
const COLOURS = ["#3b7dd8", "#d8432f", "#17a2a2", "#a646c7", "#3f9b45", "#c78a12"];
let following = null;

function swatch(worker) {
  const box = document.createElement("span");
  box.className = "swatch";
  box.style.background = COLOURS[worker % COLOURS.length];
  return box;
}

function size(bytes) {
  return bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : `${Math.round(bytes / 1e6)} MB`;
}

function drawFigures(front) {
  const figures = [
    ["tok/s", front.tokens_ps], ["moves/s", front.moves_ps], ["moves", front.moves], ["without a copy", front.flips],
    ["unused copies", front.unused], ["running", front.running], ["waiting", front.waiting],
    ["memory", size(front.memory)], ["prompt cached", `${Math.round(100 * front.cached)} %`], ["policy", front.policy],
  ];
  document.getElementById("figures").replaceChildren(...figures.map(([name, value]) => {
    const box = document.createElement("div"), term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = name;
    text.textContent = value;
    box.append(term, text);
    return box;
  }));
}

function drawMap(front) {
  const canvas = document.getElementById("map"), layers = front.shares.length, row = layers > 40 ? 8 : 14, left = 34;
  const width = canvas.clientWidth || 400, height = Math.max(1, layers) * row, scale = window.devicePixelRatio || 1;
  canvas.width = width * scale;
  canvas.height = height * scale;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.font = "10px system-ui";
  pen.fillStyle = getComputedStyle(canvas).color;
  front.shares.forEach((shares, layer) => {
    if (row > 10 || layer % 4 === 0) pen.fillText(layer, 6, layer * row + 10);
  });
  front.shares.forEach((shares, layer) => {
    let at = left;
    shares.forEach((share, worker) => {
      pen.fillStyle = COLOURS[worker % COLOURS.length];
      pen.fillRect(at, layer * row + 1, share * (width - left), row - 2);
      at += share * (width - left);
    });
  });
  const total = front.workers.map((_, worker) =>
    front.shares.reduce((sum, shares) => sum + shares[worker], 0) / Math.max(1, layers));
  document.getElementById("map-text").textContent =
    front.workers.map((name, worker) => `${name}: ${Math.round(100 * total[worker])} % of what was computed`).join(", ");
}

function drawWorkers(front) {
  document.getElementById("legend").replaceChildren(...front.workers.map((name, worker) => {
    const box = document.createElement("span");
    box.append(swatch(worker), name);
    return box;
  }));
  document.getElementById("workers").replaceChildren(...front.workers.map((name, worker) => {
    const box = document.createElement("div"), bar = document.createElement("div"), part = document.createElement("i");
    box.className = "worker";
    bar.className = "bar";
    const busy = front.busy.length ? front.busy[worker] : 0;
    part.style.width = `${100 * busy}%`;
    part.style.background = COLOURS[worker % COLOURS.length];
    bar.append(part);
    box.append(`${name}: busy ${Math.round(100 * busy)} % of a pass, ${front.groups[worker]} groups of neurons`, bar);
    return box;
  }));
}

// fetch and not EventSource, which sends no key.
async function follow() {
  if (following) following.abort();
  const controller = following = new AbortController();
  while (!controller.signal.aborted) {
    try {
      const response = await fetch("front", {headers: headers(), signal: controller.signal});
      if (response.status === 401) {
        document.getElementById("model").textContent = "this server wants an API key: see Settings";
        return;
      }
      if (response.ok) {
        for await (const front of events(response)) {
          document.getElementById("model").textContent = front.model;
          drawFigures(front);
          drawMap(front);
          drawWorkers(front);
        }
      }
    } catch (error) {
      if (controller.signal.aborted) return;
    }
    document.getElementById("model").textContent = "not connected";
    await new Promise(resolve => setTimeout(resolve, 1000));
  }
}
