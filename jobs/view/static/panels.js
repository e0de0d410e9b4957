// The filters beside the rows, the histogram that is brushed, a row's own page, two runs compared.
import { ask, button, count, figure, h, title, visible, words } from "./markup.js";
import { cell } from "./table.js";

const OPERATORS = {
  text: [["contains", "contains"], ["lacks", "does not contain"], ["is", "is"], ["isnot", "is not"], ["starts", "begins with"], ["null", "is missing"], ["notnull", "is there"]],
  number: [["between", "from … to"], ["is", "is"], ["isnot", "is not"], ["nan", "is NaN"], ["null", "is missing"], ["notnull", "is there"]],
  bool: [["is", "is"], ["null", "is missing"], ["notnull", "is there"]],
};
const PRESENCE = [["null", "is missing"], ["notnull", "is there"]];

export function told(filter, columns) {
  const column = columns.find(one => one.name === filter.column) ?? {};
  const name = title(filter.column), value = filter.value;
  if (filter.op === "between") {
    const [low, high] = value.map(one => one === null || one === "" ? null : figure(Number(one), column));
    return low === null ? `${name} ≤ ${high}` : high === null ? `${name} ≥ ${low}` : `${name} ${low} to ${high}`;
  }
  if (filter.op === "in") return `${name}: ${value.map(visible).join(", ")}`;
  const word = (OPERATORS[column.kind] ?? PRESENCE).find(([op]) => op === filter.op)?.[1] ?? filter.op;
  return `${name} ${word}${value === undefined || value === null ? "" : ` ${visible(value)}`}`;
}

export function chips(filters, columns, change) {
  if (!filters.length) return null;
  return h("div", { class: "chips" }, filters.map((filter, n) => h("span", { class: "chip" }, words(told(filter, columns)),
    button("×", () => change(filters.filter((_, other) => other !== n)), { "aria-label": "remove this filter" }))),
    button("clear", () => change([]), { class: "plain" }));
}

// A form that makes one filter of a column, an operator and a value.
export function adder(columns, add) {
  const operators = h("select", { "aria-label": "how" });
  const values = h("span", { class: "values" });
  const choice = h("select", { "aria-label": "column" }, columns.map(column => h("option", { value: column.name }, title(column.name))));
  const chosen = () => columns.find(column => column.name === choice.value);
  const fields = () => {
    const { kind } = chosen(), op = operators.value;
    const wanted = ["null", "notnull", "nan"].includes(op) ? [] : kind === "bool" ? ["yesno"] : op === "between" ? ["from", "to"] : ["value"];
    values.replaceChildren(...wanted.map(name => name === "yesno"
      ? h("select", { "aria-label": "value" }, h("option", { value: "yes" }, "yes"), h("option", { value: "no" }, "no"))
      : h("input", { placeholder: name, "aria-label": name, inputmode: kind === "number" ? "decimal" : null })));
  };
  const change = () => {
    operators.replaceChildren(...(OPERATORS[chosen().kind] ?? PRESENCE).map(([op, word]) => h("option", { value: op }, word)));
    fields();
  };
  choice.addEventListener("change", change);
  operators.addEventListener("change", fields);
  change();
  return h("form", { class: "adder", onsubmit: event => {
    event.preventDefault();
    const inputs = [...values.children].map(input => input.value.trim());
    const { name, kind } = chosen(), op = operators.value;
    if (inputs.length && inputs.every(value => value === "")) return;
    const value = !inputs.length ? undefined : kind === "bool" ? inputs[0] === "yes" : op === "between" ? inputs.map(one => one || null) : inputs[0];
    add({ column: name, op, value });
  } }, choice, operators, values, h("button", { type: "submit" }, "filter"));
}

// The commonest values of a text column, to be ticked; drawn only if there are few.
export async function facet(run, column, filters, change, signal) {
  const { values, distinct } = await ask("api/values", { run, column: column.name, filters }, signal);
  const own = filters.find(filter => filter.column === column.name && filter.op === "in");
  if (distinct < 2 && !own || distinct > 200 || values.some(one => !one.whole)) return null;
  const chosen = new Set(own?.value ?? []);
  const rest = filters.filter(filter => filter !== own);
  const tick = value => {
    chosen.has(value) ? chosen.delete(value) : chosen.add(value);
    change(chosen.size ? [...rest, { column: column.name, op: "in", value: [...chosen] }] : rest);
  };
  const top = Math.max(...values.map(one => one.rows));
  return h("section", { class: "facet" }, h("h3", {}, title(column.name)), values.slice(0, 8).map(one => h("label", { class: one.value === null ? "none" : null },
    h("input", { type: "checkbox", checked: chosen.has(one.value), disabled: one.value === null, onchange: () => tick(one.value) }),
    one.value === null ? h("i", {}, "missing") : words(one.value, "name"), h("span", { class: "n" }, count(one.rows)),
    meter(one.rows / top))),
    distinct > 8 ? h("small", {}, `and ${count(distinct - 8)} more`) : null);
}

function meter(share) {
  const bar = h("span", { class: "meter" });
  bar.style.setProperty("--share", `${(100 * share).toFixed(1)}%`);
  return bar;
}

// How a column is spread; a range that is dragged over becomes a filter.
export async function histogram(run, column, filters, change, signal) {
  const found = await ask("api/histogram", { run, column: column.name, filters }, signal);
  const rest = filters.filter(filter => !(filter.column === column.name && filter.op === "between"));
  if (!found.rows) return h("p", { class: "quiet" }, "no values among these rows");
  const { edges, counts } = found, top = Math.max(...counts), low = edges[0], high = edges.at(-1);
  const x = value => 100 * (value - low) / (high - low);
  const bars = counts.map((rows, n) => rows ? h("rect", { x: x(edges[n]) + 0.1, width: Math.max(0.3, x(edges[n + 1]) - x(edges[n]) - 0.2),
    y: 60 - 58 * rows / top, height: 58 * rows / top }, h("title", {}, `${figure(edges[n])} to ${figure(edges[n + 1])}: ${count(rows)}`)) : null);
  const brush = h("rect", { class: "brush", y: 0, height: 60, x: 0, width: 0 });
  const own = filters.find(filter => filter.column === column.name && filter.op === "between");
  const mark = (from, to) => {
    brush.setAttribute("x", Math.max(0, Math.min(x(from), x(to))));
    brush.setAttribute("width", Math.min(100, Math.max(x(from), x(to))) - Math.max(0, Math.min(x(from), x(to))));
  };
  if (own) mark(Number(own.value[0] ?? low), Number(own.value[1] ?? high));
  const drawing = h("svg", { viewBox: "0 0 100 60", preserveAspectRatio: "none", class: "bars", role: "img", "aria-label": `histogram of ${title(column.name)}; drag over it to filter` }, brush, bars);
  const at = event => {
    const box = drawing.getBoundingClientRect();
    return low + (high - low) * Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
  };
  let from = null;
  drawing.addEventListener("pointerdown", event => { from = at(event); drawing.setPointerCapture(event.pointerId); });
  drawing.addEventListener("pointermove", event => { if (from !== null) mark(from, at(event)); });
  drawing.addEventListener("pointerup", event => {
    const ends = [from, at(event)].sort((one, other) => one - other);
    from = null;
    if (ends[1] - ends[0] < (high - low) / 200) return change(rest);
    // The outermost bars hold what lies beyond them.
    const value = [ends[0] <= edges[0] ? null : rounded(ends[0], high - low), ends[1] >= high ? null : rounded(ends[1], high - low)];
    change(value[0] === null && value[1] === null ? rest : [...rest, { column: column.name, op: "between", value }]);
  });
  const facts = [["rows", count(found.rows)], ["mean", figure(found.mean, unitOf(column))], ["median", `≈ ${figure(found.median, unitOf(column))}`],
    ["least", figure(found.min, column)], ["most", figure(found.max, column)], found.other ? ["none", count(found.other)] : null].filter(one => one);
  return h("div", { class: "histogram" }, drawing,
    h("div", { class: "axis" }, h("span", {}, figure(low, unitOf(column))), h("span", {}, figure(high, unitOf(column)))),
    h("dl", {}, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))));
}

const unitOf = column => ({ unit: column.unit });
const rounded = (value, span) => Number(value.toPrecision(Math.max(3, Math.ceil(Math.log10(Math.abs(value) / span + 1)) + 4)));

// Everything of a row, and lines to copy.
export async function row(run, at, acts) {
  const { cells, lines } = await ask("api/row", { run: run.name, at });
  const shown = run.columns.filter(column => cells[column.name] !== null && cells[column.name] !== false || column.kind === "bool" && cells[column.name] !== null);
  const missing = run.columns.filter(column => !shown.includes(column));
  const source = { name: "source picture", kind: "source" };
  const pictures = [...run.source ? [source] : [], ...shown.filter(column => column.kind === "image")], vectors = shown.filter(column => column.kind === "vector");
  const plain = shown.filter(column => !pictures.includes(column) && !vectors.includes(column) && column.name !== "id");
  const seek = (column, text) => acts.search ? button(text, () => acts.search(at, column.name), { class: "plain" }) : null;
  return [
    h("header", {}, h("div", {}, h("p", { class: "brand" }, visible(run.name)), h("h2", {}, words(cells.id))),
      button("×", acts.close, { class: "close", "aria-label": "close" })),
    cells.status === "failed" ? h("p", { class: "reason" }, h("b", {}, "failed: "), words(cells.error ?? "")) : null,
    pictures.length ? h("div", { class: "pictures" }, pictures.map(column => h("figure", {}, cell(run.name, at, column, true, true),
      h("figcaption", {}, title(column.name), " ", column === source ? null : seek(column, "similar"))))) : null,
    h("table", { class: "facts" }, h("tbody", {}, plain.map(column => h("tr", {}, h("th", { scope: "row", title: column.doc }, title(column.name)), h("td", {}, cell(run.name, at, column, cells[column.name], true), column.doc ? h("small", {}, column.doc) : null))))),
    vectors.length ? h("div", { class: "vectors" }, vectors.map(column => h("figure", {}, h("figcaption", { title: column.doc }, title(column.name), " ", acts.width === column.shape[0] && column.shape.length === 1 ? seek(column, "nearest") : null), cell(run.name, at, column, true, true)))) : null,
    missing.length ? h("p", { class: "quiet" }, `null in this row: ${missing.map(column => column.name).join(", ")}`) : null,
    lines.map(block => h("section", { class: "lines" }, h("h3", {}, block.title, copier(block.text)), h("pre", {}, h("code", {}, visible(block.text))))),
  ];
}

function copier(text) {
  const copy = button("copy", async () => {
    await navigator.clipboard.writeText(text);
    copy.textContent = "copied";
    setTimeout(() => { copy.textContent = "copy"; }, 1500);
  }, { class: "plain" });
  return navigator.clipboard ? copy : null;
}

// What differs between two runs, and a page of rows in which it does.
export async function comparison(runs, state, change, open, signal) {
  const [a, b] = [state.a, state.b].map(name => runs.find(run => run.name === name));
  const both = await ask("api/compare", { a: a.name, b: b.name }, signal);
  const differing = both.columns.filter(column => column.differ);
  const pick = (label, name) => h("label", {}, label, h("select", { onchange: event => change({ [name]: event.target.value, column: null, sort: null, show: "any" }) },
    runs.map(run => h("option", { value: run.name, selected: run.name === state[name] }, visible(run.name)))));
  const tile = (name, rows, show) => h("button", { type: "button", class: `tile${!state.column && state.show === show ? " chosen" : ""}`, onclick: () => change({ show, column: null, sort: null }) },
    h("span", {}, name), h("strong", {}, count(rows)));
  const columnOf = name => a.columns.find(column => column.name === name);
  const listing = h("div", { class: "scroll" }, h("table", { class: "rows narrow" }, h("thead", {}, h("tr", {}, h("th", {}, "column"), ...["rows that differ", "mean b − a", "largest"].map(name => h("th", { class: "number" }, name)))),
    h("tbody", {}, differing.map(column => h("tr", { tabindex: 0, class: state.column === column.name ? "chosen" : null, onclick: () => change({ column: column.name, show: "any", sort: column.kind === "number" ? column.name : null, down: true }) },
      h("td", {}, title(column.name)), h("td", { class: "number", "data-name": "rows that differ" }, count(column.differ)),
      h("td", { class: "number", "data-name": "mean b − a" }, column.mean === null ? "" : figure(column.mean, unitOf(columnOf(column.name)))),
      h("td", { class: "number", "data-name": "largest" }, column.most === null ? "" : figure(column.most, unitOf(columnOf(column.name)))))))));
  return [
    h("div", { class: "picks" }, pick("a ", "a"), button("⇄", () => change({ a: state.b, b: state.a })), pick("b ", "b")),
    h("div", { class: "tiles" }, tile("in both, differing", both.both - both.same, "any"), tile("in both, equal", both.same, "same"), tile("in a alone", both.only_a, "only_a"), tile("in b alone", both.only_b, "only_b")),
    differing.length ? listing : null,
    await pairs(a, b, both, state, change, open, signal),
  ];
}

async function pairs(a, b, both, state, change, open, signal) {
  const images = a.columns.filter(column => column.kind === "image" && b.columns.some(other => other.name === column.name && other.kind === "image"));
  const differ = both.columns.filter(column => column.differ && column.name !== "error").map(column => column.name);
  const names = [...new Set([state.column, ...differ].filter(name => name))].slice(0, 5);
  const shown = [...images.slice(-1), ...names.map(name => a.columns.find(column => column.name === name))];
  const text = ["prompt", "caption", "text"].find(name => a.columns.some(column => column.name === name));
  const found = await ask("api/pairs", { a: a.name, b: b.name, show: state.show, column: state.column, sort: state.sort, down: state.down ? "1" : null, after: state.after,
    columns: ["id", ...(text ? [text] : []), ...shown.map(column => column.name)] }, signal);
  const line = pair => {
    const one = pair.a ?? pair.b;
    return h("tr", {}, h("td", {}, words(one.cells[text] ?? "", "clamp"), h("small", {}, words(one.cells.id))),
      shown.map(column => h("td", { class: `${column.kind} both`, "data-name": title(column.name) }, ["a", "b"].map(side => {
        const row = pair[side], run = side === "a" ? a : b;
        if (!row) return h("span", { class: "null side" }, "not there");
        return h("span", { class: "side", title: `${side}: ${run.name}`, onclick: () => open(run.name, row.at) }, cell(run.name, row.at, column, row.cells[column.name] ?? (column.kind === "image" ? null : row.cells[column.name])));
      }), column.kind === "number" && pair.a && pair.b ? delta(pair, column) : null)));
  };
  const heads = [h("th", {}, "row"), ...shown.map(column => h("th", { class: column.kind }, title(column.name)))];
  return [
    h("p", { class: "results" }, state.column ? [h("b", {}, title(state.column)), " differs; a above b",
      state.sort ? [" · largest ", button(state.down ? "b − a" : "a − b", () => change({ down: !state.down }), { class: "plain" }), " first"] : null] : "a above b"),
    h("div", { class: "scroll" }, h("table", { class: "rows pairs" }, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, found.pairs.map(line)))),
    h("div", { class: "pager" }, state.after ? button("first page", () => change({ after: null })) : null, found.next ? button("next page", () => change({ after: found.next })) : null),
  ];
}

function delta(pair, column) {
  const by = Number(pair.b.cells[column.name]) - Number(pair.a.cells[column.name]);
  return Number.isFinite(by) && by ? h("small", { class: "delta" }, `${by > 0 ? "+" : "−"}${figure(Math.abs(by), unitOf(column))}`) : null;
}
