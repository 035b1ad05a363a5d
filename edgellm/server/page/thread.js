// Messages as they are seen: one element each, made anew when it changes, and grown while an answer comes.

import { copyButton, element, icon, iconButton } from "./dom.js";
import { show as showMarkdown } from "./markdown.js";
import { showTokens } from "./tokens.js";

/** Why an answer did not come to its end by itself. */
const ENDS = {
  length: "The limit of tokens is reached.",
  stopped: "Stopped.",
  edited: "Edited.",
  dropped: "Not complete: the connection was lost.",
  error: "The server could not answer.",
};

/**
 * A message's element. `act` has what a person may do: {choose, again, goOn, edit, branch}.
 *
 * {node, grow}: `grow` shows what has come of an answer since.
 */
export function messageView(message, { siblings, isRunning, act }) {
  return message.role === "user" ? question(message, siblings, act) : answer(message, siblings, isRunning, act);
}

function question(message, siblings, act) {
  const text = element("div.text", {}, message.text);
  const node = element("li.message.user", { "data-id": message.id }, element("h3.hidden", {}, "You"), text);
  const tools = element(
    "div.tools",
    {},
    versions(message, siblings, act),
    copyButton(() => message.text),
    iconButton("edit", "Edit", () => edit(node, message, "Send", (changed) => act.edit(message, changed))),
  );
  node.append(tools);
  return { node, grow() {} };
}

function answer(message, siblings, isRunning, act) {
  const body = element("div.body");
  const thought = element("div.body");
  const summary = element("summary", {});
  const thoughts = element("details.thought", { hidden: true }, summary, thought);
  const tokens = element("div.tokens", { hidden: true, role: "group", "aria-label": "Tokens; arrows lead from one to the next" });
  const node = element("li.message.assistant", { "data-id": message.id }, element("h3.hidden", {}, "Answer"));
  const said = element("div.said", {}, thoughts, body, tokens);
  node.append(said);
  const grow = () => {
    showMarkdown(body, message.text);
    thoughts.hidden = !message.thought;
    if (!message.thought) return;
    summary.textContent = isRunning && !message.text ? "Thinking…" : "Thoughts";
    showMarkdown(thought, message.thought);
  };
  grow();
  node.classList.toggle("running", isRunning);
  node.setAttribute("aria-busy", isRunning);
  if (isRunning) return { node, grow };

  const button = message.tokens && iconButton("bars", "Probabilities of its tokens", toggle, { "aria-pressed": false });
  said.append(...ending(message, act));
  node.append(
    element(
      "div.tools",
      {},
      versions(message, siblings, act),
      copyButton(() => message.text),
      iconButton("again", "Answer again", () => act.again(message)),
      iconButton("edit", "Edit", () => edit(node, message, "Keep", (changed) => act.edit(message, changed))),
      button ?? null,
      element("span.facts", {}, facts(message)),
    ),
  );
  return { node, grow };

  function toggle() {
    const isOn = tokens.hidden;
    if (isOn) showTokens(tokens, message.tokens, (i, other) => act.branch(message, i, other));
    tokens.hidden = !isOn;
    body.hidden = isOn;
    thoughts.hidden = isOn || !message.thought;
    button.setAttribute("aria-pressed", isOn);
  }
}

function facts({ model, n, speed }) {
  return [model, n && `${n} token${n === 1 ? "" : "s"}`, speed && `${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s`].filter(Boolean).join(" · ");
}

/** What there is to say of an answer that is not complete, and a way on. */
function ending(message, act) {
  if (message.finish === "stop") return [];
  const hasBegun = Boolean(message.text || message.thought);
  const button = element("button.quiet", { type: "button" }, hasBegun ? "Go on" : "Try again");
  button.addEventListener("click", () => act.goOn(message));
  const why = element("p", {}, ENDS[message.finish] ?? "Not complete.");
  const error = message.error ? [element("p.error", {}, message.error)] : [];
  return [element(message.error ? "div.ending.failed" : "div.ending", {}, why, ...error, button)];
}

/** < 2/3 >, where there are several. */
function versions(message, siblings, act) {
  const at = siblings.indexOf(message);
  if (siblings.length < 2) return null;
  const to = (name, label, i) => iconButton(name, label, () => act.choose(siblings[i]), { disabled: !siblings[i] });
  return element("span.versions", {}, to("left", "The one before", at - 1), `${at + 1}/${siblings.length}`, to("right", "The next one", at + 1));
}

/** A field in place of a message's text. */
function edit(node, message, label, done) {
  const shown = [...node.children];
  const field = element("textarea", { "aria-label": "Text", rows: Math.min(16, message.text.split("\n").length + 1) });
  field.value = message.text;
  const close = () => {
    form.replaceWith(...shown);
    shown.at(-1).querySelector(`[aria-label="Edit"]`)?.focus();
  };
  const form = element(
    "form.editing",
    {},
    field,
    element("div.row", {}, element("button.quiet", { type: "button", onclick: close }, "Cancel"), element("button.solid", { type: "submit" }, label)),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (field.value.trim()) done(field.value);
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") event.stopPropagation(), close();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  node.replaceChildren(form);
  field.focus();
}

/** The line that says what the model was told beforehand. */
export function systemView(text) {
  return element("li.message.system", {}, element("details", {}, element("summary", {}, icon("sliders"), "System prompt"), element("div.text", {}, text)));
}
