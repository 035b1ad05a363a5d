// Markdown -> elements. Of a model's text nothing is ever parsed as HTML, and no link leads to but the web or a mail.

import { copyButton, element } from "./dom.js";

const DEEPEST = 8; // lists and quotes within each other
const FARTHEST = 400; // parts back in which an opening * or [ is looked for: time stays linear

const FENCE = /^( {0,3})(`{3,}|~{3,}) *([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?: +|$)/;
const DELIMITERS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const BLANK = /^[ \t]*$/;

/** Make `into` show `text`. Blocks that are as they were are left alone, so that a stream costs what is new. */
export function show(into, text) {
  const blocks = parse(text.replace(/\r\n?/g, "\n").split("\n"));
  blocks.forEach((block, i) => {
    const old = into.children[i];
    if (old?.source === block.source && old.kind === block.kind) return;
    const made = render(block);
    [made.source, made.kind] = [block.source, block.kind];
    if (old) old.replaceWith(made);
    else into.append(made);
  });
  while (into.children.length > blocks.length) into.lastChild.remove();
}

// Lines -> blocks: {kind, source, ...}.

function parse(lines, depth = 0) {
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    if (BLANK.test(lines[i])) {
      i++;
      continue;
    }
    const begin = i;
    const block = (depth < DEEPEST && (fence() || heading() || rule() || quote() || list() || code() || table())) || paragraph();
    block.source = lines.slice(begin, i).join("\n");
    blocks.push(block);

    function fence() {
      const found = FENCE.exec(lines[i]);
      if (!found) return null;
      const [, indent, marks, language] = found;
      const end = new RegExp(`^ {0,3}\\${marks[0]}{${marks.length},}[ \\t]*$`);
      const inside = [];
      for (i++; i < lines.length && !end.test(lines[i]); i++) inside.push(lines[i].replace(new RegExp(`^ {0,${indent.length}}`), ""));
      i++;
      return { kind: "code", text: inside.join("\n"), language: language.trim().split(/\s/)[0] };
    }

    function heading() {
      const found = HEADING.exec(lines[i]);
      return found && (i++, { kind: "heading", level: found[1].length, text: found[2] ?? "" });
    }

    function rule() {
      return RULE.test(lines[i]) ? (i++, { kind: "rule" }) : null;
    }

    function quote() {
      if (!QUOTE.test(lines[i])) return null;
      const inside = [];
      for (; i < lines.length && (QUOTE.test(lines[i]) || !begins(lines[i])); i++) inside.push(lines[i].replace(QUOTE, ""));
      return { kind: "quote", blocks: parse(inside, depth + 1) };
    }

    function list() {
      const first = ITEM.exec(lines[i]);
      if (!first) return null;
      const isOrdered = first[2].length > 1;
      const items = [];
      let isLoose = false;
      while (i < lines.length) {
        const found = ITEM.exec(lines[i]);
        if (!found || found[2].length > 1 !== isOrdered || found[1].length > first[1].length + 1 || RULE.test(lines[i])) break;
        const inside = [lines[i].slice(found[0].length)];
        const isInside = (line) => /^ */.exec(line)[0].length >= found[1].length + 2;
        for (i++; i < lines.length; i++) {
          if (BLANK.test(lines[i])) {
            const next = lines.slice(i).find((line) => !BLANK.test(line));
            if (next === undefined || !isInside(next)) break;
            isLoose ||= !ITEM.test(next);
          } else if (!isInside(lines[i]) && begins(lines[i])) break;
          inside.push(lines[i].replace(new RegExp(`^ {0,${found[0].length}}`), ""));
        }
        items.push(inside);
        let next = i;
        while (next < lines.length && BLANK.test(lines[next])) next++;
        if (next < lines.length && ITEM.test(lines[next])) i = next;
      }
      const start = isOrdered ? parseInt(first[2]) : 1;
      return { kind: "list", isOrdered, start, isLoose, items: items.map((inside) => parse(inside, depth + 1)) };
    }

    function code() {
      if (!/^ {4}|^\t/.test(lines[i])) return null;
      const inside = [];
      for (; i < lines.length && /^ {4}|^\t|^[ \t]*$/.test(lines[i]); i++) inside.push(lines[i].replace(/^ {4}|^\t/, ""));
      return { kind: "code", text: inside.join("\n").trimEnd(), language: "" };
    }

    function table() {
      if (!lines[i].includes("|") || !DELIMITERS.test(lines[i + 1] ?? "")) return null;
      const head = cells(lines[i]);
      const aligned = cells(lines[i + 1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : null));
      if (aligned.length !== head.length) return null;
      const rows = [];
      for (i += 2; i < lines.length && lines[i].includes("|") && !BLANK.test(lines[i]); i++) rows.push(cells(lines[i]));
      return { kind: "table", head, aligned, rows };
    }

    function paragraph() {
      const inside = [lines[i++].trim()];
      while (i < lines.length && !begins(lines[i])) {
        if (/^ {0,3}=+[ \t]*$/.test(lines[i])) return i++, { kind: "heading", level: 1, text: inside.join("\n") };
        inside.push(lines[i++].replace(/^[ \t]+/, ""));
      }
      return { kind: "paragraph", text: inside.join("\n").trimEnd() };
    }
  }
  return blocks;
}

/** Whether a line ends a paragraph. */
function begins(line) {
  return BLANK.test(line) || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

// Blocks -> elements.

const RENDERERS = {
  heading: ({ level, text }) => element(`h${Math.min(level + 2, 6)}.level${level}`, {}, inline(text)),
  paragraph: ({ text }) => element("p", {}, inline(text)),
  rule: () => element("hr"),
  quote: ({ blocks }) => element("blockquote", {}, ...blocks.map(render)),
  code: ({ text, language }) =>
    element(
      "figure.code",
      {},
      element("figcaption", {}, element("span", {}, language), copyButton(() => text, "Copy code")),
      element("pre", { tabindex: 0 }, element("code", {}, text)),
    ),
  table: ({ head, aligned, rows }) => {
    const row = (cell, texts) =>
      element("tr", {}, ...head.map((_, i) => element(aligned[i] ? `${cell}.${aligned[i]}` : cell, {}, inline(texts[i] ?? ""))));
    const table = element("table", {}, element("thead", {}, row("th", head)), element("tbody", {}, ...rows.map((texts) => row("td", texts))));
    return element("div.table", { tabindex: 0 }, table);
  },
  list: ({ isOrdered, start, isLoose, items }) =>
    element(isOrdered ? "ol" : "ul", { start: isOrdered && start !== 1 ? start : null }, ...items.map((blocks) => item(blocks, isLoose))),
};

function render(block) {
  return RENDERERS[block.kind](block);
}

function item(blocks, isLoose) {
  const first = blocks[0]?.kind === "paragraph" ? blocks[0] : null;
  const task = first && /^\[([ xX])\] /.exec(first.text);
  if (task) first.text = first.text.slice(4);
  const parts = blocks.map((block) => (block.kind === "paragraph" && !isLoose ? inline(block.text) : render(block)));
  return element(task ? "li.task" : "li", {}, task && element("input", { type: "checkbox", disabled: true, checked: task[1] !== " " }), ...parts);
}

// Text within a block -> nodes. `parts` has nodes, and marks that may turn out to be emphasis or links.

const NEXT = /[\\`*_~[\]!<\n&]|https?:\/\//g;
const TARGET = /\(\s*(<[^<>\n]*>|(?:[^\s()\\]|\\.|\((?:[^\s()\\]|\\.)*\))*)(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/y;
const ENTITIES = { "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&nbsp;": "\u00a0" };

export function inline(text) {
  const parts = [];
  const add = (string) => parts.push(document.createTextNode(string));
  const ticks = runs(text);
  let at = 0;
  while (at < text.length) {
    NEXT.lastIndex = at;
    const found = NEXT.exec(text);
    const stop = found ? found.index : text.length;
    if (stop > at) add(text.slice(at, stop));
    if (!found) break;
    at = stop + mark(found[0], stop);
  }
  emphasize(parts, 0);
  const made = document.createDocumentFragment();
  made.append(...parts.map(plain));
  return made;

  /** Takes what begins at `at`; returns its length. */
  function mark(sign, at) {
    if (sign === "\\") return escape(at);
    if (sign === "`") return span(at);
    if (sign === "\n") return parts.push(element("br")), 1;
    if (sign === "&") return entity(at);
    if (sign === "<") return angle(at);
    if (sign === "!") return text[at + 1] === "[" ? (parts.push({ bracket: "![" }), 2) : (add("!"), 1);
    if (sign === "[") return parts.push({ bracket: "[" }), 1;
    if (sign === "]") return link(at);
    if (sign.startsWith("http")) return address(at);
    return emphasis(sign, at);
  }

  function escape(at) {
    const next = text[at + 1] ?? "";
    // \( and \[ begin formulas, which are shown as they are.
    const isEscape = /[!-'*-/:-@\\\]^-`{-~]/.test(next);
    add(isEscape ? next : "\\");
    return isEscape ? 2 : 1;
  }

  function span(at) {
    const n = /^`+/.exec(text.slice(at, at + 64))[0].length;
    const end = ticks.get(n)?.find((each) => each > at);
    if (end === undefined) return add("`".repeat(n)), n;
    const inside = text.slice(at + n, end).replaceAll("\n", " ");
    const isPadded = /^ .*[^ ].* $/.test(inside);
    parts.push(element("code", {}, isPadded ? inside.slice(1, -1) : inside));
    return end + n - at;
  }

  function entity(at) {
    const name = Object.keys(ENTITIES).find((each) => text.startsWith(each, at));
    return name ? (add(ENTITIES[name]), name.length) : (add("&"), 1);
  }

  function angle(at) {
    const [br] = /^<br ?\/?>/i.exec(text.slice(at, at + 6)) ?? [];
    if (br) return parts.push(element("br")), br.length;
    const [whole, url] = /^<((?:https?:\/\/|mailto:)[^\s<>]*)>/.exec(text.slice(at, at + 2000)) ?? [];
    if (whole && safe(url)) return parts.push(anchor(url, [document.createTextNode(url)])), whole.length;
    return add("<"), 1;
  }

  function address(at) {
    const [url] = /^[^\s<>"'`\])|*]+/.exec(text.slice(at, at + 2000));
    const trimmed = url.replace(/[.,:;!?]+$/, "");
    if (safe(trimmed)) parts.push(anchor(trimmed, [document.createTextNode(trimmed)]));
    else add(trimmed);
    return trimmed.length;
  }

  function link(at) {
    let i = parts.length - 1;
    for (const least = Math.max(0, i - FARTHEST); i >= least && !parts[i].bracket; i--);
    if (!parts[i]?.bracket) return add("]"), 1;
    TARGET.lastIndex = at + 1;
    const found = TARGET.exec(text);
    const url = found?.[1].replace(/^<|>$/g, "").replace(/\\(.)/g, "$1");
    if (!found || !safe(url)) {
      parts[i] = plain(parts[i]);
      return add("]"), 1;
    }
    emphasize(parts, i + 1);
    parts.splice(i, Infinity, anchor(url, parts.slice(i + 1).map(plain)));
    return found[0].length + 1;
  }

  function emphasis(sign, at) {
    let n = 1;
    while (text[at + n] === sign) n++;
    if (n > 3) return add(sign.repeat(n)), n;
    const [before, after] = [text[at - 1] ?? " ", text[at + n] ?? " "];
    const left = !/\s/.test(after) && (!isSign(after) || /\s/.test(before) || isSign(before));
    const right = !/\s/.test(before) && (!isSign(before) || /\s/.test(after) || isSign(after));
    const opens = sign === "_" ? left && (!right || isSign(before)) : left;
    const closes = sign === "_" ? right && (!left || isSign(after)) : right;
    parts.push({ sign, n, opens, closes });
    return n;
  }
}

/** Where runs of as many backticks begin. */
function runs(text) {
  const found = new Map();
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    if (!found.has(run.length)) found.set(run.length, []);
    found.get(run.length).push(index);
  }
  return found;
}

function isSign(character) {
  return /[\p{P}\p{S}]/u.test(character);
}

function emphasize(parts, begin) {
  for (let i = begin; i < parts.length; i++) {
    const closer = parts[i];
    if (!closer.sign || !closer.closes) continue;
    for (let j = i - 1; j >= Math.max(begin, i - FARTHEST); j--) {
      const opener = parts[j];
      if (opener.sign !== closer.sign || !opener.opens) continue;
      const n = Math.min(2, opener.n, closer.n);
      if (closer.sign === "~" && n < 2) continue;
      const made = element(closer.sign === "~" ? "s" : n === 2 ? "strong" : "em", {}, ...parts.slice(j + 1, i).map(plain));
      opener.n -= n;
      closer.n -= n;
      const left = [...(opener.n ? [opener] : []), made, ...(closer.n ? [closer] : [])];
      parts.splice(j, i - j + 1, ...left);
      i = j + left.length - (closer.n ? 2 : 1);
      break;
    }
  }
}

/** A part as it is shown if it is no more than a sign. */
function plain(part) {
  if (part instanceof Node) return part;
  return document.createTextNode(part.bracket ?? part.sign.repeat(part.n));
}

function safe(url) {
  try {
    return ["http:", "https:", "mailto:"].includes(new URL(url).protocol);
  } catch {
    return false;
  }
}

function anchor(url, children) {
  return element("a", { href: url, target: "_blank", rel: "noopener noreferrer" }, ...children);
}
