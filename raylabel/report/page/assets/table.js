// The table of all units: columns come file by file, search and sort work on what has come, pages show the rows.
"use strict";
document.addEventListener("DOMContentLoaded", async () => {
  const { element, number, figure, nameOf, linkTo, index } = raylabel;
  const PAGE = 100, NULL_LAST = Infinity;
  const chunks = [];            // {at, rows, columns, lines(name), lower(name)}
  const head = document.querySelector("#units thead"), body = document.querySelector("#units tbody");
  const find = document.getElementById("find"), count = document.getElementById("count");
  const back = document.getElementById("back"), next = document.getElementById("next");
  const controls = Object.fromEntries(["layer", "kind", "evidence", "verified", "phrases"].map((id) => [id, document.getElementById(id)]));
  const columns = [{ name: "place", title: "unit", about: "layer and neuron; − is the low end", narrow: true },
                   { name: "label", title: "label and words", about: "label; below it, the concept's words and the words at the peaks", narrow: true },
                   { name: "verified", title: "✓", about: "verified: flagged, reproduced, driven by something that was swapped, active enough", narrow: true, rises: true },
                   ...index.columns];
  let sort = null, falls = false, page = 0, order = new Uint32Array(0), chosen = -1, search = 0, matched = null, snippets = new Map(), drawn = [];

  let recent = null;
  function chunkOf(row) {
    if (recent !== null && row >= recent.at && row < recent.at + recent.rows) return recent;
    let low = 0, high = chunks.length - 1;
    while (low < high) { const middle = (low + high + 1) >> 1; if (chunks[middle].at <= row) low = middle; else high = middle - 1; }
    return recent = chunks[low];
  }
  const valueOf = (name, row) => { const c = chunkOf(row); return c.columns[name] ? c.columns[name][row - c.at] : NaN; };
  const textOf = (name, row) => { const c = chunkOf(row); return c.lines(name)[row - c.at]; };

  function added(at, packed) {
    const lines = {};
    // What a search reads is made as the files come: the first one answers as fast as the others.
    chunks.push({ at, ...packed, lines: (name) => lines[name] ||= packed.columns[name].split("\n"),
      lower: ["label", "words"].map((name) => starts(packed.columns[name].toLowerCase(), packed.rows)) });
    loaded = at + packed.rows;
  }
  let loaded = 0;

  // A text of many lines with where each begins, to find the line of a match.
  function starts(text, rows) {
    const found = new Uint32Array(rows);
    for (let i = text.indexOf("\n"), line = 1; i >= 0; i = text.indexOf("\n", i + 1)) found[line++] = i + 1;
    return { text, found };
  }
  function matches(lined, wanted, hit) {
    const { text, found } = lined;
    for (let i = text.indexOf(wanted), line = 0; i >= 0;) {
      let low = line, high = found.length - 1;
      while (low < high) { const middle = (low + high + 1) >> 1; if (found[middle] <= i) low = middle; else high = middle - 1; }
      hit(low, i);
      line = low + 1;
      if (line >= found.length) break;
      i = text.indexOf(wanted, found[line]);
    }
  }

  function filtered() {
    const layer = controls.layer.value, verified = controls.verified.checked;
    const codes = ["kind", "evidence"].filter((c) => controls[c] && controls[c].value).map((c) => [c, index.codes[c].indexOf(controls[c].value)]);
    const found = new Uint32Array(loaded);
    let n = 0;
    for (const c of chunks) {
      const equal = codes.map(([name, code]) => [c.columns[name], code]);
      if (verified) equal.push([c.columns.verified, 1]);
      if (layer !== "") equal.push([c.columns.layer, +layer]);
      for (let i = 0; i < c.rows; i++) {
        if (matched && !matched[c.at + i]) continue;
        if (equal.length === 0 || equal.every(([values, wanted]) => values[i] === wanted)) found[n++] = c.at + i;
      }
    }
    return found.slice(0, n);
  }

  // Positions of numbers in rising order, equal ones in their own: each is packed with its position into one number, its
  // single-precision bits first, as the browser sorts bare numbers ten times faster than it calls a comparison back.
  function rising(keys) {
    const room = 2 ** Math.ceil(Math.log2(Math.max(keys.length, 2)));
    if (room > 2 ** 21 || !keys.every((key) => Math.fround(key) === key)) {
      return new Uint32Array(keys.length).map((_, i) => i).sort((a, b) => keys[a] - keys[b] || a - b);
    }
    const bits = new Uint32Array(new Float32Array(keys).buffer), packed = new Float64Array(keys.length);
    for (let i = 0; i < packed.length; i++) packed[i] = ((bits[i] >>> 31 ? ~bits[i] : bits[i] | 0x80000000) >>> 0) * room + i;
    return Uint32Array.from(packed.sort(), (value) => value % room);
  }

  function ranksOf(texts) {
    const compare = new Intl.Collator("en").compare, ranks = new Map();
    let last = null;
    for (const text of [...new Set(texts)].sort(compare)) {
      ranks.set(text, last === null ? 0 : ranks.get(last) + (compare(last, text) !== 0));
      last = text;
    }
    return ranks;
  }

  function sorted(rows) {
    if (sort === null) return falls ? rows.slice().reverse() : rows;
    const by = (value) => {
      // Adding 0 makes −0 the 0 that it equals.
      const key = (row) => { const found = value(row); return Number.isNaN(found) ? NULL_LAST : (falls ? -found : found) + 0; };
      return rising(Float64Array.from(rows, key));
    };
    const turned = (places) => places.map((i) => rows[i]);
    if (sort === "label") {
      const ranks = ranksOf(Array.from(rows, (row) => textOf("label", row)));
      return turned(by((row) => ranks.get(textOf("label", row))));
    }
    if (sort === "place") {
      rows = turned(by((row) => valueOf("neuron", row) * 8 + 4 - valueOf("polarity", row)));
      return turned(by((row) => valueOf("layer", row)));
    }
    const codes = index.codes[sort], inOrder = codes && codes.slice().sort((a, b) => (a === "") - (b === "") || a.localeCompare(b));
    const ranks = codes && codes.map((code) => (code === "" ? NaN : inOrder.indexOf(code)));
    return turned(by((row) => (codes ? ranks[valueOf(sort, row)] : valueOf(sort, row))));
  }

  function refresh(keep = false) {
    order = sorted(filtered());
    page = keep ? Math.min(page, Math.max(Math.ceil(order.length / PAGE) - 1, 0)) : 0;
    chosen = -1;
    draw();
  }

  function marked(text, wanted) {
    const at = wanted ? text.toLowerCase().indexOf(wanted) : -1;
    if (at < 0) return [text];
    return [text.slice(0, at), element("mark", {}, text.slice(at, at + wanted.length)), text.slice(at + wanted.length)];
  }

  function cell(column, row, wanted) {
    const quiet = column.narrow ? "" : " wider";
    if (column.name === "place") {
      const place = ["layer", "neuron", "polarity"].map((n) => valueOf(n, row));
      return element("td", {}, element("a", { href: linkTo(...place) }, nameOf(...place)));
    }
    if (column.name === "label") {
      const label = textOf("label", row), status = index.codes.status[valueOf("status", row)];
      const made = element("td", { class: "what", dir: "auto" }, ...(label ? marked(label, wanted) : [element("small", {}, status === "ok" ? "no label" : status.replace("_", " "))]));
      const words = snippets.has(row) ? `“${snippets.get(row)}”` : textOf("words", row);
      if (words && words !== label) made.append(element("small", { title: words }, ...marked(words, wanted)));
      return made;
    }
    if (column.name === "verified") return element("td", { class: "yes" }, valueOf("verified", row) ? element("span", { role: "img", "aria-label": "verified" }, "✓") : "");
    const value = valueOf(column.name, row);
    if (index.codes[column.name]) return element("td", { class: quiet }, index.codes[column.name][value] || "·");
    return element("td", { class: `n${quiet}` }, column.name === "max" ? figure(value) : number(value, column.digits, column.percent));
  }

  function draw() {
    const wanted = find.value.trim().toLowerCase();
    head.replaceChildren(element("tr", {}, ...columns.map((c) => {
      const on = sort === c.name, button = element("button", { type: "button", title: c.about, "aria-label": `${c.title}: ${c.about}; sort` }, c.title + (on ? (falls ? " ↓" : " ↑") : ""));
      button.addEventListener("click", () => {
        if (sort === c.name) { if (falls !== !!c.rises) { sort = null; falls = false; } else falls = !falls; }
        else { sort = c.name; falls = !!c.rises; }
        refresh(); remember();
        head.querySelectorAll("button")[columns.indexOf(c)].focus();
      });
      return element("th", { scope: "col", class: (c.digits !== undefined && c.digits !== null ? "n" : "") + (c.narrow ? "" : " wider"), "aria-sort": on ? (falls ? "descending" : "ascending") : null }, button);
    })));
    const first = page * PAGE;
    drawn = Array.from(order.slice(first, first + PAGE));
    body.replaceChildren(...drawn.map((row, i) => element("tr", { class: i === chosen ? "chosen" : null }, ...columns.map((c) => cell(c, row, wanted)))));
    const all = order.length.toLocaleString("en"), pages = Math.max(Math.ceil(order.length / PAGE), 1);
    const rest = loaded < index.rows ? `; ${Math.round(100 * loaded / index.rows)} % of the table is loaded` : "";
    count.textContent = `${all} of ${index.rows.toLocaleString("en")} units${sort === null && !falls ? ", most convincing first" : ""}${rest}${searching}`;
    document.getElementById("at").textContent = `page ${(page + 1).toLocaleString("en")} of ${pages.toLocaleString("en")}`;
    back.disabled = page === 0;
    next.disabled = page + 1 >= pages;
  }
  let searching = "";

  function matchIn(c, wanted) {
    for (const lined of c.lower) matches(lined, wanted, (line) => { matched[c.at + line] = 1; });
  }

  async function look() {
    const mine = ++search, wanted = find.value.trim().toLowerCase();
    snippets = new Map();
    searching = "";
    matched = wanted ? new Uint8Array(index.rows) : null;
    if (wanted) for (const c of chunks) matchIn(c, wanted);
    refresh(); remember();
    if (!wanted || !controls.phrases.checked) return;
    for (let i = 0; i < index.phrases; i++) {
      const packed = await raylabel.loadColumns(`phrases-${String(i).padStart(3, "0")}`).catch(() => null);
      if (mine !== search) return;
      if (packed) {
        const text = packed.columns.phrases, lined = starts(text.toLowerCase(), packed.rows);
        matches(lined, wanted, (line, at) => {
          const row = i * index.phraseRows + line;
          matched[row] = 1;
          // Upper and lower case may differ in length for a few letters: then the phrase is cut elsewhere, no worse.
          const a = Math.max(text.lastIndexOf("\x1f", at), text.lastIndexOf("\n", at)) + 1;
          const ends = [text.indexOf("\x1f", at), text.indexOf("\n", at)].filter((e) => e >= 0);
          if (snippets.size < 5000) snippets.set(row, text.slice(a, ends.length ? Math.min(...ends) : undefined).slice(0, 200));
        });
      }
      searching = i + 1 < index.phrases ? `; phrases ${Math.round(100 * (i + 1) / index.phrases)} %` : "";
      if (i + 1 === index.phrases || i % 10 === 0) refresh(true);
    }
  }

  function remember() {
    const state = new URLSearchParams();
    if (find.value.trim()) state.set("q", find.value.trim());
    for (const name of ["layer", "kind", "evidence"]) if (controls[name] && controls[name].value) state.set(name, controls[name].value);
    for (const name of ["verified", "phrases"]) if (controls[name].checked) state.set(name, "1");
    if (sort !== null) state.set("sort", (falls ? "-" : "") + sort);
    if (page) state.set("page", page + 1);
    history.replaceState(null, "", `#${state}`);
  }
  function recall() {
    const state = new URLSearchParams(location.hash.slice(1));
    find.value = state.get("q") || "";
    for (const name of ["layer", "kind", "evidence"]) if (controls[name]) controls[name].value = state.get(name) || "";
    for (const name of ["verified", "phrases"]) controls[name].checked = state.get(name) === "1";
    const wanted = state.get("sort") || "";
    sort = columns.some((c) => c.name === wanted.replace("-", "")) ? wanted.replace("-", "") : null;
    falls = sort !== null && wanted.startsWith("-");
    return Math.max((parseInt(state.get("page"), 10) || 1) - 1, 0);
  }

  const turn = (by) => { const pages = Math.ceil(order.length / PAGE); if (page + by >= 0 && page + by < pages) { page += by; chosen = -1; draw(); remember(); scrollTo(0, 0); } };
  back.addEventListener("click", () => turn(-1));
  next.addEventListener("click", () => turn(1));
  let timer;
  find.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(look, 120); });
  document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
  for (const name of ["layer", "kind", "evidence", "verified"]) if (controls[name]) controls[name].addEventListener("change", () => { refresh(); remember(); });
  controls.phrases.addEventListener("change", look);
  addEventListener("hashchange", () => { page = recall(); look(); });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|BUTTON)$/.test(event.target.tagName) && event.target !== find) return;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      chosen = Math.min(Math.max(chosen + (event.key === "ArrowDown" ? 1 : -1), 0), drawn.length - 1);
      body.querySelectorAll("tr").forEach((row, i) => row.classList.toggle("chosen", i === chosen));
      if (body.rows[chosen]) { body.rows[chosen].scrollIntoView({ block: "nearest" }); body.rows[chosen].querySelector("a").focus({ preventScroll: true }); }
    } else if (event.target !== find && event.key === "ArrowRight") turn(1);
    else if (event.target !== find && event.key === "ArrowLeft") turn(-1);
  });

  const wantedPage = recall();
  try {
    for (let i = 0; i < index.files; i++) {
      added(index.edges[i], await raylabel.loadColumns(`units-${String(i).padStart(3, "0")}`));
      if (matched) matchIn(chunks[i], find.value.trim().toLowerCase());
      if (i === 0) {
        if (find.value.trim()) look(); else refresh();
        document.body.dataset.ready = "first";
      } else if (i % 4 === 0 && i + 1 < index.files) refresh(true);
      // Between two files the page answers.
      await new Promise((resolve) => setTimeout(resolve));
    }
    page = page || wantedPage;
    refresh(true);
    document.body.dataset.ready = "all";
  } catch (error) { count.textContent = `The table cannot be shown: ${error.message}`; }
});
