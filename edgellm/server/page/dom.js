// Elements. What a model or a person wrote becomes text nodes only, never markup.

/** element("button.quiet", {type: "button", onclick}, "Copy"); attributes that are null or false are left out. */
export function element(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const made = document.createElement(tag);
  if (classes.length) made.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

/** One of the symbols of index.html. */
export function icon(name) {
  const made = document.createElementNS(SVG, "svg");
  made.setAttribute("class", "icon");
  made.setAttribute("aria-hidden", "true");
  made.append(document.createElementNS(SVG, "use"));
  made.firstChild.setAttribute("href", `#i-${name}`);
  return made;
}

/** A button that is only an icon. */
export function iconButton(name, label, onclick, attributes = {}) {
  return element("button.tool", { type: "button", "aria-label": label, title: label, onclick, ...attributes }, icon(name));
}

/** To the clipboard; pages without TLS from another machine have only the old way. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = element("textarea.hidden", { "aria-hidden": "true" });
  field.value = text;
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  if (!copied) throw new Error("the browser does not let this page copy; select the text instead");
}

export function copyButton(text, label = "Copy") {
  const button = iconButton("copy", label, async () => {
    try {
      await copy(text());
      button.replaceChildren(icon("check"));
      say("Copied");
      setTimeout(() => button.replaceChildren(icon("copy")), 1500);
    } catch (error) {
      toast(error.message);
    }
  });
  return button;
}

/** To those who listen. */
export function say(text) {
  document.getElementById("status").textContent = text;
}

let fading;

/** For some seconds, with something to do about it. */
export function toast(text, action = null, act = null) {
  const shown = document.getElementById("toast");
  clearTimeout(fading);
  const hide = () => (shown.hidden = true);
  shown.replaceChildren(element("span", {}, text));
  if (action) shown.append(element("button.link", { type: "button", onclick: () => (hide(), act()) }, action));
  shown.hidden = false;
  fading = setTimeout(hide, 8000);
}

/** Put something that floats below what it belongs to, or above if there is no room. */
export function place(floating, anchor) {
  const at = anchor.getBoundingClientRect();
  const size = floating.getBoundingClientRect();
  const below = at.bottom + 6 + size.height <= innerHeight - 8;
  floating.style.left = `${Math.max(8, Math.min(at.left, innerWidth - size.width - 8))}px`;
  floating.style.top = `${Math.max(8, below ? at.bottom + 6 : at.top - size.height - 6)}px`;
}

export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
