/** A block of code: its language, copy, and for a document of HTML a button that runs it beside the chat. */

import hljs from "./vendor/highlight/highlight.min.js";
import { copy, h, icon, iconButton } from "./dom.js";

const blocks = new WeakMap(); // figure -> CodeBlock

export class CodeBlock {
  constructor(language, text, complete) {
    this.language = language;
    this.code = h("code", { class: "hljs" });
    this.highlighted = 0;
    this.element = h("figure", { class: "code", "data-language": language },
      h("figcaption", {}, h("span", {}, language || "text"), ...this.#buttons()),
      h("pre", { tabindex: "0", role: "group", "aria-label": `${language || "text"} code` }, this.code));
    blocks.set(this.element, this);
    this.update(text, complete);
  }

  /** Text that grows is appended plainly; it is highlighted anew when it is a fifth longer, so that the whole is linear. */
  update(text, complete) {
    const grown = this.text !== undefined && text.startsWith(this.text) && !complete;
    if (grown && text.length < this.highlighted * 1.2) this.code.append(text.slice(this.text.length));
    else if (text !== this.text || complete !== this.complete) this.#highlight(text);
    Object.assign(this, { text, complete });
  }

  #highlight(text) {
    this.highlighted = text.length;
    if (hljs.getLanguage(this.language) && text.length < 200_000) {
      this.code.innerHTML = hljs.highlight(text, { language: this.language, ignoreIllegals: true }).value; // escaped by hljs
    } else {
      this.code.textContent = text;
    }
  }

  #buttons() {
    const buttons = [iconButton("copy", "Copy code", (event) => copy(this.text, event.currentTarget))];
    if (this.language === "html") {
      const open = () => this.element.dispatchEvent(new CustomEvent("open-document", { bubbles: true, detail: this }));
      buttons.unshift(h("button", { type: "button", class: "run", onclick: open }, icon("run"), "Open"));
    }
    return buttons;
  }
}

/** The documents of HTML in an element, in order. @returns {CodeBlock[]} */
export const documentsIn = (element) => (
  [...element.querySelectorAll('figure.code[data-language="html"]')].map((figure) => blocks.get(figure)));
