"use strict";

// ---- the data: one number per token and column, all rollouts in a row ------------------------------------------------

const data = JSON.parse(document.getElementById("data").textContent);

function decoded(base64, Type) {
  if (Uint8Array.fromBase64) return new Type(Uint8Array.fromBase64(base64).buffer);
  const binary = atob(base64), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return new Type(bytes.buffer);
}

const tokens = decoded(data.tokens, data.token_bytes === 2 ? Uint16Array : Uint32Array);
const columns = Object.fromEntries(Object.entries(data.numbers).map(([name, text]) => [name, decoded(text, Float32Array)]));
const unknown = new Float32Array(tokens.length).fill(NaN);
const column = name => columns[name] ?? unknown;
const alpha = column("alpha"), logQ = column("logprobs_q"), logTheta = column("logprobs_theta"), logT = column("logprobs_t");
const kl = column("kl_theta"), coverage = column("coverage");

const logWeight = i => logTheta[i] - logQ[i];
const logRatio = i => logT[i] - logTheta[i];
const isDrawn = i => !Number.isNaN(alpha[i]);
const text = i => data.texts[tokens[i]];

let start = 0;
const rollouts = data.rollouts.map((about, number) => {
  const rollout = { ...about, number, start, end: start + about.length };
  start = rollout.end;
  let alphas = 0, drawn = 0, weights = 0, squares = 0, weighted = 0;
  for (let i = rollout.start; i < rollout.end; i++) {
    if (!isDrawn(i)) continue;
    drawn++;
    alphas += alpha[i];
    const weight = Math.exp(logWeight(i));
    if (Number.isNaN(weight)) continue;
    weighted++;
    weights += weight;
    squares += weight * weight;
  }
  rollout.alpha = drawn ? alphas / drawn : undefined;
  rollout.ess = squares > 0 ? weights * weights / (weighted * squares) : undefined;
  rollout.acceptance = about.draft_tokens ? about.accepted_tokens / about.draft_tokens : undefined;
  return rollout;
});

// ---- small helpers ---------------------------------------------------------------------------------------------------

const byId = id => document.getElementById(id);
const known = value => value !== undefined && value !== null && !Number.isNaN(value);
const shown = (value, digits = 3) => !known(value) ? "–" : Number.isInteger(value) ? String(value) : value.toPrecision(digits);

function element(name, properties = {}, children = []) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// ---- colours ---------------------------------------------------------------------------------------------------------

// `place` of a value is from -1 (blue) over 0 (none) to 1 (orange).
const colours = [
  { name: "α", about: "0 is the policy, 1 the target", value: i => alpha[i], place: v => 2 * v - 1, ends: ["0", "½", "1"] },
  { name: "weight", about: "π_θ(y)/q*(y)", value: i => Math.exp(logWeight(i)), place: v => Math.log(v) / Math.log(4), ends: ["¼", "1", "4"] },
  { name: "KL", about: "KL(q*‖π_θ) at the token's place, nats", value: i => kl[i], place: v => v, ends: ["", "0", "1"], missing: !columns.kl_theta },
  { name: "log-ratio", about: "log π_t(y) − log π_θ(y), nats", value: i => logRatio(i), place: v => v / 3, ends: ["−3", "0", "3"] },
];
let colour = colours[0];

function background(place) {
  const clipped = Math.max(-1, Math.min(1, place));
  return `rgb(var(--${clipped < 0 ? "low" : "high"}) / calc(${Math.abs(clipped).toFixed(3)} * var(--strength)))`;
}

function paint(span, i) {
  const value = colour.value(i), there = !Number.isNaN(value);
  span.style.background = there ? background(colour.place(value)) : "";
  span.classList.toggle("unknown", isDrawn(i) && !there);
}

function chooseColour(chosen) {
  if (chosen.missing) return;
  colour = chosen;
  byId(`colour-${chosen.name}`).checked = true;
  for (const span of byId("rollout").querySelectorAll("span[data-i]")) paint(span, Number(span.dataset.i));
  const [low, middle, high] = chosen.ends, bar = element("i");
  bar.style.background = low ? `linear-gradient(90deg, ${background(-1)}, transparent, ${background(1)})` : `linear-gradient(90deg, transparent, ${background(1)})`;
  const words = content => element("span", { textContent: content });
  byId("legend").replaceChildren(
    words(`${chosen.name}: ${chosen.about}`), words(low || middle), bar, words(high), words(low ? `no colour: ${middle}.` : ""),
    words("Dots under a token: not known."));
}

for (const [number, each] of colours.entries()) {
  const input = element("input", { type: "radio", name: "colour", id: `colour-${each.name}`, disabled: Boolean(each.missing) });
  input.addEventListener("change", () => chooseColour(each));
  const why = each.missing ? "not in these files: dual-rollout generate writes it with --diagnostics" : `${each.about} (key ${number + 1})`;
  byId("colours").append(element("label", { title: why }, [input, ` ${each.name}`]));
}

// ---- the list: sorted, filtered, and only the rows that are seen -----------------------------------------------------

const ROW = 26;  // pixels, as in the style sheet
const figures = [
  { key: "number", name: "order" }, { key: "step", name: "step" }, { key: "reward", name: "reward", range: true },
  { key: "alpha", name: "α", range: true }, { key: "ess", name: "ESS", range: true }, { key: "length", name: "length", range: true },
];
let listed = rollouts, selected = null;

for (const figure of figures) {
  byId("sort").append(element("option", { value: figure.key, textContent: figure.name }));
  if (!figure.range) continue;
  const inputs = ["from", "to"].map(end => {
    const input = element("input", { type: "number", step: "any", id: `${end}-${figure.key}`, ariaLabel: `${figure.name} ${end}` });
    input.addEventListener("input", list);
    return input;
  });
  byId("filters").append(element("label", {}, [`${figure.name} `, ...inputs]));
}
byId("sort").addEventListener("change", list);
byId("descending").addEventListener("change", list);
byId("reset").addEventListener("click", () => {
  for (const input of byId("filters").querySelectorAll("input")) input.value = "";
  list();
});

function passes(rollout) {
  return figures.filter(figure => figure.range).every(({ key }) => {
    const [from, to] = ["from", "to"].map(end => byId(`${end}-${key}`).value);
    if (from === "" && to === "") return true;
    return known(rollout[key]) && (from === "" || rollout[key] >= Number(from)) && (to === "" || rollout[key] <= Number(to));
  });
}

function list() {
  const key = byId("sort").value, sign = byId("descending").checked ? -1 : 1;
  listed = rollouts.filter(passes);
  listed.sort((a, b) => {
    if (known(a[key]) !== known(b[key])) return known(a[key]) ? -1 : 1;  // what is not known stands last
    return (known(a[key]) && sign * (a[key] - b[key])) || a.number - b.number;
  });
  const part = data.found > rollouts.length ? ` of ${data.found} that there are, at equal distances` : "";
  byId("counts").textContent = `${listed.length} of ${rollouts.length} rollouts${part}, ${tokens.length} tokens`;
  byId("space").style.height = `${ROW * (listed.length + 1)}px`;
  byId("list").scrollTop = 0;
  drawRows();
  for (const draw of histograms) draw();
  if (!listed.includes(selected)) select(listed[0] ?? null);
}

const head = element("div", { className: "head" }, ["step", "reward", "α", "ESS", "length", "text"].map(name => element("b", { textContent: name })));
byId("list").prepend(head);

function beginning(rollout) {
  let found = "";
  for (let i = rollout.start; i < rollout.end && found.length < 80; i++) found += text(i);
  return found;
}

function drawRows() {
  const view = byId("list"), first = Math.max(0, Math.floor(view.scrollTop / ROW) - 5);
  const last = Math.min(listed.length, first + Math.ceil(view.clientHeight / ROW) + 10);
  const rows = listed.slice(first, last).map((rollout, i) => {
    const cells = [shown(rollout.step), rollout.error ? "error" : shown(rollout.reward), shown(rollout.alpha, 2), shown(rollout.ess, 2), rollout.length, beginning(rollout)];
    const row = element("div", { className: "row", id: `row-${rollout.number}` }, cells.map(cell => element("span", { textContent: cell })));
    row.setAttribute("role", "option");
    row.setAttribute("aria-selected", rollout === selected);
    row.style.top = `${ROW * (first + i)}px`;
    row.addEventListener("click", () => select(rollout));
    return row;
  });
  byId("space").replaceChildren(...rows);
}
byId("list").addEventListener("scroll", drawRows);
addEventListener("resize", drawRows);

// ---- one rollout -----------------------------------------------------------------------------------------------------

function select(rollout) {
  selected = rollout;
  hideToken();
  const view = byId("list"), top = ROW * listed.indexOf(rollout);
  if (top < view.scrollTop) view.scrollTop = top;
  if (top + 2 * ROW > view.scrollTop + view.clientHeight) view.scrollTop = top + 3 * ROW - view.clientHeight;
  drawRows();
  view.setAttribute("aria-activedescendant", rollout ? `row-${rollout.number}` : "");
  byId("rollout").replaceChildren(...(rollout ? rolloutParts(rollout) : ["no rollout passes the filter"]));
  byId("rollout").scrollTop = 0;
}

function rolloutParts(rollout) {
  const facts = [
    ["step", rollout.step], ["row", rollout.index], ["reward", rollout.reward], ["advantage", rollout.advantage], ["α", rollout.alpha],
    ["ESS", rollout.ess], ["tokens", rollout.length], ["drafts accepted", rollout.acceptance], ["target", rollout.t_target], ["error", rollout.error],
  ].filter(([, value]) => known(value));
  const parts = [element("dl", {}, facts.map(([name, value]) => element("div", {}, [
    element("dt", { textContent: name }), element("dd", { textContent: typeof value === "number" ? shown(value, 4) : value })])))];
  for (const [key, title] of [["prompt", "prompt"], ["t_prompt", "what π_t sees instead"]]) {
    if (known(rollout[key])) parts.push(element("h2", { textContent: title }), element("div", { className: `prompt ${key}`, textContent: data.prompts[rollout[key]] }));
  }
  let turn = 0;
  for (let i = rollout.start; i < rollout.end;) {
    const drawn = isDrawn(i), spans = [];
    for (; i < rollout.end && isDrawn(i) === drawn; i++) spans.push(tokenSpan(i));
    parts.push(element("h2", { textContent: drawn ? `turn ${++turn}` : "a tool's result, which nobody drew: no α, no weight" }));
    parts.push(element("div", { className: drawn ? "turn" : "turn tool" }, spans));
  }
  return parts;
}

function tokenSpan(i) {
  const span = element("span", { textContent: text(i), tabIndex: -1 });
  span.dataset.i = i;
  if (span.textContent.includes("\n")) span.className = "newline";
  paint(span, i);
  return span;
}

// ---- one token -------------------------------------------------------------------------------------------------------

function showToken(span) {
  const i = Number(span.dataset.i), probability = log => Number.isNaN(log) ? undefined : Math.exp(log);
  const rows = isDrawn(i) ? [
    ["π_θ(y)", probability(logTheta[i])], ["π_t(y)", probability(logT[i])], ["q*(y)", probability(logQ[i])], ["α", alpha[i]],
    ["weight π_θ/q*", probability(logWeight(i))], ["log π_t/π_θ", logRatio(i)], ["KL(q*‖π_θ)", kl[i]],
  ] : [["not drawn", undefined]];
  const table = element("table", {}, rows.map(([name, value]) => element("tr", {}, [
    element("th", { textContent: name }), element("td", { textContent: shown(value, 4) })])));
  const box = byId("token");
  box.replaceChildren(element("b", { textContent: JSON.stringify(text(i)) }), ` token ${data.ids[tokens[i]]}, place ${i - selected.start}`, table);
  box.hidden = false;
  const place = span.getBoundingClientRect(), below = place.bottom + 6 + box.offsetHeight < innerHeight;
  box.style.top = `${Math.max(0, below ? place.bottom + 6 : place.top - 6 - box.offsetHeight)}px`;
  box.style.left = `${Math.max(0, Math.min(place.left, innerWidth - box.offsetWidth - 8))}px`;
}

const hideToken = () => { byId("token").hidden = true; };
for (const [over, out] of [["mouseover", "mouseout"], ["focusin", "focusout"]]) {
  byId("rollout").addEventListener(over, event => event.target.dataset.i !== undefined && showToken(event.target));
  byId("rollout").addEventListener(out, hideToken);
}

function step(distance) {
  const spans = [...byId("rollout").querySelectorAll("span[data-i]")], at = spans.indexOf(document.activeElement);
  const next = spans[Math.max(0, Math.min(spans.length - 1, at + distance))];
  if (next) next.focus();
}

// ---- plots, which uPlot draws on canvases; what they show is also said in words ---------------------------------------

const HEIGHT = 96, BARS = 30, DASHES = [[], [5, 3], [1.5, 3], [9, 3]], BORDERS = ["solid", "dashed", "dotted", "dashed"];
const WHOLE = [0, 1, 2, 3, 4, 5, 6].flatMap(power => [1, 2, 5].map(digit => digit * 10 ** power));  // between steps that are named
const inTheme = name => () => getComputedStyle(document.documentElement).getPropertyValue(name);
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const charts = [];

/** An empty plot. What it returns fills it: with the values across and those of each name, and with words that tell of them. */
function plot(title, names, across, x, y, style) {
  const caption = element("figcaption", {}, [title]), picture = element("div", { role: "img" });
  const figure = element("figure", {}, [caption, picture]), line = { stroke: inTheme("--line"), width: 1 };
  const axis = {
    stroke: inTheme("--faint"), font: "10px system-ui, sans-serif", gap: 3, grid: line, ticks: { show: false },
    values: (_, places) => places.map(place => compact.format(place)),
  };
  const chart = new uPlot({
    width: 180, height: HEIGHT, padding: [6, 8, 0, 0],
    scales: { x: { time: false, range: x }, y: { range: y } },
    axes: [{ ...axis, size: 18, space: 30, incrs: across.incrs }, { ...axis, size: 36, space: 24 }],
    series: [across, ...names.map((label, k) => ({
      label, stroke: inTheme(`--line-${k % 3 + 1}`), width: 1.5, dash: DASHES[k % 4], points: { size: 4 }, value: (_, v) => shown(v), ...style }))],
    cursor: { y: false, drag: { x: false, y: false }, dataIdx: (_, __, k) => k },
    legend: {
      mount: (_, table) => caption.append(table),
      markers: { stroke: (_, k) => `var(--line-${(k + 2) % 3 + 1})`, dash: (_, k) => BORDERS[(k + 3) % 4] },  // k = 0 is what is across
    },
  }, [[], ...names.map(() => [])], picture);
  byId("plots").append(figure);
  charts.push(chart);
  return (values, words) => {
    figure.hidden = !words;
    picture.ariaLabel = `${title}: ${words}`;
    chart.setData(values);
  };
}

/** Of the rollouts that are listed, whose numbers `numbersOf` gives. Those outside of the bounds are counted at the ends. */
function histogram(title, low, high, what, numbersOf) {
  const width = (high - low) / BARS, middles = Array.from({ length: BARS }, (_, k) => low + (k + 0.5) * width);
  const bounds = k => known(k) ? `${shown(low + k * width)} to ${shown(low + (k + 1) * width)}` : "";
  const fill = plot(title, [what], { label: "", value: (_, v, __, k) => bounds(k) }, [low, high], (_, least, most) => [0, most || 1], {
    paths: uPlot.paths.bars({ size: [1, Infinity], gap: 1 }), fill: inTheme("--line-1"), width: 0, points: { show: false } });
  return () => {
    const counts = new Array(BARS).fill(0);
    for (const rollout of listed) {
      for (const v of numbersOf(rollout)) if (known(v)) counts[Math.max(0, Math.min(BARS - 1, Math.floor((v - low) / width)))]++;
    }
    const all = counts.reduce((sum, count) => sum + count), most = Math.max(...counts);
    fill([middles, counts], all && `${all} ${what}, most of them (${most}) from ${bounds(counts.indexOf(most))}`);
  };
}

const steps = [];  // what is known of each, of its training and of its evaluation
for (const entry of data.steps) steps.at(-1)?.step === entry.step ? Object.assign(steps.at(-1), entry) : steps.push({ ...entry });
steps.sort((a, b) => a.step - b.step);  // those of several runs

/** Lines over steps, of those names that the entries have. */
function lines(title, named) {
  const there = named.filter(([, name]) => steps.some(entry => known(entry[name]))), names = there.map(([key]) => key);
  const rows = steps.filter(entry => there.some(([, name]) => known(entry[name])));
  if (!rows.length) return;
  const columns = there.map(([, name]) => rows.map(entry => entry[name]));
  const words = columns.map((column, k) => {
    const values = column.filter(known), said = [values[0], values.at(-1), Math.min(...values), Math.max(...values)].map(v => shown(v));
    return `${names[k]} from ${said[0]} to ${said[1]}, between ${said[2]} and ${said[3]}`;
  });
  const y = (_, low, high) => [Math.min(0, low), Math.max(0, high) + 0.05 * (high - low) || 1];
  words.push(`steps ${rows[0].step} to ${rows.at(-1).step}`);
  plot(title, names, { label: "step", incrs: WHOLE }, undefined, y)([rows.map(entry => entry.step), ...columns], words.join("; "));
}

const own = column => rollout => column.subarray(rollout.start, rollout.end);
const histograms = [
  histogram("α of the tokens listed", 0, 1, "tokens", own(alpha)),
  histogram("log weight, nats", -4, 4, "tokens", rollout => own(logTheta)(rollout).map((v, i) => v - logQ[rollout.start + i])),
  histogram("coverage of the shorter list", 0, 1, "tokens", own(coverage)),
  histogram("drafts accepted, by rollout", 0, 1, "rollouts", rollout => [rollout.acceptance]),
];
const evaluated = [...new Set(steps.flatMap(Object.keys))].filter(name => /^eval_(\w+_)?reward$/.test(name));  // each of a dataset
lines("reward", [["q*", "reward"], ...evaluated.map(name => [`policy alone${name.slice(4, -7).replace("_", ", ")}`, name])]);
lines("α", [["mean", "sampling/alpha/mean"]]);
lines("ESS", [["of the weights", "sampling/effective_sample_size_ratio"]]);
lines("k̂ of the weights", [["k̂ (too heavy above 0.7)", "sampling/pareto_k"]]);
lines("seconds", [["rollout", "rollout/seconds"], ["sync", "perf/weight_sync_s"], ["update", "perf/update_s"]]);
lines("coverage of the lists", [["mean", "sampling/top_k_mass/mean"], ["least", "sampling/top_k_mass/min"]]);
lines("acceptance of drafts", [["share", "spec_decode/acceptance_rate"]]);

new ResizeObserver(() => {
  const widths = charts.map(chart => chart.root.closest("figure").clientWidth);
  charts.forEach((chart, i) => widths[i] && chart.setSize({ width: widths[i], height: HEIGHT }));
}).observe(byId("plots"));

// ---- theme, keys, and the first view ---------------------------------------------------------------------------------

function setTheme(name) { document.documentElement.dataset.theme = name; }
function otherTheme() {
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  for (const chart of charts) chart.redraw();
}
byId("theme").addEventListener("click", otherTheme);

addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input[type=number], select")) return;
  const move = distance => select(listed[Math.max(0, Math.min(listed.length - 1, listed.indexOf(selected) + distance))] ?? null);
  const inList = event.target === byId("list"), isRadio = event.target.matches("input[type=radio]");
  const actions = {
    j: () => move(1), k: () => move(-1), t: otherTheme, Escape: hideToken,
    ...(inList ? { ArrowDown: () => move(1), ArrowUp: () => move(-1) } : {}),
    ...(isRadio ? {} : { ArrowRight: () => step(1), ArrowLeft: () => step(-1) }),
    ...Object.fromEntries(colours.map((each, i) => [String(i + 1), () => chooseColour(each)])),
  };
  if (!actions[event.key]) return;
  event.preventDefault();
  actions[event.key]();
});

setTheme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
list();
chooseColour(colour);
