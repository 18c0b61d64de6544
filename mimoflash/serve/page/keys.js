/** The keyboard's shortcuts, and the dialog that lists them. */

import { byId, h } from "./dom.js";

const mac = /Mac|iPhone|iPad/.test(navigator.platform);
const command = mac ? "⌘" : "Ctrl";

const LIST = [
  ["Enter", "send (a setting)"],
  [`${command} Enter`, "send"],
  ["Shift Enter", "new line"],
  ["Esc", "stop the answer, then close what is open"],
  [`${command} Shift O`, "new conversation"],
  [`${command} K`, "search conversations"],
  [`${command} ,`, "settings"],
  ["/", "to the message box"],
  ["?", "these shortcuts"],
];

/** @param {{newConversation, search, settings, toComposer, escape}} actions */
export function bindKeys(actions) {
  const dialog = byId("keys-dialog");
  dialog.querySelector("dl").append(...LIST.flatMap(([keys, meaning]) => (
    [h("dt", {}, ...keys.split(" ").map((key) => h("kbd", {}, key))), h("dd", {}, meaning)])));
  const show = () => dialog.showModal();
  byId("open-keys").addEventListener("click", show);
  dialog.querySelector(".cancel").addEventListener("click", () => dialog.close());

  document.addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return; // Esc closes it by itself
    const act = actionOf(event, actions, show);
    if (!act) return;
    event.preventDefault();
    act();
  });
}

function actionOf(event, actions, show) {
  const key = event.key.toLowerCase();
  if (key === "escape") return actions.escape;
  if (mac ? event.metaKey : event.ctrlKey) {
    if (key === "k") return actions.search;
    if (key === ",") return actions.settings;
    if (key === "o" && event.shiftKey) return actions.newConversation;
    return null;
  }
  if (event.altKey || event.target.matches("input, textarea, select")) return null;
  if (key === "?") return show;
  if (key === "/") return actions.toComposer;
  return null;
}
