// The page of one unit, named in the address: #layer=3&neuron=117&polarity=1.
"use strict";
document.addEventListener("DOMContentLoaded", () => {
  const { element: el, svg, number, figure, linkTo, nameOf, index } = raylabel;
  const BEFORE = 24, AFTER = 10, PHRASE = 5;
  const place = document.getElementById("unit");
  const files = new Map();
  let units = [], at = -1, asked = 0;

  const interval = (value, low, high, digits = 2) => `${number(value, digits)} [${number(low, digits)}, ${number(high, digits)}]`;
  const section = (title, ...children) => el("section", {}, el("h2", {}, title), ...children);
  const facts = (pairs) => el("dl", { class: "facts" }, ...pairs.filter(([, v]) => v !== null && v !== undefined && v !== "·").map(([k, v]) => el("div", {}, el("dt", {}, k), el("dd", {}, String(v)))));
  const table = (heads, rows) => el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...heads.map(([h, n]) => el("th", { scope: "col", class: n ? "n" : null }, h)))),
    el("tbody", {}, ...rows.map((cells) => el("tr", {}, ...cells.map((c, i) => el("td", { class: heads[i][1] ? "n" : null }, c)))))));
  const whole = (n) => (n === null || n === undefined ? "·" : Math.round(n).toLocaleString("en"));

  async function file(layer, block) {
    const name = `unit-${layer}/${String(block).padStart(5, "0")}`;
    if (!files.has(name)) files.set(name, raylabel.loadJson(name));
    return files.get(name);
  }

  async function show() {
    const mine = ++asked, state = new URLSearchParams(location.hash.slice(1));
    const layer = Number(state.get("layer") ?? index.layers[0]), neuron = Number(state.get("neuron") ?? 0), polarity = Number(state.get("polarity") ?? 1);
    const name = nameOf(layer, neuron, polarity);
    try {
      if (!Number.isInteger(layer) || !Number.isInteger(neuron) || !index.layers.includes(layer)) throw new Error("no such layer");
      units = await file(layer, Math.floor(neuron / index.block));
    } catch { units = []; }
    if (mine !== asked) return;
    at = units.findIndex((u) => u.neuron === neuron && u.polarity === polarity);
    if (at < 0) {
      place.replaceChildren(el("h1", {}, `No unit ${name}`), el("p", { class: "quiet" }, "The run has no such unit. ", el("a", { href: "units.html" }, "All units")));
      return;
    }
    render(units[at]);
    document.title = `${units[at].name} ${units[at].label || ""} – raylabel`;
    document.body.dataset.ready = name;
    scrollTo(0, 0);
  }

  async function step(by) {
    if (at < 0) return;
    const here = units[at];
    let i = at + by, list = units, block = Math.floor(here.neuron / index.block);
    const last = Math.floor(index.last[here.layer] / index.block);
    while (i < 0 || i >= list.length) {
      block += by;
      if (block < 0 || block > last) return;
      list = await file(here.layer, block).catch(() => []);
      i = by > 0 ? 0 : list.length - 1;
    }
    location.hash = linkTo(here.layer, list[i].neuron, list[i].polarity).split("#")[1];
  }

  function render(u) {
    place.replaceChildren(...[head(u), concept(u), exemplars(u), causal(u), logits(u), scores(u), statistics(u), near(u)].filter(Boolean));
  }

  function head(u) {
    const tags = [], r = u.results;
    const tag = (text, css) => tags.push(el("li", { class: css }, text));
    if (u.verified) tag("verified", "strong"); else if (u.flagged) tag("flagged, not verified"); else tag("not flagged");
    if (u.kind) tag(`kind: ${u.kind}`);
    if (u.evidence) tag(`driven by: ${u.evidence}`);
    if (u.status !== "ok") tag(u.status === "too_few" ? "too few exemplars" : u.status, "bad");
    if (u.statistics && u.statistics.dead) tag("never fires", "bad");
    if (u.statistics && u.statistics.dense) tag("fires on many tokens");
    const made = el("div", {}, el("p", { class: "quiet" }, `unit ${u.name}, ${u.site}`, u.polarity < 0 ? " (its low end: signs are turned)" : ""),
      el("h1", { dir: "auto" }, u.label || (u.status === "ok" ? "no label" : "no label: " + (u.status === "too_few" ? "too few exemplars" : u.status))));
    if (u.description) made.append(el("p", { class: "lead", dir: "auto" }, u.description));
    if (u.label_source) made.append(el("p", { class: "quiet" }, `Label from: ${u.label_source}. `, r.score !== null ? `Mean corrected score ${number(r.score)}. ` : "", r.agreement !== null ? `Agreement with the concept ${number(r.agreement)}.` : ""));
    if (u.meanings.length > 1 || (u.meanings.length === 1 && u.meanings[0][0] !== u.label))
      made.append(el("h3", {}, "Meanings"), el("ul", { class: "plain" }, ...u.meanings.map(([label, share]) => el("li", {}, bar(share), `${label} `, el("small", {}, number(share, 0, true))))));
    made.append(el("ul", { class: "tags" }, ...tags));
    made.append(facts([["normalised activation", number(r.normalised_activation)], ["q-value", number(r.q_value, 3)], ["decoys as good", number(r.decoy_rate, 0, true)],
      ["family similarity", number(r.family_similarity)], ["phrase similarity", number(r.phrase_similarity)], ["word families", whole(u.candidate.n_families)], ["retention", number(r.retention)], ["specificity", number(r.specificity)]]));
    const others = units.filter((o) => o.neuron === u.neuron && o.polarity !== u.polarity);
    if (others.length) made.append(el("p", {}, "Its other end: ", ...others.flatMap((o) => [el("a", { href: linkTo(o.layer, o.neuron, o.polarity) }, o.name), ` ${o.label || ""} `])));
    if (index.links.length) made.append(el("p", {}, "Elsewhere: ", ...index.links.flatMap((l) => [el("a", { href: l.url.replace("{layer}", u.layer).replace("{neuron}", u.neuron), rel: "noreferrer" }, l.name), " "])));
    return made;
  }

  function bar(share, most = 90) {
    return el("span", { class: "bar-cell", style: { width: `${Math.max(Math.min(share || 0, 1), 0) * most}px` }, "aria-hidden": "true" });
  }

  function concept(u) {
    const c = u.concept;
    if (!c) return null;
    const most = Math.max(...c.words.map(([, w]) => w || 0), 1e-9);
    const words = el("p", { class: "words", dir: "auto" }, ...c.words.map(([word, weight]) => el("span", { style: { fontSize: `${13 + 13 * (weight || 0) / most}px` } }, word, weight === null ? "" : el("small", {}, ` ${number(weight)}`))));
    return section("Concept", el("p", {}, c.claimed ? "Borne out on held-back text" : c.claimed === false ? "Not borne out on held-back text" : "Not tested", ` (AUROC ${interval(c.auroc, c.auroc_low, c.auroc_high)}`,
      c.auroc_unseen === null ? "" : `, on words absent from the search ${number(c.auroc_unseen)}`, `, q ${number(c.q_value, 3)}). Found without the label, proposed by: ${c.proposer || "·"}.`), words);
  }

  function exemplars(u) {
    const groups = [["Strongest", "top", "explain"], ["Over the quantiles of the samples it fires in", "quantile", "explain"], ["Held back from labelling: strongest", "top", "score"],
      ["Held back from labelling: over the quantiles", "quantile", "score"], ["Samples drawn at random", "random", "explain"]];
    const made = section("Exemplars");
    const shares = u.statistics && u.statistics.fires ? " Over the quantiles, the share of its firing tokens that are as strong or stronger stands below the activation." : "";
    made.append(el("p", { class: "quiet" }, `The deeper the colour, the nearer to the largest activation shown; the token at the peak is framed, its phrase underlined.${shares}`));
    for (const [title, how, split] of groups) {
      const mine = u.exemplars.filter((e) => e.how === how && e.split === split);
      if (!mine.length) continue;
      mine.sort((a, b) => (how === "top" ? a.rank - b.rank : b.activation - a.activation));
      const list = el("div", { class: "exemplars" }, ...mine.map((e) => exemplar(e, how === "quantile" ? strongerThan(u.statistics, e.activation) : null)));
      if (how === "top" && split === "explain") made.append(el("h3", {}, title), list);
      else made.append(el("details", { open: how === "quantile" && split === "explain" }, el("summary", {}, `${title} (${mine.length})`), list));
    }
    return u.exemplars.length ? made : section("Exemplars", el("p", { class: "quiet" }, "None recorded."));
  }

  // Share of the tokens above 0 at which the unit is as strong or stronger, read off the histogram, by ratios within a bin.
  function strongerThan(s, value) {
    if (!s || !s.fires || !(value > 0)) return null;
    let above = 0;
    for (let i = s.histogram.length - 2; i >= 0; i--) {
      const [low, n] = s.histogram[i], high = s.histogram[i + 1][0];
      if (low === null || low < value) {
        if (high !== null && high > value) above += n * (low > 0 ? Math.log(high / value) / Math.log(high / low) : (high - value) / high);
        break;
      }
      above += n;
    }
    return Math.min(above / s.fires, 1);
  }

  function exemplar(e, stronger = null) {
    const text = el("p", { class: "text", dir: "auto" });
    const first = Math.max(0, e.at - BEFORE), last = Math.min(e.tokens.length, e.at + AFTER + 1);
    const span = (i) => el("span", { class: [i === e.at ? "mat" : "", Math.abs(i - e.at) <= PHRASE ? "phrase" : ""].join(" ").trim() || null,
      style: e.shares[i] > 2 ? { background: `rgba(var(--glow), calc(var(--glow-most) * ${e.shares[i] / 100}))` } : undefined, title: `${e.shares[i]} % of the largest` }, e.tokens[i]);
    const fill = (a, b) => { for (let i = a; i < b; i++) text.append(span(i)); };
    const more = (label, run) => { const button = el("button", { type: "button", "aria-label": label, title: label }, "…"); button.addEventListener("click", run); return button; };
    const short = first > 0 || last < e.tokens.length;
    if (short) text.append(more("Show all that was kept of this text", () => { text.replaceChildren(); fill(0, e.tokens.length); }));
    fill(first, last);
    return el("div", { class: "exemplar" }, el("div", { class: "value", title: `sample ${e.sample}, document ${e.document ?? "·"}` }, figure(e.activation),
      stronger === null ? null : el("small", {}, stronger < 0.001 ? "< 0.1 %" : number(stronger, 1, true))), text);
  }

  function causal(u) {
    const c = u.causal;
    if (!c) return section("What drives it", el("p", { class: "quiet" }, u.flagged ? "Not measured." : "Words were not swapped: the unit was not flagged."));
    const made = section("What drives it");
    const verdicts = { concept: "The concept: near words keep more of the activation than random ones.", token: "The token: the word at the peak matters, and no like word stands in for it.",
      context: "The context: a word before the peak matters.", none: "Nothing that was tried mattered, which does not show that nothing does." };
    made.append(el("p", { class: "verdict" }, verdicts[u.evidence] || "No verdict."));
    made.append(el("p", {}, `Swapping the word at the peak costs ${interval(c.drop_mat, c.drop_mat_low, c.drop_mat_high)} of the activation; `,
      c.drop_context_offset === null ? "" : `the word ${Math.abs(c.drop_context_offset)} before it costs ${interval(c.drop_context, c.drop_context_low, c.drop_context_high)}; `,
      `neighbours keep ${interval(c.specificity, c.specificity_low, c.specificity_high)} more than random words at the peak. `,
      `${whole(c.n_variants)} variants; ${number(c.reproduced, 0, true)} of exemplars reproduced.`, c.note ? ` Note: ${c.note}` : ""));
    const near = c.retention_by_offset, random = c.retention_random_by_offset;
    if (near.length) {
      made.append(offsets(near, random));
      made.append(el("p", { class: "legend" }, el("span", { class: "key good" }), "neighbours ", el("span", { class: "key other" }), "random words: share of the activation kept, above its background"));
      const heads = [["", false], ...["−5", "−4", "−3", "−2", "−1", "peak", "all", "context"].map((h) => [h, true])];
      const row = (name, by, all, context) => [name, ...Array.from({ length: 6 }, (_, i) => number(by[i])), number(all), number(context)];
      made.append(table(heads, [row("neighbours", near, c.retention, c.retention_context), row("random words", random, c.retention_random, c.retention_random_context)]));
    }
    if (u.swaps) {
      const chip = ([word, kept]) => el("span", { class: "swap" }, bar(kept, 34), word, " ", el("i", {}, number(kept)));
      made.append(el("h3", {}, "Swaps"), table([["word", false], ["place", true], ["neighbours, and the share of the activation kept", false], ["random words", false]],
        u.swaps.map(([offset, word, a, b]) => [el("bdi", {}, word), offset === 0 ? "peak" : `${-offset} before`, el("div", { class: "swaps" }, ...a.map(chip)), el("div", { class: "swaps" }, ...b.map(chip))])));
    }
    if (c.promoted.length) made.append(el("p", {}, el("span", { class: "quiet" }, "Raised the activation: "), el("bdi", {}, c.promoted.join(", "))));
    return made;
  }

  // Bars of what is kept when the word at each offset is swapped, neighbours beside random words.
  function offsets(near, random) {
    const width = 460, height = 150, base = 122, step = 74, scale = 100;
    const label = `Share kept by offset. Neighbours: ${near.map((v) => number(v)).join(", ")}. Random words: ${random.map((v) => number(v)).join(", ")}.`;
    const made = svg("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
    for (const level of [0, 0.5, 1]) made.append(svg("line", { class: "grid", x1: 30, x2: width, y1: base - level * scale, y2: base - level * scale }), svg("text", { class: "tick", x: 24, y: base - level * scale + 4, "text-anchor": "end" }, String(level)));
    ["−5", "−4", "−3", "−2", "−1", "peak"].forEach((name, i) => {
      [[near, "concept", 0], [random, "token", 26]].forEach(([values, css, shift]) => {
        const value = values[i];
        if (value === null || value === undefined) return;
        const size = Math.min(Math.max(value, 0), 1.15) * scale;
        made.append(svg("rect", { class: css, x: 40 + i * 70 + shift, y: base - size, width: 22, height: size }));
      });
      made.append(svg("text", { class: "tick", x: 64 + i * 70, y: base + 16, "text-anchor": "middle" }, name));
    });
    return made;
  }

  function logits(u) {
    const list = (values) => {
      const most = Math.max(...values.map(([, v]) => Math.abs(v)), 1e-9), css = (v) => `rgba(var(--glow), calc(var(--glow-most) * ${0.75 * Math.abs(v) / most}))`;
      return el("ol", {}, ...values.map(([token, value]) => el("li", { style: { background: css(value) } }, el("span", { dir: "auto" }, token), el("span", {}, figure(value)))));
    };
    if (!u.logits_up || !u.logits_up.length) return null;
    return section("What it writes", el("p", { class: "quiet" }, "Direct effect on the output's logits, from the weights alone" + (u.polarity < 0 ? ", for the low end." : ".")),
      el("div", { class: "logits" }, el("div", {}, el("h3", {}, "Raises"), list(u.logits_up)), el("div", {}, el("h3", {}, "Lowers"), list(u.logits_down))));
  }

  function scores(u) {
    if (!u.scores) return null;
    return section("Scores", el("p", { class: "quiet" }, "Corrected: 0 is what other units' labels reach on the same windows, 1 is perfect; the interval is over documents."),
      table([["scorer", false], ["label from", false], ["corrected", true], ["value", true], ["other labels", true], ["token table", true], ["windows", true], ["unscored", true]],
        u.scores.map((s) => [s.scorer, s.source, interval(s.corrected, s.low, s.high), number(s.value), number(s.shuffled), number(s.lookup), whole(s.n), whole(s.n_failed)])));
  }

  function statistics(u) {
    const s = u.statistics;
    if (!s) return null;
    return section("Statistics", facts([["tokens seen", whole(s.tokens_seen)], ["above 0", s.tokens_seen ? number(s.fires / s.tokens_seen, 2, true) : "·"], ["max", figure(u.results.max)], ["min", figure(s.min)],
      ["mean", figure(s.mean)], ["standard deviation", s.variance === null ? "·" : figure(Math.sqrt(s.variance))], ["skewness", number(s.skewness)], ["kurtosis", number(s.kurtosis)], ["mean of the strongest", figure(s.top_mean)],
      ["token similarity", number(u.candidate.token_similarity)], ["p-value", number(u.candidate.p_value, 4)]]), histogram(s.histogram));
  }

  function histogram(bins) {
    if (bins.length < 2) return "";
    const counts = bins.slice(0, -1).map(([, n]) => n), most = Math.log10(Math.max(...counts) + 1), width = 560, height = 150, base = 118, step = (width - 40) / counts.length;
    const made = svg("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Histogram of activations; counts on a logarithmic scale." });
    counts.forEach((n, i) => {
      const size = most ? 104 * Math.log10(n + 1) / most : 0, low = bins[i][0], high = bins[i + 1][0];
      const rect = svg("rect", { class: low !== null && low >= 0 ? "concept" : "token", x: 36 + i * step, y: base - size, width: Math.max(step - 1, 1), height: size });
      rect.append(svg("title", {}, `${low === null ? "below" : low} to ${high ?? "above"}: ${n.toLocaleString("en")}`));
      made.append(rect);
      const every = Math.ceil(counts.length / 9);
      if (i % every === 0 && low !== null) made.append(svg("text", { class: "tick", x: 36 + i * step, y: base + 15, "text-anchor": "middle" }, String(+low.toPrecision(2))));
    });
    made.append(svg("text", { class: "title", x: width / 2, y: height - 4, "text-anchor": "middle" }, "activation (half octaves); tokens, on a logarithmic scale"));
    return made;
  }

  function near(u) {
    const titles = { direction: "Near by output direction", logits: "Near by tokens raised and lowered", firing: "Near by firing together" };
    const made = el("div", { class: "two" });
    for (const kind of ["direction", "logits", "firing"]) {
      if (!index.nearest[kind]) continue;
      const found = (u.near || {})[kind] || [];
      const row = ([layer, neuron, polarity, label, value, same]) => el("li", {}, el("a", { href: linkTo(layer, neuron, polarity) }, nameOf(layer, neuron, polarity)), el("span", { title: label, dir: "auto" }, label || "·"),
        el("small", {}, same === undefined ? number(value) : `${number(value, 0, true)}, ${number(same, 0, true)}`));
      made.append(section(titles[kind], el("p", { class: "quiet" }, `${index.nearest[kind]}.`), found.length ? el("ul", { class: "near" }, ...found.map(row)) : el("p", { class: "quiet" }, "None.")));
    }
    return made.childElementCount ? made : null;
  }

  document.getElementById("back").addEventListener("click", () => step(-1));
  document.getElementById("next").addEventListener("click", () => step(1));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT)$/.test(event.target.tagName)) return;
    if (event.key === "ArrowRight") step(1);
    if (event.key === "ArrowLeft") step(-1);
  });
  addEventListener("hashchange", show);
  show();
});
