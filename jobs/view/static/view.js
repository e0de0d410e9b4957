// What is shown is in the address (after #), so that going back, reloading and sharing work; everything is drawn from it.
import { ask, button, count, h, Refused, title, visible, words } from "./markup.js";
import { adder, chips, comparison, facet, histogram, row } from "./panels.js";
import { gallery, table } from "./table.js";

const LIMIT = 50;
const TEXTS = ["prompt", "caption", "text", "phrase", "concept"], FACETS = ["status", "method", "guide", "stopped", "converged", "success", "dtype", "class"];
const FIRST = ["psnr", "ssim", "text_cosine", "clip_score", "score", "neighbour_cosine", "loss", "residual_max", "norm"];
const top = document.getElementById("top"), side = document.getElementById("side"), main = document.getElementById("main"), dialog = document.getElementById("row");
let runs = [], state = {}, before = [], running = null;

const run = () => runs.find(one => one.name === state.run) ?? runs[0];
const SOURCE = { name: "source picture", kind: "source", type: "", shape: [], doc: "read again from the job's input" };
const columnOf = name => run().columns.find(column => column.name === name);

function read() {
  const given = new URLSearchParams(location.hash.slice(1));
  const known = {};
  for (const [key, text] of given) {
    try { known[key] = JSON.parse(text); } catch { known[key] = text; }
  }
  if (!runs.some(one => one.name === known.run)) known.run = runs[0].name;
  const names = new Set(runs.find(one => one.name === known.run).columns.map(column => column.name));
  known.filters = (Array.isArray(known.filters) ? known.filters : []).filter(filter => names.has(filter?.column));
  if (Array.isArray(known.columns)) known.columns = known.columns.filter(name => names.has(name));
  if (!known.columns?.length) known.columns = null;
  if (!names.has(known.sort?.column)) known.sort = null;
  return known;
}

// Change some of what is shown; a page within rows starts anew unless it is only turned.
function go(changes) {
  const turned = "after" in changes;
  if (!turned) { before = []; changes.after = null; }
  const next = { ...state, ...changes }, query = new URLSearchParams();
  for (const [key, value] of Object.entries(next)) {
    if (value === null || value === undefined || Array.isArray(value) && !value.length || value === false) continue;
    query.set(key, typeof value === "string" ? value : JSON.stringify(value));
  }
  const hash = `#${query}`;
  if (hash === location.hash) draw(); else location.hash = hash;
}

function defaults() {
  const { columns, failed } = run(), names = columns.map(column => column.name);
  const has = list => list.filter(name => names.includes(name));
  const numbers = columns.filter(column => column.kind === "number").map(column => column.name);
  const images = columns.filter(column => column.kind === "image").map(column => column.name);
  const text = has(TEXTS).slice(0, 1), figures = [...new Set([...has(FIRST), ...numbers.filter(name => !name.startsWith("prompt_"))])].slice(0, 4);
  const vectors = images.length ? [] : columns.filter(column => column.kind === "vector").map(column => column.name).slice(0, 1);
  const chosen = [...images.slice(0, 3), ...text, ...has(["method"]), ...figures, ...vectors, "id"];
  const failing = state.filters.some(filter => filter.column === "status" && JSON.stringify(filter.value).includes("failed"));
  return failing ? ["id", ...text, ...has(["method"]), "error"] : failed ? [...chosen, "status"] : chosen;
}

function head() {
  const one = run(), failing = { column: "status", op: "in", value: ["failed"] };
  const tabs = runs.map(other => h("a", { href: "#", class: !state.compare && other === one ? "tab chosen" : "tab", onclick: event => { event.preventDefault(); fresh({ run: other.name }); } },
    visible(other.name), h("small", {}, count(other.rows))));
  if (runs.length > 1) {
    const other = runs.find(candidate => candidate !== one && candidate.job === one.job) ?? runs.find(candidate => candidate !== one);
    tabs.push(h("a", { href: "#", class: state.compare ? "tab chosen" : "tab", onclick: event => { event.preventDefault(); fresh({ run: one.name, compare: { a: one.name, b: other.name, show: "any" } }); } }, "compare"));
  }
  const searched = runs.find(other => other.name === one.name && other.search) ?? runs.find(other => other.search);
  const search = searched && !state.compare ? h("form", { class: "search", role: "search", onsubmit: event => {
    event.preventDefault();
    const text = new FormData(event.target).get("text").trim();
    if (text) fresh({ run: searched.name, search: { text } });
  } }, h("input", { type: "search", name: "text", placeholder: `search ${searched.name}: a red star`, "aria-label": "search by text", value: state.search?.text ?? "" })) : null;
  const facts = state.compare ? [] : [
    h("span", { class: `pill ${one.state}` }, one.state),
    h("span", {}, `${count(one.ok)} ok`),
    one.failed ? button(`${count(one.failed)} failed`, () => go({ filters: [failing], columns: null, search: null }), { class: "plain bad" }) : h("span", {}, "none failed"),
    one.duplicates ? h("span", {}, `${count(one.duplicates)} duplicates`) : null,
    one.rows < one.planned ? h("span", {}, `${count(one.planned - one.rows)} to come`) : null,
    h("span", { class: "path" }, words(one.path)),
  ];
  top.replaceChildren(h("div", { class: "bar" }, h("p", { class: "brand" }, "latentmill"), h("nav", { "aria-label": "runs" }, tabs), search),
    ...(facts.length ? [h("div", { class: "facts" }, facts)] : []));
  top.querySelector(".tab.chosen")?.scrollIntoView({ block: "nearest", inline: "center" });
}

const fresh = changes => { state = {}; go(changes); };

async function beside(signal) {
  const one = run(), { filters } = state, change = changed => go({ filters: changed });
  const numbers = one.columns.filter(column => column.kind === "number");
  const chosen = columnOf(state.spread) ?? columnOf(FIRST.find(name => columnOf(name))) ?? numbers[0];
  const spread = h("section", { class: "spread" });
  const facets = h("div", {});
  const inner = [
    h("section", {}, h("h3", {}, "Filter"), adder([...one.columns].sort((a, b) => (a.name === "id") - (b.name === "id")), filter => change([...filters, filter]))),
    chosen ? h("section", {}, h("h3", {}, h("label", {}, "Spread of ", h("select", { onchange: event => go({ spread: event.target.value, after: state.after }) },
      numbers.map(column => h("option", { value: column.name, selected: column === chosen }, title(column.name)))))), spread) : null, facets];
  const wide = matchMedia("(min-width: 900px)").matches;
  side.replaceChildren(h("details", { open: wide || side.querySelector("details")?.open }, h("summary", {}, "Filters"), inner));
  const drawn = chosen ? histogram(one.name, chosen, filters, change, signal).then(found => spread.replaceChildren(found)) : null;
  const few = one.columns.filter(column => FACETS.includes(column.name) && column.kind === "text" && !(column.name === "status" && !one.failed && !one.duplicates));
  const listed = few.map(async column => {
    const place = h("div", {});
    facets.append(place);
    const found = await facet(one.name, column, filters, change, signal);
    if (found) place.replaceChildren(found);
  });
  await Promise.all([drawn, ...listed]);
}

function chooser(columns) {
  const names = new Set(columns.map(column => column.name));
  return h("details", { class: "menu" }, h("summary", {}, "Columns"), h("div", {}, run().columns.map(column => h("label", { title: column.doc }, h("input", { type: "checkbox", checked: names.has(column.name), onchange: event => {
    event.target.checked ? names.add(column.name) : names.delete(column.name);
    const kept = columns.map(one => one.name).filter(name => names.has(name));
    go({ columns: [...kept, ...[...names].filter(name => !kept.includes(name))], after: state.after });
  } }), title(column.name), h("small", {}, column.shape.length ? column.shape.join(" × ") : column.kind))),
    button("as at first", () => go({ columns: null, after: state.after }), { class: "plain" })));
}

async function rows(signal) {
  const one = run(), columns = (state.columns ?? defaults()).map(columnOf).filter(column => column);
  const names = [...new Set([...columns.map(column => column.name), "id", "status"])];
  if (one.source) columns.unshift(SOURCE);
  const found = state.search
    ? await ask("api/search", { run: one.name, ...state.search, columns: names }, signal)
    : await ask("api/rows", { run: one.name, filters: state.filters, sort: state.sort?.column, down: state.sort?.down ? "1" : null, after: state.after, limit: LIMIT, columns: names }, signal);
  const number = h("b", {}, "…");
  const sort = state.search ? null : name => go({ sort: state.sort?.column !== name ? { column: name, down: columnOf(name).kind === "number" } : state.sort.down === (columnOf(name).kind === "number") ? { column: name, down: !state.sort.down } : null });
  const extra = state.search ? { name: "cosine", of: line => line.cosine.toFixed(3) } : null;
  const acts = { sort, open: at => go({ row: at, after: state.after }), extra };
  const images = columns.some(column => ["image", "source"].includes(column.kind));
  const grid = state.view === "pictures" && images;
  const toggle = images ? h("div", { class: "toggle" }, ["table", "pictures"].map(view => button(view, () => go({ view: view === "table" ? null : view, after: state.after }), { class: (view === "pictures") === grid ? "chosen" : "" }))) : null;
  const shown = state.search
    ? [`${found.rows.length} nearest `, state.search.text ? ["to ", h("b", {}, words(state.search.text))] : ["to a row's ", h("b", {}, title(state.search.column))], " ", button("all rows", () => go({ search: null }), { class: "plain" })]
    : [number, ` of ${count(one.rows)} rows`];
  const pager = h("div", { class: "pager" }, before.length || state.after ? button("← back", () => { const last = before.pop() ?? null; go({ after: last }); }) : null,
    found.next ? button("next →", () => { before.push(state.after ?? null); go({ after: found.next }); scrollTo(0, 0); }) : null);
  main.replaceChildren(h("div", { class: "tools" }, h("p", { class: "results" }, shown), toggle, chooser(columns.filter(column => column !== SOURCE))), ...[state.search ? null : chips(state.filters, one.columns, filters => go({ filters }))].filter(part => part),
    found.rows.length ? (grid ? gallery : table)(one.name, columns, found.rows, state.sort, { ...acts }) : h("p", { class: "empty" }, "no rows pass these filters"), pager);
  if (!state.search) ask("api/count", { run: one.name, filters: state.filters }, signal).then(({ rows: passing }) => { number.textContent = count(passing); }, () => {});
}

async function opened() {
  if (!state.row) { if (dialog.open) dialog.close(); return; }
  const one = run(), close = () => go({ row: null, after: state.after });
  const searched = one.search ? one : runs.find(other => other.search);
  const width = searched?.columns.find(column => column.name === "embedding")?.shape[0];
  dialog.replaceChildren(...(await row(one, state.row, { close, width, search: searched ? (at, column) => fresh({ run: searched.name, search: { from: one.name, at, column } }) : null })).flat(Infinity).filter(part => part));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}
dialog.addEventListener("cancel", event => { event.preventDefault(); go({ row: null, after: state.after }); });
dialog.addEventListener("click", event => { if (event.target === dialog) go({ row: null, after: state.after }); });

const failed = error => {
  if (error.name === "AbortError") return;
  main.replaceChildren(h("p", { class: "reason" }, error instanceof Refused ? visible(error.message) : `${error}`), button("start again", () => fresh({ run: run()?.name })));
};

let drawnFor = "";
async function draw() {
  const last = state;
  state = read();
  head();
  const { row: _, ...rest } = state, shown = JSON.stringify(rest);
  try {
    if (shown !== drawnFor) {
      drawnFor = shown;
      running?.abort();
      running = new AbortController();
      const { signal } = running;
      main.classList.add("busy");
      document.body.classList.toggle("comparing", Boolean(state.compare));
      if (state.compare) {
        side.replaceChildren();
        const parts = await comparison(runs, state.compare, changes => go({ compare: { ...state.compare, after: null, ...changes } }), (name, at) => fresh({ run: name, row: at }), signal);
        main.replaceChildren(...parts.flat(Infinity).filter(part => part));
      } else {
        await rows(signal);
        if (JSON.stringify([last.run, last.filters, last.spread, last.compare]) !== JSON.stringify([state.run, state.filters, state.spread, state.compare]) || !side.children.length) beside(signal).catch(failed);
      }
    }
    await opened();
  } catch (error) {
    drawnFor = "";
    failed(error);
  } finally {
    main.classList.remove("busy");
  }
}

async function start() {
  try {
    ({ runs } = await ask("api/runs"));
    document.title = `${runs.map(one => one.name).join(", ")} · latentmill view`;
    addEventListener("hashchange", draw);
    await draw();
    setInterval(async () => { if (runs.some(one => one.state === "running")) { ({ runs } = await ask("api/runs")); head(); } }, 5000);
  } catch (error) {
    failed(error);
  }
}
start();
