/** Runs a document of HTML beside the chat, in a frame that has no origin and no network (artifact.html). */

import hljs from "./vendor/highlight/highlight.min.js";
import { byId, h } from "./dom.js";

export const narrow = matchMedia("(max-width: 56rem)"); // where the panel covers the chat

export class ArtifactPanel {
  /** @param {() => boolean} autoOpen whether documents open while they are written */
  constructor(autoOpen) {
    Object.assign(this, { autoOpen, key: null, html: "", complete: false, tab: "code", offered: new Set() });
    this.element = byId("artifact");
    this.part = (name) => this.element.querySelector(`.artifact-${name}`);
    this.tabs = { preview: byId("tab-preview"), code: byId("tab-code") };
    for (const [name, tab] of Object.entries(this.tabs)) {
      tab.addEventListener("click", () => { this.chosen = true; this.#show(name); });
      tab.addEventListener("keydown", (event) => {
        if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
        const other = name === "code" ? "preview" : "code";
        this.tabs[other].click();
        this.tabs[other].focus();
      });
    }
    this.part("reload").addEventListener("click", () => { this.#show("preview"); this.#run(); });
    this.part("full").addEventListener("click", () => this.#toggleFull());
    this.part("close").addEventListener("click", () => this.close());
    addEventListener("message", (event) => this.#heard(event));
    narrow.addEventListener("change", () => this.#cover());
    document.addEventListener("fullscreenchange", () => { if (!document.fullscreenElement) this.#setFull(false); });
  }

  get isOpen() {
    return !this.element.hidden;
  }

  /** @param {{key: string, title: string, html: string, complete: boolean, note?: string}} artifact */
  open({ key, title, html, complete, note = "" }, opener = document.activeElement) {
    if (!this.isOpen) this.opener = opener;
    Object.assign(this, { key, html, complete, chosen: false });
    this.offered.add(key);
    this.part("title").textContent = title;
    this.part("note").textContent = note;
    this.part("note").hidden = !note;
    this.element.hidden = false;
    document.body.classList.add("with-artifact");
    this.#showCode();
    this.#show(complete ? "preview" : "code");
    if (complete) this.#run();
    else this.part("frame").replaceChildren();
    this.#cover();
  }

  focus() {
    this.part("title").focus();
  }

  /** A document in the conversation was written on: follows it if it is shown, opens it if the user asked for that. */
  follow(key, title, block, streaming) {
    if (key !== this.key) {
      if (streaming && this.autoOpen() && !this.offered.has(key)) {
        this.open({ key, title, html: block.text, complete: block.complete });
      }
      return;
    }
    if (block.text === this.html && block.complete === this.complete) return;
    Object.assign(this, { html: block.text, complete: block.complete });
    this.#showCode();
    if (!block.complete) return;
    this.#run();
    if (!this.chosen) this.#show("preview");
  }

  close() {
    this.element.hidden = true;
    this.key = null;
    this.part("frame").replaceChildren();
    document.body.classList.remove("with-artifact");
    this.#setFull(false);
    if (this.opener?.isConnected) this.opener.focus();
  }

  /** A new frame each time: nothing of the last run is left. */
  #run() {
    this.#problem("");
    this.frame = h("iframe", {
      sandbox: "allow-scripts", title: `Preview: ${this.part("title").textContent}`, referrerpolicy: "no-referrer",
      allow: "camera 'none'; microphone 'none'; geolocation 'none'; display-capture 'none'",
      src: new URL("artifact.html", import.meta.url).href,
    });
    this.sent = false;
    this.part("frame").replaceChildren(this.frame);
  }

  #heard({ source, data }) {
    if (!this.frame || source !== this.frame.contentWindow) return;
    if (data?.ready && !this.sent) {
      this.sent = true; // once a frame: a document that loads artifact.html again gets nothing
      source.postMessage({ html: this.html }, "*"); // an origin-less frame has no name to address
    } else if (typeof data?.problem === "string") {
      this.#problem(data.problem.slice(0, 500));
    }
  }

  #problem(text) {
    this.part("problem").textContent = text;
    this.part("problem").hidden = !text;
  }

  #showCode() {
    const code = this.part("code").querySelector("code");
    if (this.complete && this.html.length < 200_000) code.innerHTML = hljs.highlight(this.html, { language: "html" }).value;
    else code.textContent = this.html;
    if (!this.complete) this.part("code").scrollTop = this.part("code").scrollHeight;
  }

  #show(name) {
    for (const [each, tab] of Object.entries(this.tabs)) {
      tab.setAttribute("aria-selected", String(each === name));
      tab.tabIndex = each === name ? 0 : -1;
      byId(tab.getAttribute("aria-controls")).hidden = each !== name;
    }
    this.part("waiting").hidden = this.complete;
  }

  #toggleFull() {
    const full = !this.element.classList.contains("full");
    this.#setFull(full);
    if (full) this.element.requestFullscreen?.().catch(() => {}); // the class alone fills the window
  }

  #setFull(full) {
    this.element.classList.toggle("full", full);
    this.part("full").setAttribute("aria-pressed", String(full));
    if (!full && document.fullscreenElement) document.exitFullscreen();
    this.#cover();
  }

  /** What the panel covers is out of reach of the keyboard too. */
  #cover() {
    byId("chat").inert = this.covers;
    byId("sidebar").inert = this.covers;
  }

  get covers() {
    return this.isOpen && (narrow.matches || this.element.classList.contains("full"));
  }
}

/** The title a document gives itself. */
export function titleOf(html) {
  const written = /<title[^>]*>([^<]{1,80})/i.exec(html)?.[1].trim();
  return written ? new DOMParser().parseFromString(written, "text/html").body.textContent : "HTML document";
}
