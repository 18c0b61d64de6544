/** The user's settings, kept in this browser, and the dialog that changes them. */

import { h } from "./dom.js";
import { TOOLS, parseDefinitions } from "./tools.js";

const KEY = "mimoflash-settings";

/**
 * `temperature` and the like are null where the server decides; `thinking` "unsaid" sends nothing about it.
 * @typedef {typeof DEFAULTS} Settings
 */
const DEFAULTS = {
  baseUrl: "", apiKey: "", model: "", system: "", temperature: null, top_p: null, max_tokens: null, seed: null,
  thinking: "off", tools: {}, ownTools: [], theme: "system", autoOpen: false, enterSends: true,
};
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

/** @returns {Settings} */
export function loadSettings() {
  try {
    return { ...structuredClone(DEFAULTS), ...JSON.parse(localStorage.getItem(KEY)) };
  } catch { // nothing readable is kept
    return structuredClone(DEFAULTS);
  }
}

export function saveSettings(settings) {
  document.documentElement.dataset.theme = settings.theme;
  try {
    localStorage.setItem(KEY, JSON.stringify(settings));
  } catch { /* a private window: they last as long as the page */ }
}

/**
 * Binds the dialog: it shows the settings when opened and takes them over when saved.
 * @param {HTMLDialogElement} dialog @param {() => void} changed
 */
export function bindSettings(dialog, settings, changed) {
  const form = dialog.querySelector("form");
  const { elements } = form;
  const problem = form.querySelector(".problem");
  form.querySelector("#tool-list").append(...Object.entries(TOOLS).map(([key, { label, hint }]) => (
    h("label", { class: "check" }, h("input", { type: "checkbox", name: `tool-${key}` }),
      h("span", {}, label, h("small", {}, hint))))));

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    try {
      Object.assign(settings, read(elements));
    } catch (error) {
      problem.textContent = error.message;
      problem.hidden = false;
      return;
    }
    saveSettings(settings);
    dialog.close();
    changed();
  });
  form.querySelector(".cancel").addEventListener("click", () => dialog.close());

  return () => {
    problem.hidden = true;
    show(elements, settings);
    dialog.showModal();
  };
}

function show(elements, settings) {
  for (const key of ["baseUrl", "apiKey", "system", "thinking", "theme"]) elements[key].value = settings[key];
  for (const key of NUMBERS) elements[key].value = settings[key] ?? "";
  for (const key of ["autoOpen", "enterSends"]) elements[key].checked = settings[key];
  for (const key of Object.keys(TOOLS)) elements[`tool-${key}`].checked = Boolean(settings.tools[key]);
  elements.ownTools.value = settings.ownTools.length ? JSON.stringify(settings.ownTools, null, 2) : "";
}

function read(elements) {
  const taken = { ownTools: parseDefinitions(elements.ownTools.value), tools: {} };
  for (const key of ["baseUrl", "apiKey", "thinking", "theme"]) taken[key] = elements[key].value.trim();
  taken.system = elements.system.value;
  for (const key of NUMBERS) taken[key] = elements[key].value === "" ? null : Number(elements[key].value);
  for (const key of ["autoOpen", "enterSends"]) taken[key] = elements[key].checked;
  for (const key of Object.keys(TOOLS)) taken.tools[key] = elements[`tool-${key}`].checked;
  return taken;
}
