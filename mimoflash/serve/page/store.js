/** Conversations in IndexedDB; in memory where the browser keeps none (private windows). */

const NAME = "mimoflash";
const memory = new Map();
let database;

function open() {
  database ??= new Promise((resolve) => {
    try {
      const request = indexedDB.open(NAME, 1);
      request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => resolve(null);
    } catch {
      resolve(null);
    }
  });
  return database;
}

async function run(mode, act) {
  const db = await open();
  return new Promise((resolve, reject) => {
    const transaction = db.transaction("conversations", mode);
    const request = act(transaction.objectStore("conversations"));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

const channel = new BroadcastChannel(NAME);
const tell = (id) => channel.postMessage(id);

/** Calls back with a conversation's id when another tab has changed it. */
export const onOtherTab = (callback) => channel.addEventListener("message", ({ data }) => callback(data));

/** Whether what is stored is still there after a reload. */
export const isKept = async () => (await open()) !== null;

export async function save(conversation) {
  if (await open()) await run("readwrite", (store) => store.put(conversation));
  else memory.set(conversation.id, conversation);
  tell(conversation.id);
}

export async function load(id) {
  return (await open()) ? run("readonly", (store) => store.get(id)) : memory.get(id);
}

export async function remove(id) {
  if (await open()) await run("readwrite", (store) => store.delete(id));
  else memory.delete(id);
  tell(id);
}

/** All conversations, the newest first. */
export async function loadAll() {
  const all = (await open()) ? await run("readonly", (store) => store.getAll()) : [...memory.values()];
  return all.sort((one, other) => other.updated - one.updated);
}
