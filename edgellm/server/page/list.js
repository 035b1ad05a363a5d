// The list of conversations, its drawer on a phone, and what can be done with each.

import { checked, list, newId, read, readAll, remove, write } from "./conversations.js";
import { download, element, iconButton, place, toast } from "./dom.js";

const byId = (id) => document.getElementById(id);
const narrow = matchMedia("(max-width: 760px)");

/** `current` gives the id of the one that is shown; `open(id)` shows another, or a new one; `changed` is told of a
 * conversation that was renamed or deleted. */
export function conversationList({ current, open, changed }) {
  const menu = byId("menu");

  async function show() {
    const all = await list().catch((error) => (toast(`Conversations cannot be kept here: ${error.message}`), []));
    byId("conversations").replaceChildren(...all.map(entry));
    byId("export").disabled = !all.length;
  }

  function entry({ id, title }) {
    const button = element("button.open", { type: "button", "aria-current": id === current() && "true", title, onclick: () => (close(), open(id)) }, title);
    const more = iconButton("more", `More of ${title}`, () => showMenu(id, title, more), { "aria-haspopup": "menu" });
    return element("li", {}, button, more);
  }

  function showMenu(id, title, anchor) {
    const item = (label, act) => element("button", { type: "button", role: "menuitem", onclick: () => (menu.hidePopover(), act()) }, label);
    menu.replaceChildren(
      item("Rename", () => rename(id, title, anchor.closest("li"))),
      item("Export", async () => exportAll([await read(id)])),
      item("Delete", () => drop(id, title)),
    );
    menu.onkeydown = (event) => {
      const next = { ArrowDown: "nextSibling", ArrowUp: "previousSibling" }[event.key];
      if (next) event.preventDefault(), document.activeElement[next]?.focus();
    };
    menu.showPopover();
    place(menu, anchor);
    menu.firstChild.focus();
  }

  function rename(id, title, row) {
    const field = element("input", { "aria-label": "Title", maxlength: 200 });
    field.value = title;
    const done = async (isKept) => {
      field.onblur = null;
      if (isKept && field.value.trim()) await changed(id, { title: field.value.trim() });
      await show();
    };
    field.onblur = () => done(true);
    field.onkeydown = (event) => {
      if (event.key === "Enter") done(true);
      if (event.key === "Escape") event.stopPropagation(), done(false);
    };
    row.replaceChildren(field);
    field.select();
  }

  async function drop(id, title) {
    const conversation = await changed(id, null);
    await remove(id);
    await show();
    toast(`“${title}” is deleted.`, "Undo", async () => (await write(conversation), show()));
  }

  function exportAll(conversations) {
    const day = new Date().toISOString().slice(0, 10);
    download(`edgellm-conversations-${day}.json`, JSON.stringify({ format: "edgellm conversations", version: 1, conversations }));
  }

  async function importAll(file) {
    try {
      const found = JSON.parse(await file.text());
      if (!Array.isArray(found?.conversations)) throw new Error("it has no conversations; expected a file that Export has written");
      const here = new Set((await list()).map(({ id }) => id));
      const all = found.conversations.map(checked);
      for (const each of all) await write(here.has(each.id) ? { ...each, id: newId() } : each);
      toast(`${all.length} conversation${all.length === 1 ? " is" : "s are"} imported.`);
    } catch (error) {
      toast(`${file.name} is not imported: ${error.message}`);
    }
    await show();
  }

  function setDrawer(isOpen) {
    document.body.classList.toggle("drawer-open", isOpen);
    byId("open-drawer").setAttribute("aria-expanded", isOpen);
    byId("drawer").inert = narrow.matches && !isOpen;
    document.querySelector("main").inert = narrow.matches && isOpen;
  }

  function close() {
    if (!narrow.matches || !document.body.classList.contains("drawer-open")) return;
    setDrawer(false);
    byId("open-drawer").focus();
  }

  byId("open-drawer").onclick = () => (setDrawer(true), byId("close-drawer").focus());
  byId("close-drawer").onclick = byId("backdrop").onclick = close;
  byId("drawer").onkeydown = (event) => event.key === "Escape" && close();
  narrow.onchange = () => setDrawer(false);
  byId("new").onclick = () => (close(), open(null));
  byId("export").onclick = async () => exportAll(await readAll());
  byId("import").onclick = () => byId("file").click();
  byId("file").onchange = async ({ target }) => {
    if (target.files[0]) await importAll(target.files[0]);
    target.value = "";
  };
  setDrawer(false);
  return { show };
}
