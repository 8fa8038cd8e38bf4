"use strict";
// The rater's page. The law: a vote is in localStorage before it is sent, and there until the server says that it has
// it; it carries a key, so however often it is sent it counts once. The next pair appears only after that.

const RATER = "curation-rater";
const PENDING = "curation-pending-vote";
const ANSWERS = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "unsure" };
const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 8000;

const at = (id) => document.getElementById(id);
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const answered = new Set(); // pairs whose vote the server has, in case an older queue comes in late
const images = new Map(); // pair -> promise of its two images, decoded
let me = JSON.parse(localStorage.getItem(RATER) || "null");
let queue = [];
let undoable = null;
let current = null;
let shownAt = 0;
let busy = true;

class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

async function ask(path, body) {
  const answer = await fetch(path, {
    method: body ? "POST" : "GET",
    headers: { "Content-Type": "application/json", "X-Rater": me ? me.secret : "" },
    body: body && JSON.stringify(body),
  });
  if (answer.status >= 500) throw new TypeError("the server failed");
  const told = await answer.json();
  if (!answer.ok) throw new Refused(answer.status, told.detail);
  return told;
}

// Asks until there is an answer: a server that is away comes back. A refusal is an answer.
async function askUntil(path, body, waiting) {
  for (let wait = FIRST_WAIT_MS; ; wait = Math.min(2 * wait, LONGEST_WAIT_MS)) {
    try {
      return await ask(path, body);
    } catch (error) {
      if (error instanceof Refused) throw error;
      say(waiting);
      await sleep(wait);
    }
  }
}

function say(text) {
  at("said").textContent = text;
}

// As the button says it: on a phone the left image is the upper one.
function nameOf(answer) {
  if (answer === "unsure") return "not sure";
  const word = [...at(answer).querySelectorAll(".beside, .below")].find((span) => span.offsetParent !== null);
  return word ? `${word.textContent.toLowerCase()} image` : `${answer} image`;
}

function newKey() {
  // Not crypto.randomUUID: browsers withhold it from pages that come without TLS.
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function take(state) {
  queue = state.queue.filter((pair) => !answered.has(pair.id));
  undoable = state.undo;
  at("undo").disabled = undoable === null;
  at("yours").textContent = `${state.votes} ${state.votes === 1 ? "vote" : "votes"} from you; all together`;
  at("study").value = state.wanted ? state.gained / state.wanted : 1;
  at("study").textContent = `${state.gained} of ${state.wanted}`;
  queue.forEach(load);
}

function load(pair) {
  if (images.has(pair.id)) return images.get(pair.id);
  const two = Promise.all(["left", "right"].map(async (side) => {
    const image = new Image();
    image.alt = "";
    image.src = pair[side];
    await image.decode();
    return image;
  }));
  two.catch(() => images.delete(pair.id)); // asked for again when it is its turn
  images.set(pair.id, two);
  return two;
}

function only(shown) {
  for (const id of ["who", "pair", "end"]) at(id).hidden = id !== shown;
  at("controls").hidden = shown === "who";
  at("unsure").hidden = shown !== "pair";
  at("who-line").hidden = shown === "who";
}

async function topUp() {
  take(await askUntil("/api/queue", null, "No connection. Trying again …"));
}

async function show() {
  for (let wait = FIRST_WAIT_MS; ; wait = Math.min(2 * wait, LONGEST_WAIT_MS)) {
    if (!queue.length) await topUp();
    current = queue[0] || null;
    if (!current) return only("end");
    try {
      const [left, right] = await load(current);
      at("left-frame").replaceChildren(left);
      at("right-frame").replaceChildren(right);
      break;
    } catch {
      say("An image does not load. Trying again …");
      await sleep(wait);
      queue = [];
    }
  }
  at("left-caption").textContent = current.left_caption;
  at("right-caption").textContent = current.right_caption;
  for (const id of ["left", "right", "unsure"]) at(id).classList.remove("chosen");
  only("pair");
  shownAt = performance.now();
}

// One step at a time: `step` changes the queue, then the next pair is shown and more are fetched behind it.
async function inTurn(step) {
  if (busy) return;
  busy = true;
  document.body.classList.add("busy");
  try {
    await step();
    await show();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    await refused(error);
  } finally {
    busy = false;
    document.body.classList.remove("busy");
  }
  if (current && queue.length < 3) topUpBehind();
}

async function topUpBehind() {
  const before = current;
  try {
    const state = await ask("/api/queue");
    if (current === before && !busy) take(state);
  } catch {
    // The next step asks again.
  }
}

async function refused(error) {
  if (error.status === 401) return location.reload();
  if (error.status === 404) return whoAreYou("");
  if (error.status === 409) {
    // Voted in another tab, or taken back: the server's word counts.
    say("This had moved on elsewhere. Here is where you are.");
    queue = [];
    return show();
  }
  say(error.message);
}

async function send(pending) {
  let state;
  try {
    state = await askUntil("/api/vote", pending, "No connection. Your vote is kept, and sent again …");
  } catch (error) {
    if (error.status !== 401) localStorage.removeItem(PENDING); // after the token it is sent again
    throw error;
  }
  localStorage.removeItem(PENDING);
  answered.add(pending.pair);
  images.delete(pending.pair);
  take(state);
  say(`Saved: ${nameOf(pending.answer)}.`);
}

function vote(answer) {
  if (busy || !current || at("pair").hidden) return;
  const seconds = (performance.now() - shownAt) / 1000;
  const pending = { pair: current.id, answer, key: newKey(), seconds };
  at(answer).classList.add("chosen");
  localStorage.setItem(PENDING, JSON.stringify(pending));
  inTurn(() => send(pending));
}

function undo() {
  if (busy || undoable === null) return;
  inTurn(async () => {
    const state = await askUntil("/api/undo", { vote: undoable }, "No connection. Trying again …");
    answered.clear();
    take(state);
    say("Your last vote is taken back. Here is the pair again.");
  });
}

function whoAreYou(text) {
  me = null;
  current = null;
  localStorage.removeItem(RATER);
  only("who");
  say(text);
  at("name").focus();
}

function begin() {
  at("who-name").textContent = me.name;
  say("");
  busy = false;
  inTurn(async () => {
    const pending = JSON.parse(localStorage.getItem(PENDING) || "null");
    if (pending) await send(pending).catch((error) => { if (error.status !== 409) throw error; });
    await topUp();
  });
}

at("who").addEventListener("submit", async (event) => {
  event.preventDefault();
  const name = at("name").value;
  try {
    const { rater } = await ask("/api/rater", { name });
    me = { name, secret: rater };
    localStorage.setItem(RATER, JSON.stringify(me));
    begin();
  } catch (error) {
    if (error.status === 401) return location.reload();
    at("name").setCustomValidity(error instanceof Refused ? error.message : "No connection. Try again.");
    at("name").reportValidity();
  }
});
at("name").addEventListener("input", () => at("name").setCustomValidity(""));
at("leave").addEventListener("click", () => { if (!busy) whoAreYou(""); });
at("undo").addEventListener("click", undo);
for (const answer of ["left", "right", "unsure"]) at(answer).addEventListener("click", () => vote(answer));
document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "INPUT") return;
  if (event.key in ANSWERS && !at("pair").hidden) {
    event.preventDefault();
    vote(ANSWERS[event.key]);
  } else if (event.key === "Backspace" && !at("controls").hidden) {
    event.preventDefault();
    undo();
  }
});

if (me) begin();
else whoAreYou("");
