// Conversations: trees of messages, in the browser's own database.
//
// {id, title, system, created, changed, leaf, messages: {id: message}}: an edited question or another answer is a
// sibling, so nothing is lost. A message is {id, parent, role, text} and, of an answer, what else is known of it:
// {thought, tokens, model, finish, error, n, speed}. `leaf` is the last message of what is shown.

export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function begin(system) {
  const now = Date.now();
  return { id: newId(), title: "", system, created: now, changed: now, leaf: null, messages: {} };
}

/** From the first message to the one with that id. */
export function path(conversation, id = conversation.leaf) {
  const found = [];
  for (let at = conversation.messages[id]; at; at = conversation.messages[at.parent]) found.unshift(at);
  return found;
}

/** A new message, which is then the last one. */
export function add(conversation, parent, message) {
  const made = { id: newId(), parent, ...message };
  conversation.messages[made.id] = made;
  conversation.leaf = made.id;
  return made;
}

/** Messages that stand in the place of one, itself included, the oldest first. */
export function siblings(conversation, message) {
  return Object.values(conversation.messages).filter((each) => each.parent === message.parent);
}

/** Show a message, and what came after it last. */
export function choose(conversation, message) {
  let leaf = message;
  for (let next = leaf; next; next = Object.values(conversation.messages).findLast((each) => each.parent === leaf.id)) leaf = next;
  conversation.leaf = leaf.id;
}

/** As it was exported; raises Error for what is no conversation. */
export function checked(given) {
  const isText = (value) => typeof value === "string";
  const isMessage = ([id, each]) =>
    each?.id === id && (each.parent === null || isText(each.parent)) && ["user", "assistant"].includes(each.role) && isText(each.text);
  const messages = Object.entries(given?.messages ?? {});
  if (!isText(given?.id) || !isText(given.title) || !messages.length || !messages.every(isMessage))
    throw new Error("a conversation in it is damaged; expected what Export has written");
  const ends = (id) => {
    for (let n = 0; n <= messages.length; n++) {
      if (id === null) return true;
      id = given.messages[id]?.parent;
    }
    return false;
  };
  if (!isText(given.leaf) || !messages.every(([id]) => ends(id)) || !given.messages[given.leaf])
    throw new Error(`the messages of ${given.title} do not follow each other; expected what Export has written`);
  const now = Date.now();
  return {
    id: given.id, title: given.title, system: isText(given.system) ? given.system : "", leaf: given.leaf,
    created: Number(given.created) || now, changed: Number(given.changed) || now,
    messages: Object.fromEntries(messages.map(([id, each]) => [id, message(each)])),
  };
}

/** Of an imported message only what is understood. */
function message({ id, parent, role, text, thought, tokens, model, finish, error, n, speed }) {
  const isTokens = Array.isArray(tokens) && tokens.every((each) => typeof each?.text === "string" && (!each.top || Array.isArray(each.top)));
  const words = { thought, model, finish, error };
  for (const [name, value] of Object.entries(words)) if (typeof value !== "string") delete words[name];
  return { id, parent, role, text, ...words, ...(isTokens ? { tokens } : {}), n: Number(n) || 0, speed: Number(speed) || 0 };
}

// Two stores: what the list shows, and everything.

let database;

function opened() {
  database ??= new Promise((resolve, reject) => {
    const asked = indexedDB.open("edgellm", 1);
    asked.onupgradeneeded = () => ["list", "whole"].forEach((name) => asked.result.createObjectStore(name, { keyPath: "id" }));
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
  return database;
}

async function transact(stores, mode, act) {
  const transaction = (await opened()).transaction(stores, mode);
  const asked = act(...stores.map((name) => transaction.objectStore(name)));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(asked?.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

/** [{id, title, changed}], the latest first. */
export async function list() {
  return (await transact(["list"], "readonly", (list) => list.getAll())).sort((a, b) => b.changed - a.changed);
}

export function read(id) {
  return transact(["whole"], "readonly", (whole) => whole.get(id));
}

export function readAll() {
  return transact(["whole"], "readonly", (whole) => whole.getAll());
}

export function write(conversation) {
  const { id, title, changed } = conversation;
  return transact(["list", "whole"], "readwrite", (list, whole) => (list.put({ id, title, changed }), whole.put(conversation)));
}

export function remove(id) {
  return transact(["list", "whole"], "readwrite", (list, whole) => (list.delete(id), whole.delete(id)));
}
