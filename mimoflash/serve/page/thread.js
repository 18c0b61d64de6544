/** The conversation on the page: a view for each message of the path, redrawn only where it changed. */

import { documentsIn } from "./codeblock.js";
import { path } from "./conversation.js";
import { Follow } from "./scroll.js";
import { MessageView } from "./render.js";

export class Thread {
  /** @param {import("./render.js").Actions} actions */
  constructor({ scroller, list, toEnd, actions }) {
    Object.assign(this, { list, actions, views: [], conversation: null, dirty: new Set(), waiting: false, earliest: 0 });
    this.follow = new Follow(scroller, toEnd);
    new ResizeObserver(() => this.follow.grown()).observe(list);
    list.addEventListener("open-document", (event) => {
      const { id } = event.target.closest(".message").dataset;
      const view = this.views.find((one) => one.message.id === id);
      const at = documentsIn(view.body).indexOf(event.detail);
      this.onOpenDocument(view.documentKey(at), event.detail);
    });
  }

  /** Shows a conversation's path; messages that stay on it keep their view. */
  show(conversation) {
    const other = conversation !== this.conversation;
    this.conversation = conversation;
    const messages = path(conversation).filter((message) => message.role !== "tool"); // results stand with their call
    const kept = other ? 0 : this.#common(messages);
    for (const view of this.views.splice(kept)) view.element.remove();
    for (const view of this.views) view.update(); // branches and results may be new
    for (const message of messages.slice(kept)) {
      const view = new MessageView(conversation, message, this.actions);
      this.views.push(view);
      this.list.append(view.element);
    }
    if (other) this.follow.toEnd();
  }

  #common(messages) {
    let at = 0;
    while (at < this.views.length && this.views[at].message === messages[at]) at += 1;
    return at;
  }

  /** A message grew: drawn with the next frame, and after a costly drawing (a long table) not with every frame. */
  changed(message) {
    this.dirty.add(message);
    if (this.waiting) return;
    this.waiting = true;
    const draw = (now) => {
      if (now < this.earliest) {
        requestAnimationFrame(draw);
        return;
      }
      this.waiting = false;
      const dirty = [...this.dirty];
      this.dirty.clear();
      for (const one of dirty) this.views.find((view) => view.message === one)?.update();
      this.follow.grown();
      this.earliest = now + 3 * (performance.now() - now);
    };
    requestAnimationFrame(draw);
  }
}
