/** Examples made by hand: what an artifact can be. They run in the same panel and the same sandbox. */

import { h, toast } from "./dom.js";

const EXAMPLES = [
  { file: "desktop.html", title: "A desktop", about: "Windows to drag and size, a terminal, notes, a paint program and a clock." },
  { file: "solar-system.html", title: "The solar system", about: "Eight planets on their real orbits: follow one, change speed and scale." },
  { file: "christmas-tree.html", title: "A Christmas tree", about: "It snows. You hang the baubles, stars and lights." },
];

const NOTE = "Example made by hand, not the model’s output";

/** @param {HTMLDialogElement} dialog @param {(artifact: object) => void} open */
export function bindGallery(dialog, open) {
  const show = async ({ file, title }) => {
    try {
      const response = await fetch(new URL(`gallery/${file}`, import.meta.url));
      if (!response.ok) throw new Error(`HTTP ${response.status}`);
      const html = await response.text();
      dialog.close();
      open({ key: `gallery/${file}`, title, html, complete: true, note: NOTE });
    } catch (error) {
      toast(`${title} could not be loaded: ${error.message}`);
    }
  };
  dialog.querySelector(".cards").append(...EXAMPLES.map((example) => (
    h("button", { type: "button", class: `card ${example.file.replace(".html", "")}`, onclick: () => show(example) },
      h("strong", {}, example.title), h("span", {}, example.about)))));
  dialog.querySelector(".cancel").addEventListener("click", () => dialog.close());
}
