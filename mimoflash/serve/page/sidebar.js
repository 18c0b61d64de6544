/** The list of conversations: search, rename, delete with undo, export, import. */

import { matches, newId } from "./conversation.js";
import { byId, download, h, iconButton, toast } from "./dom.js";
import { fromFile, toFile } from "./portable.js";
import * as store from "./store.js";

export class Sidebar {
  /** @param {{open: (id: string) => void, removed: (id: string) => void, current: () => string | null, busy: (id: string) => boolean,
   *           renamed: (id: string, title: string) => void}} hooks */
  constructor(hooks) {
    this.hooks = hooks;
    this.list = byId("conversations");
    this.search = byId("search");
    this.search.addEventListener("input", () => this.refresh());
    byId("export-all").addEventListener("click", async () => this.#export(await store.loadAll(), "conversations"));
    byId("import").addEventListener("click", () => byId("import-files").click());
    byId("import-files").addEventListener("change", async (event) => {
      await this.#import([...event.target.files]);
      event.target.value = ""; // the same file can be chosen again
    });
  }

  async refresh() {
    const query = this.search.value.trim();
    const all = await store.loadAll();
    if (query !== this.search.value.trim()) return; // typed on meanwhile
    const found = query ? all.filter((conversation) => matches(conversation, query)) : all;
    this.list.replaceChildren(...found.map((conversation) => this.#entry(conversation)));
    const empty = byId("no-conversations");
    empty.hidden = found.length > 0;
    empty.textContent = query ? "Nothing found." : "Conversations appear here. They stay in this browser.";
  }

  #entry(conversation) {
    const { id, title } = conversation;
    const current = id === this.hooks.current();
    const entry = h("li", { class: current ? "current" : null, "data-id": id },
      h("button", { type: "button", class: "title", "aria-current": current ? "true" : null, onclick: () => this.hooks.open(id) },
        this.hooks.busy(id) ? h("span", { class: "dot", role: "img", "aria-label": "answering" }) : null, title || "New conversation"),
      h("div", { class: "entry-actions" },
        iconButton("edit", `Rename ${title}`, () => this.#rename(entry, conversation)),
        iconButton("export", `Export ${title}`, () => this.#export([conversation], title)),
        iconButton("trash", `Delete ${title}`, () => this.#remove(id))));
    return entry;
  }

  #rename(entry, { id, title }) {
    const field = h("input", { class: "rename", "aria-label": "New title", value: title, maxlength: "120" });
    let done = false; // taking the field away blurs it
    const finish = (take) => {
      if (done) return;
      done = true;
      if (take && field.value.trim()) this.hooks.renamed(id, field.value.trim());
      else this.refresh();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") finish(true);
      if (event.key === "Escape") { event.stopPropagation(); finish(false); }
    });
    field.addEventListener("blur", () => finish(true));
    entry.replaceChildren(field);
    field.select();
  }

  async #remove(id) {
    const conversation = await store.load(id);
    if (!conversation) return;
    this.hooks.removed(id);
    await store.remove(id);
    await this.refresh();
    const undo = async () => { await store.save(conversation); await this.refresh(); };
    toast(`Deleted “${conversation.title}”.`, { label: "Undo", act: undo, seconds: 10 });
  }

  #export(conversations, name) {
    const day = new Date().toISOString().slice(0, 10);
    download(`${name.replace(/[^\w-]+/g, "-").slice(0, 40)}-${day}.json`, toFile(conversations));
  }

  async #import(files) {
    const bad = [];
    let taken = 0;
    for (const file of files) {
      try {
        for (const conversation of fromFile(await file.text())) {
          if (await store.load(conversation.id)) conversation.id = newId(); // beside the one that is here, never over it
          await store.save(conversation);
          taken += 1;
        }
      } catch (error) {
        bad.push(`${file.name}: ${error.message}`);
      }
    }
    await this.refresh();
    if (taken) toast(`${taken} ${taken === 1 ? "conversation" : "conversations"} imported.`);
    if (bad.length) this.#complain(bad);
  }

  #complain(bad) {
    byId("import-problems").replaceChildren(...bad.map((line) => h("li", {}, line)));
    byId("import-dialog").showModal();
  }
}
