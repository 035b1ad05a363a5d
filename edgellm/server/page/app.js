// The page: what is shown, what is asked, and the answers under way. Each conversation may have one.

import * as conversations from "./conversations.js";
import { element, say, toast } from "./dom.js";
import { conversationList } from "./list.js";
import { keep, settings, showSampling, themeButton } from "./settings.js";
import { Dropped, Refused, events, get, joined, piece } from "./stream.js";
import { messageView, systemView } from "./thread.js";

const TOP = 8; // alternatives that are kept of each token
const SAVE = 2000; // milliseconds between writes of an answer that comes
const SUGGESTIONS = [
  "Explain why the sky is blue, in two sentences.",
  "Write a haiku about a small computer.",
  "Give me three ideas for a rainy Sunday.",
  "Write a Python function that reverses a string.",
];
const BEGINNINGS = ["Once upon a time", "The little dog was", "One day, a girl named Lily", "It was raining, and"];

const byId = (id) => document.getElementById(id);
const ask = byId("ask");
const scroller = byId("scroller");

let models = []; // [{id, length}]
let props = {}; // of the chosen one
let chosen = Promise.resolve(); // when they are known
let loading = Promise.resolve(); // models, for the first time
let isWaiting = false; // for them, with a question
let shown = conversations.begin(settings.system);
let views = new Map(); // by the ids of messages
const running = new Map(); // {conversation, stop} by the ids of conversations

const list = conversationList({ current: () => shown.id, open, changed });

// Conversations.

async function open(id) {
  shown = running.get(id)?.conversation ?? (id && (await conversations.read(id))) ?? conversations.begin(settings.system);
  try {
    sessionStorage.setItem("edgellm-shown", shown.id);
  } finally {
    show();
    await list.show();
    if (!matchMedia("(pointer: coarse)").matches) ask.focus();
  }
}

/** Of a conversation of the list: another title, or, with null, that it is deleted. Returns it. */
async function changed(id, change) {
  const conversation = shown.id === id ? shown : (running.get(id)?.conversation ?? (await conversations.read(id)));
  if (change) {
    Object.assign(conversation, change);
    await conversations.write(conversation);
    if (shown === conversation) showTitle();
  } else {
    running.get(id)?.stop.abort();
    running.delete(id);
    if (shown === conversation) await open(null);
  }
  return conversation;
}

async function save(conversation) {
  conversation.changed = Date.now();
  try {
    await conversations.write(conversation);
  } catch (error) {
    toast(`The conversation is not kept: ${error.message}. Export it, or delete others.`);
  }
}

/** What another tab has done. */
async function refresh() {
  if (document.hidden) return;
  await list.show();
  const kept = running.has(shown.id) ? null : await conversations.read(shown.id);
  if (!kept || kept.changed <= shown.changed) return;
  shown = kept;
  show();
}

// What is shown.

function show() {
  const messages = conversations.path(shown);
  views = new Map(messages.map((message) => [message.id, view(message)]));
  const system = shown.system && messages.length ? [systemView(shown.system)] : [];
  byId("thread").replaceChildren(...system, ...[...views.values()].map(({ node }) => node));
  byId("welcome").hidden = messages.length > 0;
  byId("system").value = shown.system;
  showTitle();
  showState();
  toEnd();
}

function view(message) {
  const isRunning = running.get(shown.id)?.message === message;
  return messageView(message, { siblings: conversations.siblings(shown, message), isRunning, act });
}

function showTitle() {
  byId("title").textContent = shown.title || "New conversation";
  document.title = shown.title ? `${shown.title} – edgellm` : "edgellm";
}

function showState() {
  const isRunning = running.has(shown.id);
  const send = byId("send");
  send.setAttribute("aria-label", isRunning ? "Stop" : "Send");
  send.title = isRunning ? "Stop (Escape)" : "Send (Enter)";
  send.querySelector("use").setAttribute("href", isRunning ? "#i-stop" : "#i-send");
  send.disabled = !isRunning && (!ask.value.trim() || !models.length);
  byId("keep-tokens").setAttribute("aria-pressed", settings.keepsTokens);
  const last = conversations.path(shown).findLast(({ role }) => role === "assistant");
  showFacts(last?.speed, last?.used);
}

function showFacts(speed, used) {
  const length = models.find(({ id }) => id === settings.model)?.length;
  byId("speed").textContent = speed ? `${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s` : "";
  byId("context").hidden = !used || !length;
  if (!used || !length) return;
  const meter = byId("meter");
  Object.assign(meter, { max: length, low: 0.75 * length, high: 0.9 * length, optimum: 0, value: used });
  byId("used").textContent = `${used.toLocaleString("en")} of ${length.toLocaleString("en")}`;
  meter.title = meter.ariaValueText = `${used} of ${length} tokens of the context`;
}

function showWelcome() {
  const where = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname) ? "on this computer" : `on ${location.hostname}`;
  const length = models.find(({ id }) => id === settings.model)?.length;
  byId("hello").textContent = isChat() ? `Ask ${settings.model}` : `Write with ${settings.model}`;
  const does = isChat() ? `It answers ${where}` : `It has learned to go on with texts, not to answer, and runs ${where}`;
  byId("about").textContent = `${does}${length ? `, and sees up to ${length.toLocaleString("en")} tokens at a time` : ""}.`;
  const suggestions = (isChat() ? SUGGESTIONS : BEGINNINGS).map((text) =>
    element("li", {}, element("button", { type: "button", onclick: () => submit(text) }, text)),
  );
  byId("suggestions").replaceChildren(...suggestions);
  ask.placeholder = isChat() ? `Message ${settings.model}` : "Begin a text";
}

const isAtEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;

function toEnd() {
  scroller.scrollTop = scroller.scrollHeight;
  byId("to-end").hidden = true;
}

function fitField() {
  ask.style.height = "auto";
  ask.style.height = `${Math.min(ask.scrollHeight, innerHeight * 0.4)}px`;
}

// Models.

async function loadModels() {
  try {
    const { data } = await get("v1/models", settings.key);
    models = data.map(({ id, max_model_len }) => ({ id, length: max_model_len }));
  } catch (error) {
    return error.status === 401 ? unlock(error) : failed(error);
  }
  byId("locked").close();
  byId("model").replaceChildren(...models.map(({ id }) => element("option", { value: id }, id)));
  await choose(models.some(({ id }) => id === settings.model) ? settings.model : models[0]?.id);
}

function failed(error) {
  toast(`The models are not known: ${error.message}.`, "Try again", loadModels);
}

function unlock(error) {
  byId("locked-why").textContent = settings.key ? error.message : "Whoever runs it has one. It stays in this browser.";
  if (!byId("locked").open) byId("locked").showModal();
}

function choose(id) {
  return (chosen = chooseModel(id));
}

/** What a model's defaults are, and whether it is one to chat with. */
async function chooseModel(id) {
  if (!id) return toast("The server has no models.", "Look again", loadModels);
  settings.model = byId("model").value = id;
  keep();
  try {
    props = await get(`props?model=${encodeURIComponent(id)}`, settings.key);
  } catch (error) {
    props = {};
    toast(error.message);
  }
  const found = models.find((each) => each.id === id);
  found.length ??= props.default_generation_settings?.n_ctx;
  showSampling(props.default_generation_settings?.params ?? {});
  showWelcome();
  showState();
}

/** A model without a template goes on with texts. */
function isChat() {
  return props.chat_template !== null;
}

// Questions and answers.

const act = {
  choose(message) {
    conversations.choose(shown, message);
    save(shown);
    show();
  },
  again(message) {
    reply(conversations.add(shown, message.parent, { role: "assistant", text: "", thought: "" }));
  },
  goOn(message) {
    reply(message);
  },
  edit(message, text) {
    const made = conversations.add(shown, message.parent, { role: message.role, text });
    if (message.role === "user") return act.again({ parent: made.id });
    made.finish = "edited";
    save(shown);
    return show();
  },
  /** Another answer, with `other` in place of the i-th token, which goes on from there. */
  branch(message, i, other) {
    const tokens = [...message.tokens.slice(0, i), other];
    const said = joined(tokens);
    const isOpen = message.thought && !joined(message.tokens).trimStart().startsWith("<think>");
    const kept = { ...other, top: message.tokens[i].top };
    const made = conversations.add(shown, message.parent, { role: "assistant", ...parted(said, isOpen), tokens: [...message.tokens.slice(0, i), kept] });
    reply(made);
  },
};

/** What was written so far -> what of it is thought, and what is text. */
function parted(said, isOpen) {
  const [before, ...after] = said.split("<think>");
  if (!isOpen && (!after.length || before.trim())) return { thought: "", text: said };
  const [thought, ...text] = (isOpen ? said : after.join("<think>")).split("</think>");
  return { thought, text: text.join("</think>") };
}

/** Ask; as soon as the page knows whom, if it has just been opened. */
async function submit(text) {
  if (running.has(shown.id) || isWaiting) return;
  isWaiting = true;
  await loading;
  isWaiting = false;
  if (!models.length) return;
  if (!shown.title) shown.title = title(text);
  const question = conversations.add(shown, shown.leaf, { role: "user", text });
  ask.value = "";
  fitField();
  act.again({ parent: question.id });
}

/** The first words. */
function title(text) {
  const [line] = text.trim().split("\n");
  return line.length <= 60 ? line : `${line.slice(0, 60).replace(/\s+\S*$/, "")}…`;
}

function request(message, conversation) {
  const before = conversations.path(conversation, message.parent);
  const hasBegun = Boolean(message.text || message.thought);
  const common = { model: settings.model, ...settings.sampling, stream: true, stream_options: { include_usage: true } };
  if (!isChat()) {
    const prompt = [...before, message].map(({ text }) => text).join("");
    const most = settings.sampling.max_tokens ?? 256;
    return ["v1/completions", { ...common, prompt, max_tokens: most, ...(settings.keepsTokens ? { logprobs: TOP } : {}) }];
  }
  const said = ({ role, text, thought }) => ({ role, content: text, ...(thought ? { reasoning_content: thought } : {}) });
  const system = conversation.system ? [{ role: "system", content: conversation.system }] : [];
  const messages = [...system, ...before.map(said), ...(hasBegun ? [said(message)] : [])];
  const wanted = { ...(hasBegun ? { continue_final_message: true } : {}), ...(settings.keepsTokens ? { logprobs: true, top_logprobs: TOP } : {}) };
  return ["v1/chat/completions", { ...common, messages, ...wanted }];
}

/** Ask for an answer, or for the rest of one. */
async function reply(message) {
  const conversation = shown;
  const run = { conversation, message, stop: new AbortController() };
  const began = message.tokens ?? (message.text || message.thought ? [{ text: whole(message) }] : []);
  Object.assign(message, { model: settings.model, finish: null, error: null, tokens: settings.keepsTokens ? began : undefined });
  running.set(conversation.id, run);
  show();
  say("Answering");
  await save(conversation);
  await list.show();
  try {
    await chosen;
    const [path, body] = request(message, conversation);
    for await (const told of events(path, settings.key, body, run.stop.signal)) take(run, piece(told));
    message.finish ??= "stop";
  } catch (error) {
    end(message, error);
  }
  finish(run);
}

function whole({ text, thought }) {
  return thought ? `<think>${thought}${text ? `</think>${text}` : ""}` : text;
}

/** Something of an answer has come. */
function take(run, { text, thought, tokens, finish, usage }) {
  const { message } = run;
  const now = performance.now();
  message.text += text;
  if (thought) message.thought = (message.thought ?? "") + thought;
  message.tokens?.push(...tokens);
  message.finish = finish ?? message.finish;
  if (text || thought || tokens.length) {
    run.first ??= now;
    run.n = (run.n ?? 0) + 1;
    run.last = now;
  }
  if (usage) {
    message.n = (message.n ?? 0) + usage.completion_tokens;
    message.used = usage.total_tokens;
    run.n = usage.completion_tokens;
  }
  if (run.last > run.first) message.speed = (1000 * (run.n - 1)) / (run.last - run.first);
  if (now - (run.saved ?? (run.saved = now)) > SAVE) {
    run.saved = now;
    save(run.conversation);
  }
  run.drawing ??= requestAnimationFrame(() => {
    run.drawing = null;
    draw(run);
  });
}

function draw({ conversation, message }) {
  if (shown !== conversation || !running.has(conversation.id)) return;
  const wasAtEnd = isAtEnd();
  views.get(message.id)?.grow();
  showFacts(message.speed, message.used);
  if (wasAtEnd) toEnd();
  else byId("to-end").hidden = false;
}

/** Why an answer has ended before its end. */
function end(message, error) {
  if (error.name === "AbortError") message.finish = "stopped";
  else if (error instanceof Dropped) [message.finish, message.error] = ["dropped", error.message];
  else if (error instanceof Refused) [message.finish, message.error] = ["error", `${error.message}\n${error.details}`];
  else [message.finish, message.error] = ["error", String(error)];
  if (error.status === 401) unlock(error);
}

function finish(run) {
  const { conversation, message } = run;
  if (running.get(conversation.id) !== run) return; // deleted meanwhile
  if (!message.n && run.n) message.n = run.n;
  running.delete(conversation.id);
  save(conversation).then(list.show);
  if (shown !== conversation) return;
  const wasAtEnd = isAtEnd();
  const made = view(message);
  views.get(message.id)?.node.replaceWith(made.node);
  views.set(message.id, made);
  showState();
  if (wasAtEnd) toEnd();
  say(message.error ? `Error: ${message.error}` : `Answer: ${message.text.slice(0, 2000)}`);
}

// What a person does.

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running.has(shown.id)) running.get(shown.id).stop.abort();
  else if (ask.value.trim()) submit(ask.value);
});
ask.addEventListener("input", () => (fitField(), showState()));
ask.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !matchMedia("(pointer: coarse)").matches) {
    event.preventDefault();
    if (!running.has(shown.id) && ask.value.trim()) submit(ask.value);
  } else if (event.key === "ArrowUp" && !ask.value && !running.has(shown.id)) {
    const edits = document.querySelectorAll(`.user [aria-label="Edit"]`);
    if (edits.length) event.preventDefault(), edits[edits.length - 1].click();
  }
});
document.addEventListener("keydown", (event) => {
  const isElsewhere = document.querySelector("dialog[open], [popover]:popover-open");
  if (event.key === "Escape" && !isElsewhere && !event.defaultPrevented) running.get(shown.id)?.stop.abort();
});
scroller.addEventListener("scroll", () => isAtEnd() && (byId("to-end").hidden = true));
byId("to-end").onclick = toEnd;
byId("model").onchange = ({ target }) => choose(target.value);
byId("keep-tokens").onclick = () => {
  settings.keepsTokens = !settings.keepsTokens;
  keep();
  showState();
};
byId("open-settings").onclick = () => byId("settings").showModal();
byId("close-settings").onclick = () => byId("settings").close();
byId("settings").onclick = (event) => event.target === byId("settings") && byId("settings").close();
byId("system").onchange = ({ target }) => {
  shown.system = settings.system = target.value;
  keep();
  if (shown.leaf) save(shown).then(show);
};
byId("defaults").onclick = () => {
  settings.sampling = {};
  keep();
  showSampling(props.default_generation_settings?.params ?? {});
};
byId("api-key").value = settings.key;
byId("api-key").onchange = ({ target }) => {
  settings.key = target.value.trim();
  keep();
  loadModels();
};
byId("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  settings.key = byId("api-key").value = byId("key").value.trim();
  keep();
  loadModels();
});
document.addEventListener("visibilitychange", refresh);
themeButton(byId("theme"));

loading = open(sessionStorage.getItem("edgellm-shown")).then(loadModels);
await loading;
