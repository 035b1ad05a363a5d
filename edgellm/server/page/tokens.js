// An answer token by token: how likely each was, and what could have stood in its place.

import { element, place } from "./dom.js";
import { joined } from "./stream.js";

function percent(logprob) {
  const p = 100 * Math.exp(logprob);
  return p < 0.001 ? "< 0.001%" : p < 1 ? `${p.toPrecision(1)}%` : `${p.toFixed(1)}%`;
}

/** As it is read: a space and a line's end can be seen, bytes that are no character are numbers. */
function visible({ text, bytes }) {
  if (bytes) return bytes.map((byte) => `\\x${byte.toString(16).padStart(2, "0")}`).join("");
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ | $/g, "·");
}

/** Make `into` show tokens; `branch(i, other)` is called for an alternative that is chosen in place of the i-th. */
export function showTokens(into, tokens, branch) {
  const made = tokens.map((token, i) => {
    if (!token.top) return document.createTextNode(token.text);
    const label = `${visible(token)}, ${percent(token.logprob)}`;
    const span = element("span.token", { role: "button", tabindex: -1, "data-i": i, "aria-label": label, "aria-haspopup": "dialog" });
    span.append(token.bytes ? visible(token) : token.text.replaceAll("\n", "↵\n"));
    span.style.setProperty("--surprise", (1 - Math.exp(token.logprob)).toFixed(3));
    return span;
  });
  into.replaceChildren(...made);
  const spans = made.filter((each) => each instanceof Element);
  spans[0]?.setAttribute("tabindex", 0);
  const open = (span) => showAlternatives(span, tokens, Number(span.dataset.i), branch);
  into.onclick = (event) => {
    const span = event.target.closest(".token");
    if (span) go(span), open(span);
  };
  into.onkeydown = (event) => {
    const at = spans.indexOf(event.target);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (at < 0 || (next === undefined && event.key !== "Enter" && event.key !== " ")) return;
    event.preventDefault();
    if (next === undefined) open(event.target);
    else if (spans[next]) go(spans[next]);
  };

  /** One of them is in the order of tabs; arrows lead to the others. */
  function go(span) {
    spans.forEach((each) => each.setAttribute("tabindex", each === span ? 0 : -1));
    span.focus();
  }
}

function showAlternatives(span, tokens, i, branch) {
  const panel = document.getElementById("token");
  const token = tokens[i];
  const isTaken = (other) => other.text === token.text && String(other.bytes) === String(token.bytes);
  const taken = token.top.find(isTaken);
  const rows = [...token.top, ...(taken ? [] : [token])].map((each) => alternative(each, each === (taken ?? token)));
  panel.replaceChildren(
    element("header", {}, element("code", {}, visible(token)), element("span", {}, percent(token.logprob))),
    element("ul", {}, ...rows),
    element("p.hint", {}, branch ? "As the model has it, before sampling. Choose another to go on from there." : "As the model has it, before sampling."),
  );
  panel.showPopover();
  place(panel, span);
  panel.querySelector("button:not(:disabled)")?.focus();
  panel.ontoggle = (event) => event.newState === "closed" && span.isConnected && panel.contains(document.activeElement) && span.focus();

  function alternative(other, isChosen) {
    // Half a character cannot be gone on from: it is no text.
    const canBranch = branch && !isChosen && !joined([...tokens.slice(0, i), other]).includes("\ufffd");
    const bar = element("span.bar");
    bar.style.setProperty("--p", Math.exp(other.logprob).toFixed(4));
    const choose = () => (panel.hidePopover(), branch(i, other));
    const content = [element("code", {}, visible(other)), bar, element("span.percent", {}, percent(other.logprob))];
    const label = `${visible(other)}, ${percent(other.logprob)}${isChosen ? ", as written" : ""}`;
    return element("li", {}, element("button", { type: "button", disabled: !canBranch, "aria-current": isChosen && "true", "aria-label": label, onclick: choose }, ...content));
  }
}
