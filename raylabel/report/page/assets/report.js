// What all pages share: data files, the search field, light and dark. Foreign text is only ever set as text.
"use strict";
const raylabel = (() => {
  const waiting = new Map();

  function bytesOf(text) {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const raw = atob(text), bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return bytes;
  }

  // Called by a data file as it is loaded.
  async function take(name, text) {
    const { resolve, reject } = waiting.get(name);
    waiting.delete(name);
    try {
      const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("gzip"));
      resolve(await new Response(stream).arrayBuffer());
    } catch (error) { reject(error); }
  }

  // Asked again before it has come, it is the same load: `take` knows a file by its name alone.
  function load(name) {
    if (waiting.has(name)) return waiting.get(name).promise;
    const entry = {};
    waiting.set(name, entry);
    entry.promise = new Promise((resolve, reject) => {
      Object.assign(entry, { resolve, reject });
      const script = document.createElement("script");
      script.src = `data/${name}.js`;
      script.onload = () => script.remove();
      script.onerror = () => { script.remove(); waiting.delete(name); reject(new Error(`data/${name}.js cannot be read`)); };
      document.head.append(script);
    });
    return entry.promise;
  }

  const decoder = new TextDecoder();
  async function loadJson(name) { return JSON.parse(decoder.decode(await load(name))); }

  // A packed table: {rows, columns by name}; texts are one string with a line a row.
  async function loadColumns(name) {
    const buffer = await load(name), length = new DataView(buffer).getUint32(0, true);
    const header = JSON.parse(decoder.decode(new Uint8Array(buffer, 4, length))), columns = {};
    for (const c of header.columns) {
      const at = 4 + length + c.at;
      if (c.type === "f32") columns[c.name] = new Float32Array(buffer, at, c.bytes / 4);
      else if (c.type === "i32") columns[c.name] = new Int32Array(buffer, at, c.bytes / 4);
      else if (c.type === "u8") columns[c.name] = new Uint8Array(buffer, at, c.bytes);
      else columns[c.name] = decoder.decode(new Uint8Array(buffer, at, c.bytes));
    }
    return { rows: header.rows, columns };
  }

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (key === "style") Object.assign(made.style, value);
      else made.setAttribute(key, value === true ? "" : value);
    }
    made.append(...children.filter((c) => c !== null && c !== undefined));
    return made;
  }

  function svg(name, attributes = {}, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  const nameOf = (layer, neuron, polarity) => `${layer}.${neuron}${polarity < 0 ? "−" : ""}${Math.abs(polarity) === 2 ? " g≤0" : ""}`;
  const linkTo = (layer, neuron, polarity) => `unit.html#layer=${layer}&neuron=${neuron}&polarity=${polarity}`;

  function number(value, digits = 2, percent = false) {
    if (value === null || value === undefined || Number.isNaN(value)) return "·";
    if (percent) return `${(100 * value).toFixed(digits)} %`;
    const text = value.toFixed(digits);
    return Number(text) === 0 ? text.replace("-", "") : text;
  }

  // An activation or another number of any size, with three significant digits.
  function figure(value) {
    if (value === null || value === undefined || Number.isNaN(value)) return "·";
    return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(3));
  }

  // `3.117` or `3/117` names a unit.
  function unitNamed(text) {
    const found = /^\s*(?:L|layer\s*)?(\d+)\s*[./:\s]\s*(?:N|neuron\s*)?(\d+)\s*([-−]?)\s*$/i.exec(text);
    return found && { layer: +found[1], neuron: +found[2], polarity: found[3] ? -1 : 1 };
  }

  const stored = { get: () => { try { return localStorage.getItem("raylabel-theme"); } catch { return null; } },
                   set: (value) => { try { localStorage.setItem("raylabel-theme", value); } catch { /* not kept, then */ } } };
  const theme = stored.get();
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;

  const self = { take, load, loadJson, loadColumns, element, svg, nameOf, linkTo, number, figure, unitNamed, index: null };
  document.addEventListener("DOMContentLoaded", () => {
    self.index = JSON.parse(document.body.dataset.index);
    document.getElementById("theme").addEventListener("click", () => {
      const root = document.documentElement, now = root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
      root.dataset.theme = now === "dark" ? "light" : "dark";
      stored.set(root.dataset.theme);
    });
    const find = document.getElementById("find");
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
      if (event.key === "/" && !typing) { event.preventDefault(); find.focus(); find.select(); }
      if (event.key === "Escape" && event.target === find) find.blur();
      if (event.key === "u" && !typing && !document.getElementById("units")) location.href = "units.html";
    });
    find.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !find.value.trim()) return;
      const unit = unitNamed(find.value);
      if (unit) location.href = linkTo(unit.layer, unit.neuron, unit.polarity);
      else if (!document.getElementById("units")) location.href = `units.html#q=${encodeURIComponent(find.value)}`;
    });
  });
  return self;
})();
