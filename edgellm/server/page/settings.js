// What a person has set: model, sampling, key, theme. Kept in localStorage, for all conversations.

import { element, icon } from "./dom.js";

const RANGES = [
  { name: "temperature", label: "Temperature", most: 2, step: 0.05, hint: "0: the likeliest token" },
  { name: "top_p", label: "Top p", most: 1, step: 0.01, hint: "1: off" },
  { name: "top_k", label: "Top k", most: 200, step: 1, hint: "0: off" },
  { name: "min_p", label: "Min p", most: 1, step: 0.01, hint: "0: off" },
];
const NUMBERS = [
  { name: "max_tokens", label: "Tokens at most", least: 1, most: 1e6, empty: "no limit" },
  { name: "seed", label: "Seed", least: 0, most: Number.MAX_SAFE_INTEGER, empty: "random" },
];

/** {model, key, system, keepsTokens, sampling: {name: number}}: of sampling only what differs from the model's. */
export const settings = { model: "", key: "", system: "", keepsTokens: false, sampling: {}, ...stored() };

function stored() {
  try {
    const found = JSON.parse(localStorage.getItem("edgellm-settings"));
    return found && typeof found.sampling === "object" && found.sampling ? found : {};
  } catch {
    return {};
  }
}

export function keep() {
  localStorage.setItem("edgellm-settings", JSON.stringify(settings));
}

/** Show sampling's fields, with a model's defaults where nothing is set. */
export function showSampling(defaults) {
  const fields = [...RANGES.map((each) => range(each, defaults[each.name])), ...NUMBERS.map(number)];
  document.getElementById("sampling").replaceChildren(...fields);
}

function range({ name, label, most, step, hint }, fallback = 0) {
  const id = `sampling-${name}`;
  const slider = element("input", { type: "range", min: 0, max: most, step, "aria-label": label, tabindex: -1 });
  const field = element("input", { type: "number", id, min: 0, step: "any", "aria-describedby": `${id}-hint` });
  const made = element("div.range", {}, element("label", { for: id }, label), element("span.hint", { id: `${id}-hint` }, hint), field, slider);
  const show = () => {
    slider.value = field.value = Number((settings.sampling[name] ?? fallback).toFixed(4));
    slider.style.setProperty("--at", `${(100 * slider.value) / most}%`);
    made.classList.toggle("changed", name in settings.sampling);
  };
  const set = (text) => {
    const value = Number(text);
    if (text === "" || !Number.isFinite(value) || value < 0 || value === fallback) delete settings.sampling[name];
    else settings.sampling[name] = step === 1 ? Math.round(value) : value;
    keep();
    show();
  };
  slider.addEventListener("input", () => set(slider.value));
  field.addEventListener("change", () => set(field.value));
  show();
  return made;
}

function number({ name, label, least, most, empty }) {
  const id = `sampling-${name}`;
  const field = element("input", { type: "number", id, min: least, max: most, step: 1, placeholder: empty });
  field.value = settings.sampling[name] ?? "";
  field.addEventListener("change", () => {
    const value = Math.round(Number(field.value));
    if (field.value === "" || !(value >= least && value <= most)) delete settings.sampling[name];
    else settings.sampling[name] = value;
    field.value = settings.sampling[name] ?? "";
    keep();
  });
  return element("div.number", {}, element("label", { for: id }, label), field);
}

/** The button that goes from light to dark and back; what the system says holds until it is used. */
export function themeButton(button) {
  const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const system = matchMedia("(prefers-color-scheme: dark)");
  const show = () => {
    const label = isDark() ? "Light" : "Dark";
    button.replaceChildren(icon(isDark() ? "sun" : "moon"));
    button.setAttribute("aria-label", label);
    button.title = label;
  };
  button.addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = theme;
    localStorage.setItem("edgellm-theme", theme);
    show();
  });
  system.addEventListener("change", show);
  show();
}
