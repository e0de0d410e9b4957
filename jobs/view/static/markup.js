// Elements, requests and figures. Rows are strangers' words: they reach the page as text nodes alone, never as markup.

const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g;

// What a row says, with control characters and direction overrides made visible.
export const visible = text => String(text).replace(HIDDEN, "\ufffd");

// An element. `on...` properties are listeners, `class` its classes, `data` its dataset; content: elements, texts, lists, null.
export function h(name, given = {}, ...content) {
  const svg = ["svg", "rect", "line", "polyline", "path", "title"].includes(name);
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(given ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "value") element.value = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...content.flat(Infinity).filter(one => one !== null && one !== undefined && one !== false));
  return element;
}

// A row's own words, kept from turning round what stands beside them.
export const words = (text, className) => h("bdi", { class: className }, visible(text));

export class Refused extends Error {}

// The answer to a GET as JSON; null and undefined parameters are left out, lists and objects go as JSON.
export async function ask(path, given = {}, signal = undefined) {
  const answer = await fetch(address(path, given), { signal });
  const told = await answer.json();
  if (!answer.ok) throw new Refused(told.error ?? answer.statusText);
  return told;
}

export function address(path, given) {
  const query = new URLSearchParams();
  for (const [key, value] of Object.entries(given)) {
    if (value === null || value === undefined || value === "") continue;
    query.set(key, typeof value === "object" ? JSON.stringify(value) : value);
  }
  return `/${path}?${query}`;
}

export const count = number => Number(number).toLocaleString("en-US");

const SMALL = "⁰¹²³⁴⁵⁶⁷⁸⁹";

// A figure as a person writes it: 37.6 dB, 0.996, 1,234, 2.4 × 10⁻⁷.
export function figure(value, column = {}) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  const unit = column.unit ? `\u202f${column.unit}` : "";
  if (column.whole || Number.isInteger(value)) return count(value) + unit;
  if (column.unit === "dB") return value.toFixed(1) + unit;
  if (size >= 100) return value.toLocaleString("en-US", { maximumFractionDigits: size >= 1000 ? 0 : 1 }) + unit;
  if (size >= 1e-3) return value.toPrecision(3) + unit;
  const power = Math.floor(Math.log10(size));
  const raised = String(power).replace(/./g, digit => digit === "-" ? "⁻" : SMALL[digit]);
  return `${(value / 10 ** power).toFixed(1)} × 10${raised}${unit}`;
}

export const title = name => name.replaceAll("_", " ");

// Calls `draw` when the element comes into view, once.
const seen = new IntersectionObserver(entries => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    seen.unobserve(entry.target);
    entry.target.draw();
  }
}, { rootMargin: "200px" });

export function lazily(element, draw) {
  element.draw = draw;
  seen.observe(element);
  return element;
}

export const button = (text, onclick, given = {}) => h("button", { type: "button", onclick, ...given }, text);
