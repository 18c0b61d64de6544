/** The page: one conversation open at a time, a composer below it, and what belongs to it around it. */

import { listModels } from "./api.js";
import { ArtifactPanel, narrow, titleOf } from "./artifact.js";
import { add, choose, createConversation, dropEmpty, find, openCalls, path, titleFrom } from "./conversation.js";
import { announce, byId, h, toast } from "./dom.js";
import { bindGallery } from "./gallery.js";
import { bindKeys } from "./keys.js";
import { bindSettings, loadSettings, saveSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import * as store from "./store.js";
import { Thread } from "./thread.js";
import { Turns } from "./turn.js";

const settings = loadSettings();
let conversation = createConversation();
let models = [];

const turns = new Turns(() => settings, {
  changed: (changed) => { if (changed === conversation) show(); },
  grew: (changed, message) => { if (changed === conversation) thread.changed(message); },
  started: () => { announce("Answer started"); showRunning(); },
  ended: (ended, message) => {
    announce(message?.error ? message.error.text : message?.finish === "stopped" ? "Answer stopped" : "Answer finished");
    showRunning();
    sidebar.refresh();
  },
  save: keep,
});
const panel = new ArtifactPanel(() => settings.autoOpen);
const thread = new Thread({
  scroller: byId("scroller"), list: byId("thread"), toEnd: byId("to-end"),
  actions: {
    running: (message) => turns.runs(message),
    document: (key, block, streaming) => panel.follow(key, titleOf(block.text), block, streaming),
    edit: (message, text) => say(text, message.parent),
    resume: (message) => turns.resume(conversation, message),
    regenerate(message) {
      if (turns.running.has(conversation.id)) return;
      const { parent } = message;
      dropEmpty(conversation, message);
      turns.answer(conversation, parent);
    },
    choose(id) {
      if (turns.running.has(conversation.id)) return; // the answer on its way stays in view
      choose(conversation, id);
      keep(conversation);
      show();
    },
    giveResult(message, call, content) {
      add(conversation, path(conversation).at(-1).id, { role: "tool", toolCallId: call.id, content });
      keep(conversation);
      if (openCalls(conversation, message).length) show();
      else turns.answer(conversation, path(conversation).at(-1).id);
    },
  },
});
thread.onOpenDocument = (key, block) => {
  panel.open({ key, title: titleOf(block.text), html: block.text, complete: block.complete });
  panel.focus();
};
const sidebar = new Sidebar({
  open, current: () => conversation.id, busy: (id) => turns.running.has(id),
  removed(id) {
    turns.forget(id);
    if (id === conversation.id) startNew();
  },
  async renamed(id, title) {
    const renamed = live(id) ?? await store.load(id);
    renamed.title = title;
    await store.save(renamed);
    sidebar.refresh();
    if (renamed === conversation) show();
  },
});

/** The conversation as it is in use here; what is stored may be a second behind. */
const live = (id) => (id === conversation.id ? conversation : turns.running.get(id)?.conversation);

function keep(kept) {
  kept.updated = Date.now();
  store.save(kept).catch((error) => toast(`This conversation could not be stored: ${error.message}`));
}

function say(text, parent = path(conversation).at(-1)?.id ?? null) {
  if (turns.running.has(conversation.id)) return;
  if (!conversation.messages.length) conversation.title = titleFrom(text);
  const message = add(conversation, parent, { role: "user", content: text });
  history.replaceState(null, "", `#${conversation.id}`);
  thread.follow.following = true;
  turns.answer(conversation, message.id);
  sidebar.refresh();
}

async function open(id) {
  const found = live(id) ?? await store.load(id);
  if (!found) return;
  conversation = found;
  history.replaceState(null, "", `#${id}`);
  panel.close();
  setDrawer(false);
  show();
  sidebar.refresh();
}

function startNew() {
  conversation = createConversation();
  history.replaceState(null, "", location.pathname);
  panel.close();
  setDrawer(false);
  show();
  sidebar.refresh();
  composer.focus();
}

function show() {
  thread.show(conversation);
  byId("empty").hidden = conversation.messages.length > 0;
  byId("title").textContent = conversation.title || "New conversation";
  document.title = conversation.title ? `${conversation.title} – mimoflash` : "mimoflash";
  showRunning();
}

function showRunning() {
  const running = turns.running.has(conversation.id);
  byId("stop").hidden = !running;
  byId("send").hidden = running;
  if (!running) showGauge();
}

/** How much of the model's context the conversation takes, as the server counted it last. */
function showGauge() {
  const used = path(conversation).findLast((message) => message.usage)?.usage.total_tokens;
  const size = models.find((model) => model.id === settings.model)?.context_length;
  const gauge = byId("gauge");
  gauge.hidden = !used || !size;
  if (gauge.hidden) return;
  const short = (tokens) => (tokens < 10_000 ? String(tokens) : `${Math.round(tokens / 1000)}k`);
  gauge.querySelector("meter").max = size;
  gauge.querySelector("meter").high = size * 0.85;
  gauge.querySelector("meter").value = used;
  gauge.querySelector("span").textContent = `${short(used)} of ${short(size)} tokens`;
}

// The composer

const composer = byId("composer");
const form = byId("composer-form");

function fitComposer() {
  composer.style.height = "auto";
  composer.style.height = `${Math.min(composer.scrollHeight, innerHeight * 0.4)}px`;
}

composer.addEventListener("input", fitComposer);
composer.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.isComposing) return;
  const touch = matchMedia("(pointer: coarse)").matches; // there Enter is the only way to a new line
  if (event.ctrlKey || event.metaKey || (settings.enterSends && !event.shiftKey && !touch)) {
    event.preventDefault();
    form.requestSubmit();
  }
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = composer.value;
  if (!text.trim() || turns.running.has(conversation.id)) return;
  composer.value = "";
  fitComposer();
  say(text);
});
byId("stop").addEventListener("click", () => turns.stop(conversation.id));

const thinking = byId("thinking");
function showThinking() {
  thinking.setAttribute("aria-pressed", String(settings.thinking === "on"));
}
thinking.addEventListener("click", () => {
  settings.thinking = settings.thinking === "on" ? "off" : "on";
  saveSettings(settings);
  showThinking();
});

// Models

const picker = byId("model");
picker.addEventListener("change", () => {
  settings.model = picker.value;
  saveSettings(settings);
  showGauge();
});

async function loadModels() {
  const problem = byId("server-problem");
  try {
    models = await listModels(settings);
    problem.hidden = true;
  } catch (error) {
    models = [];
    const advice = error.kind === "key" ? "It wants an API key: see the settings." : "";
    problem.querySelector("span").textContent = `${error.message} ${advice}`;
    problem.hidden = false;
  }
  const names = models.map((model) => model.id);
  if (names.length && !names.includes(settings.model)) settings.model = names[0];
  if (!names.length && settings.model) names.push(settings.model);
  picker.replaceChildren(...names.map((name) => h("option", { value: name }, name)));
  picker.value = settings.model;
  picker.disabled = names.length === 0;
  showGauge();
}
byId("server-retry").addEventListener("click", loadModels);

// Around it

const openSettings = bindSettings(byId("settings-dialog"), settings, () => { showThinking(); loadModels(); });
byId("open-settings").addEventListener("click", openSettings);
byId("new").addEventListener("click", startNew);
for (const button of document.querySelectorAll("[data-starter]")) {
  button.addEventListener("click", () => {
    composer.value = button.dataset.starter;
    fitComposer();
    composer.focus();
  });
}

bindGallery(byId("gallery-dialog"), (artifact) => {
  setDrawer(false);
  panel.open(artifact);
  panel.focus();
});
for (const button of document.querySelectorAll(".open-gallery")) {
  button.addEventListener("click", () => byId("gallery-dialog").showModal());
}

/** On a phone the sidebar is a drawer over the chat; elsewhere it can be folded away. */
function setDrawer(isOpen) {
  document.body.classList.toggle("drawer-open", isOpen);
  byId("toggle-sidebar").setAttribute("aria-expanded", String(isOpen));
  byId("chat").inert = (isOpen && narrow.matches) || panel.covers;
}
narrow.addEventListener("change", () => setDrawer(false));
byId("scrim").addEventListener("click", () => setDrawer(false));
byId("toggle-sidebar").addEventListener("click", () => setDrawer(!document.body.classList.contains("drawer-open")));

bindKeys({
  newConversation: startNew,
  search() { setDrawer(true); byId("search").focus(); },
  settings: openSettings,
  toComposer: () => composer.focus(),
  escape() {
    if (turns.running.has(conversation.id)) turns.stop(conversation.id);
    else if (document.body.classList.contains("drawer-open")) setDrawer(false);
    else if (panel.isOpen) panel.close();
  },
});

addEventListener("pagehide", () => turns.running.forEach((run) => keep(run.conversation)));
store.onOtherTab(async (id) => {
  sidebar.refresh();
  if (id !== conversation.id || turns.running.has(id)) return;
  const changed = await store.load(id);
  if (changed && find(changed, changed.chosen)) { conversation = changed; show(); }
});
store.isKept().then((kept) => {
  if (!kept) toast("This browser keeps nothing: conversations last until the page is closed.", { seconds: 12 });
});

show();
showThinking();
sidebar.refresh();
await loadModels();
if (location.hash.length > 1) await open(location.hash.slice(1));
