/**
 * Markdown that grows. Blocks that can no longer change are rendered once; only the last one is rendered again.
 * A model's text never becomes script: raw HTML is shown as text, what is left goes through DOMPurify, and KaTeX and
 * the highlighter write into elements that were made here.
 */

import "./vendor/dompurify/purify.min.js";
import "./vendor/katex/katex.min.js";
import { CodeBlock } from "./codeblock.js";
import { Marked } from "./vendor/marked/marked.esm.js";

const { DOMPurify, katex } = globalThis; // both come as scripts that set a global

const PURE = {
  ALLOWED_TAGS: ("p br em strong del code pre a ul ol li blockquote h1 h2 h3 h4 h5 h6 hr table thead tbody tr th td " +
    "sup sub kbd b i u s mark span div").split(" "),
  ALLOWED_ATTR: ["href", "title", "start", "align", "class", "data-tex", "data-display", "tabindex"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ADD_URI_SAFE_ATTR: ["data-tex", "data-display", "start", "align", "class", "tabindex"], // no addresses
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const OWN_CLASSES = /^(language-[\w+#.-]+|table|task|first)$/;

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.hasAttribute("class") && !OWN_CLASSES.test(node.className)) node.removeAttribute("class");
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer");
  }
});

const escape = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
const HARMLESS = /^<\/?(?:br|sub|sup|kbd|b|i|u|s|em|strong|mark) *\/?>$/i;

const renderer = {
  html: ({ text }) => (HARMLESS.test(text.trim()) ? text : escape(text)),
  code: ({ text, lang }) => `<pre><code class="language-${escape(languageOf(lang))}">${escape(text)}</code></pre>`,
  image: ({ href, text }) => `<a href="${escape(href)}">Image: ${escape(text || href)}</a>`, // never loaded unasked
  checkbox: ({ checked }) => `<span class="task">${checked ? "☑" : "☐"}</span> `,
  heading({ tokens, depth }) { // below the message's own; many answers begin with ##
    const level = Math.min(Math.max(depth + 1, 3), 6);
    return `<h${level}${depth === 1 ? ' class="first"' : ""}>${this.parser.parseInline(tokens)}</h${level}>\n`;
  },
  table(token) {
    const row = (cells, tag) => `<tr>${cells.map((cell) => (
      `<${tag}${cell.align ? ` align="${cell.align}"` : ""}>${this.parser.parseInline(cell.tokens)}</${tag}>`)).join("")}</tr>`;
    const body = token.rows.map((cells) => row(cells, "td")).join("");
    return `<div class="table" tabindex="0"><table><thead>${row(token.header, "th")}</thead><tbody>${body}</tbody></table></div>`;
  },
};

const languageOf = (info) => (info ?? "").trim().split(/[\s{,:]/)[0].toLowerCase();
const tex = ({ text, display }) => `<span data-tex="${escape(text)}"${display ? ' data-display="1"' : ""}></span>`;

const inlineMath = {
  name: "math",
  level: "inline",
  start: (source) => source.search(/\$|\\[([]/),
  tokenizer(source) {
    const found = /^\$\$([^$]+?)\$\$/.exec(source) ?? /^\\\[([\s\S]+?)\\\]/.exec(source);
    if (found) return { type: "math", raw: found[0], text: found[1], display: true };
    // "$5 and $6" is no formula: no space inside the dollars, no digit behind
    const inline = /^\$(?!\s)((?:\\.|[^\\$\n])+?)(?<!\s)\$(?!\d)/.exec(source) ?? /^\\\(([\s\S]+?)\\\)/.exec(source);
    return inline ? { type: "math", raw: inline[0], text: inline[1], display: false } : undefined;
  },
  renderer: tex,
};

/** `growing`: a formula that is still open holds the rest of the text back from being settled. */
function markdown(growing) {
  const blockMath = {
    name: "mathBlock",
    level: "block",
    start: (source) => source.search(/^ {0,3}(?:\$\$|\\\[)/m),
    tokenizer(source) {
      const found = /^ {0,3}(?:\$\$([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\])[ \t]*(?:\n+|$)/.exec(source);
      if (found) return { type: "mathBlock", raw: found[0], text: found[1] ?? found[2], display: true };
      const open = growing && /^ {0,3}(?:\$\$|\\\[)(?![^\n]*(?:\$\$|\\\]))[\s\S]*$/.exec(source);
      return open ? { type: "mathBlock", raw: open[0], open: true } : undefined;
    },
    renderer: (token) => (token.open ? `<p>${escape(token.raw)}</p>` : `<p>${tex(token)}</p>`),
  };
  return new Marked({ gfm: true, renderer, extensions: [blockMath, inlineMath] });
}

const whole = markdown(false);
const partial = markdown(true);

export class GrowingMarkdown {
  /** @param {HTMLElement} element filled by this alone */
  constructor(element) {
    this.element = element;
    this.#clear();
  }

  #clear() {
    this.element.replaceChildren();
    this.settled = 0; // characters of the source whose blocks stand for good
    this.tail = []; // nodes of the block that may still change
    this.tailCode = null;
  }

  /** Shows a text that starts with what was shown before. */
  update(text) {
    this.#show(text, partial);
  }

  /** The text as it stays. Definitions of links may concern blocks above them. */
  finish(text) {
    if (/^ {0,3}\[[^\]]+\]:/m.test(text)) this.#clear();
    this.#show(text, whole);
  }

  #show(text, parser) {
    const source = fenceDocuments(text.replace(/\r\n?/g, "\n"));
    const tokens = parser.lexer(source.slice(this.settled));
    while (tokens.at(-1)?.type === "space") tokens.pop();
    const last = tokens.pop();
    if (!last) return;
    if (tokens.length) {
      this.#removeTail();
      for (const token of tokens) {
        this.element.append(...this.#nodes(token, parser));
        this.settled += token.raw.length;
      }
      this.tailCode = null;
    }
    if (last.type === "code" && this.tailCode?.language === languageOf(last.lang)) {
      this.tailCode.update(last.text, isClosed(last) || parser === whole);
      return;
    }
    this.#removeTail();
    this.tail = this.#nodes(last, parser);
    this.element.append(...this.tail);
  }

  #removeTail() {
    this.tail.forEach((node) => node.remove());
    this.tail = [];
    this.tailCode = null;
  }

  #nodes(token, parser) {
    if (token.type === "code") {
      this.tailCode = new CodeBlock(languageOf(token.lang), token.text, isClosed(token) || parser === whole);
      return [this.tailCode.element];
    }
    this.tailCode = null;
    const fragment = DOMPurify.sanitize(parser.parser([token]), PURE);
    for (const code of fragment.querySelectorAll("pre > code")) { // in lists and quotes
      const block = new CodeBlock(code.className.replace("language-", ""), code.textContent.replace(/\n$/, ""), true);
      code.parentElement.replaceWith(block.element);
    }
    for (const formula of fragment.querySelectorAll("[data-tex]")) {
      const options = { displayMode: Boolean(formula.dataset.display), throwOnError: false, strict: "ignore", maxSize: 20, maxExpand: 300 };
      katex.render(formula.dataset.tex, formula, options);
    }
    return [...fragment.childNodes];
  }
}

/** A fence is closed by a line of at least as many of its characters; indented code by what follows it. */
function isClosed(token) {
  const fence = /^ {0,3}(`{3,}|~{3,})/.exec(token.raw)?.[1];
  if (!fence) return false;
  const end = token.raw.trimEnd().split("\n");
  const last = end.at(-1).trim();
  return end.length > 1 && last.length >= fence.length && last === fence[0].repeat(last.length);
}

/** Puts a document of HTML that a model wrote without a fence into one. What stands before it is not changed. */
function fenceDocuments(source) {
  const start = /^(`{3,}|~{3,})|^(?:<!doctype html\b|<html[\s>])/gim;
  let fence = null;
  for (let found; (found = start.exec(source));) {
    if (found[1]) {
      if (!fence) fence = found[1];
      else if (found[1][0] === fence[0] && found[1].length >= fence.length) fence = null;
    } else if (!fence) {
      const end = source.slice(found.index).search(/<\/html>[ \t]*(?:\n|$)/i);
      const before = source.slice(0, found.index) + "`````html\n";
      if (end < 0) return before + source.slice(found.index);
      const after = found.index + end + "</html>".length;
      return `${before}${source.slice(found.index, after)}\n\`\`\`\`\`\n${fenceDocuments(source.slice(after))}`;
    }
  }
  return source;
}
