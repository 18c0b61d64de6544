/** What every part of the page needs of the DOM: making elements, icons, telling the reader something. */

/** h("button", {class: "x", onclick: f}, "text", child): an element; functions are listeners, null is left out. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const byId = (id) => document.getElementById(id);

const ICONS = {
  copy: "M9 9V5a1 1 0 0 1 1-1h9a1 1 0 0 1 1 1v9a1 1 0 0 1-1 1h-4M5 9h9a1 1 0 0 1 1 1v9a1 1 0 0 1-1 1H5a1 1 0 0 1-1-1v-9a1 1 0 0 1 1-1z",
  again: "M20 11a8 8 0 1 0-.8 4.5M20 4v7h-7",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  previous: "M14 6l-6 6 6 6",
  next: "M10 6l6 6-6 6",
  more: "M12 5v14M5 12h14",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  export: "M12 4v11M8 11l4 4 4-4M5 20h14",
  run: "M7 5l12 7-12 7z",
  onward: "M5 12h13M13 7l5 5-5 5",
};

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const shape = document.createElementNS("http://www.w3.org/2000/svg", "path");
  shape.setAttribute("d", ICONS[name]);
  svg.append(shape);
  return svg;
}

/** A button that shows an icon and says its name to those who do not see it. */
export const iconButton = (name, label, onclick, properties = {}) => (
  h("button", { type: "button", class: "icon", "aria-label": label, title: label, onclick, ...properties }, icon(name)));

/** Said by screen readers when they have finished their sentence. */
export function announce(text) {
  byId("live").textContent = text;
}

/** A short message at the foot of the page, with one thing that can be done about it. */
export function toast(text, { label, act, seconds = 6 } = {}) {
  const box = h("div", { class: "toast", role: "status" }, h("span", {}, text));
  const close = () => box.remove();
  if (act) box.append(h("button", { type: "button", class: "quiet", onclick: () => { close(); act(); } }, label));
  box.append(h("button", { type: "button", class: "icon", "aria-label": "Dismiss", onclick: close }, "×"));
  byId("toasts").append(box);
  setTimeout(close, seconds * 1000);
}

/** Copies, and says so on the button that was pressed. */
export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no clipboard over plain http: the old way
    const area = h("textarea", { class: "visually-hidden" });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  announce("Copied");
  button.classList.add("done");
  setTimeout(() => button.classList.remove("done"), 1200);
}

export function download(name, text) {
  const link = h("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
