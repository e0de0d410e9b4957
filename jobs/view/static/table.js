// Cells, tables and galleries of rows.
import { address, ask, figure, h, lazily, title, visible, words } from "./markup.js";

// A cell of a row. `at` is where the row is; `large` on the row's own page.
export function cell(run, at, column, value, large = false) {
  if (value === null || value === undefined || value === false && !["bool"].includes(column.kind)) return h("span", { class: "null" }, "–");
  if (column.kind === "source") return picture(run, at, column, large ? 1024 : 192, large);
  if (column.kind === "image") return picture(run, at, column, large ? 1024 : 192, large);
  if (column.kind === "vector") return vector(run, at, column, large);
  if (column.kind === "number") return h("span", { class: "figure", title: String(value) }, figure(value, column));
  if (column.kind === "bool") return h("span", { class: value ? "yes" : "no" }, value ? "yes" : "no");
  return words(value, large ? "whole" : "clamp");
}

function picture(run, at, column, size, large) {
  const image = h("img", { alt: title(column.name), loading: "lazy", decoding: "async", class: large ? "large" : "thumb",
    src: column.kind === "source" ? address("source", { run, at, size }) : address("picture", { run, at, column: column.name, size }) });
  image.addEventListener("load", () => image.classList.toggle("pixel", image.naturalWidth <= 96));
  image.addEventListener("error", () => image.replaceWith(h("span", { class: "null" }, "cannot be shown")));
  return image;
}

function vector(run, at, column, large) {
  const shape = column.shape.length ? column.shape.join(" × ") : "";
  const box = h("span", { class: large ? "curve large" : "curve" }, h("small", {}, shape));
  return lazily(box, async () => {
    const { vector: told } = await ask("api/vector", { run, at, column: column.name });
    if (!told) return;
    const drawable = column.shape.length === 3 && Math.min(column.shape[1], column.shape[2]) >= 2;
    const facts = large ? ["norm", "mean", "min", "max"] : ["norm"];
    box.replaceChildren(
      drawable ? h("img", { class: "latent pixel", alt: "first channels", src: address("latent", { run, at, column: column.name }) }) : spark(told.curve ?? []),
      h("small", {}, shape || `${told.size}`, facts.filter(name => name in told).map(name => h("span", {}, `${name} ${figure(told[name])}`)),
        told.not_finite ? h("span", { class: "bad" }, `${told.not_finite} not finite`) : null));
  });
}

function spark(curve) {
  const real = curve.filter(value => value !== null);
  if (!real.length) return null;
  const low = Math.min(...real), high = Math.max(...real), span = (high - low) || 1;
  const points = curve.map((value, n) => value === null ? null : `${(100 * n / Math.max(1, curve.length - 1)).toFixed(1)},${(38 - 36 * (value - low) / span).toFixed(1)}`);
  return h("svg", { viewBox: "0 0 100 40", preserveAspectRatio: "none", class: "spark" },
    h("polyline", { points: points.filter(point => point).join(" ") }));
}

// Rows as a table; on a narrow screen each row is a card. `sort` and `open` are called with a column's name and a row's place.
export function table(run, columns, rows, sorted, { sort, open, extra }) {
  const heads = columns.map(column => {
    const ordered = ["text", "number", "bool"].includes(column.kind);
    const mark = sorted?.column === column.name ? (sorted.down ? " ↓" : " ↑") : "";
    const label = [title(column.name), h("b", {}, mark)];
    return h("th", { class: column.kind === "source" ? "image" : column.kind, title: column.doc || column.name, scope: "col",
      "aria-sort": mark ? (sorted.down ? "descending" : "ascending") : null },
      ordered && sort ? h("button", { type: "button", onclick: () => sort(column.name) }, label) : label);
  });
  const lines = rows.map(row => h("tr", { tabindex: 0, class: row.cells.status === "failed" ? "failed" : null,
      onclick: event => { if (!event.target.closest("a,button")) open(row.at); },
      onkeydown: event => { if (event.key === "Enter") open(row.at); } },
    extra ? h("td", { class: "number", "data-name": extra.name }, extra.of(row)) : null,
    columns.map(column => h("td", { class: column.kind === "source" ? "image" : column.kind, "data-name": title(column.name) }, cell(run, row.at, column, column.kind === "source" || row.cells[column.name])))));
  return h("div", { class: "scroll" }, h("table", { class: "rows" },
    h("thead", {}, h("tr", {}, extra ? h("th", { class: "number" }, extra.name) : null, heads)), h("tbody", {}, lines)));
}

// Rows as pictures with a line or two beneath.
export function gallery(run, columns, rows, _, { open, extra }) {
  const images = columns.filter(column => ["image", "source"].includes(column.kind));
  const text = columns.find(column => column.kind === "text" && column.name !== "id" && column.name !== "method");
  const figures = columns.filter(column => column.kind === "number").slice(0, 2);
  return h("div", { class: "gallery" }, rows.map(row => h("figure", { tabindex: 0, onclick: () => open(row.at),
      onkeydown: event => { if (event.key === "Enter") open(row.at); } },
    h("div", { class: "pair" }, images.length ? images.map(column => cell(run, row.at, column, row.cells[column.name])) : h("span", { class: "null" }, "no picture")),
    h("figcaption", {}, words(row.cells[text?.name] ?? row.cells.id ?? "", "clamp"),
      h("small", {}, [extra ? `${extra.name} ${extra.of(row)}` : null, row.cells.method ? visible(row.cells.method) : null,
        ...figures.map(column => `${title(column.name)} ${figure(row.cells[column.name], column)}`)].filter(one => one).join(" · "))))));
}
