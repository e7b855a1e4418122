"use strict";
// Every text from the data goes through textContent: nothing in a title can become markup.
(() => {
  const data = JSON.parse(document.getElementById("payload").textContent);
  const EVIDENCE = [["agrees", "both"], ["items only", ""], ["histories only", ""], ["none", ""]];
  const PAGE = 50;
  const get = (id) => document.getElementById(id);

  function make(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name === "text") element.textContent = value;
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }
  function draw(tag, attributes, text) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== undefined) element.textContent = text;
    return element;
  }
  const whole = new Intl.NumberFormat("en");
  const percent = (value) => value === null ? "–" : value === 0 ? "0 %" : value < 0.001 ? (100 * value).toPrecision(2) + " %" : (100 * value).toFixed(1) + " %";
  const signed = (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + Math.abs(value).toPrecision(3);
  const bdi = (text) => make("bdi", { text });

  // --- light and dark
  const theme = get("theme"), root = document.documentElement;
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const named = () => { theme.textContent = dark() ? "Light" : "Dark"; theme.setAttribute("aria-label", dark() ? "Switch to light colours" : "Switch to dark colours"); };
  theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; named(); });
  theme.hidden = false;
  named();

  // --- the table of neurons
  const titles = ["neuron", "label", "evidence", "fires", ...data.columns.map((column) => column[1])];
  const text = (row) => {
    const detail = data.details[row[0]];
    if (!detail) return `${row[0]} ${row[1]}`.toLowerCase();
    const rows = [...detail[5][0], ...detail[7].flatMap((history) => history[1])];
    const common = detail[8].flat().map((note) => data.attributes[note[0]]);
    return [row[0], row[1], ...common, ...rows.map((id) => data.items[id] ? data.items[id][0] : "")].join(" ").toLowerCase();
  };
  const index = new Map(data.rows.map((row) => [row[0], row]));
  const haystack = new Map();  // filled at the first search
  const state = { by: 4 + Math.max(0, data.columns.findIndex((column) => column[0] === data.sort)), down: true, absolute: true, shown: PAGE, chosen: null };
  const table = get("neurons-table"), body = table.tBodies[0], search = get("search"), live = get("live"), more = get("more");

  function selected() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let rows = data.rows.filter((row) => row[3] >= Number(live.value));
    if (words.length) {
      rows = rows.filter((row) => {
        if (words.length === 1 && String(row[0]) === words[0]) return true;
        if (!haystack.has(row[0])) haystack.set(row[0], text(row));
        return words.every((word) => haystack.get(row[0]).includes(word));
      });
      const exact = (row) => (words.length === 1 && String(row[0]) === words[0] ? 0 : 1);
      return sorted(rows).sort((a, b) => exact(a) - exact(b));
    }
    return sorted(rows);
  }
  function sorted(rows) {
    const { by, down } = state, sign = down ? -1 : 1;
    const value = (row) => by > 3 ? Math.abs(row[by] ?? 0) : row[by];
    return rows.sort((a, b) => {
      if (by === 1) return sign * a[1].localeCompare(b[1]) || a[0] - b[0];
      return sign * (value(a) - value(b)) || a[0] - b[0];
    });
  }
  function head() {
    const cells = titles.map((title, place) => {
      const cell = make("th", { scope: "col" });
      if (place === 1) cell.className = "text";
      if (place === 2 || place === 3) cell.className = "wide";
      if (place > 4 && data.columns[place - 4][0] !== data.sort) cell.className = "wide";
      if (place === 4 && data.columns[0][0] !== data.sort) cell.className = "wide";
      if (place > 3) cell.title = data.columns[place - 4][2];
      if (place === state.by) cell.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      cell.append(make("button", { type: "button", text: title, onclick: () => sort(place) }));
      return cell;
    });
    table.tHead.replaceChildren(make("tr", {}, ...cells));
    return cells.map((cell) => cell.className);
  }
  function sort(place) {
    if (state.by === place) state.down = !state.down;
    else Object.assign(state, { by: place, down: place > 2 });
    state.shown = PAGE;
    show();
    table.tHead.rows[0].cells[place].querySelector("button").focus();
  }
  function show() {
    const classes = head(), rows = selected();
    body.replaceChildren(...rows.slice(0, state.shown).map((row) => {
      const [id, label, evidence, rate, ...values] = row;
      const line = make("tr", { "data-neuron": id, onclick: () => choose(id, true) },
        make("th", { scope: "row" }, make("a", { href: `#neuron-${id}`, text: id })),
        make("td", { class: "text" }, bdi(label)),
        make("td", { class: "wide" }, tag(evidence)),
        make("td", { class: "wide", text: percent(rate) }),
        ...values.map((value, place) => make("td", { class: classes[place + 4], text: value === null ? "–" : data.columns[place][0] === "auroc" ? value.toFixed(3) : signed(value) })));
      if (id === state.chosen) line.setAttribute("aria-current", "true");
      return line;
    }));
    more.hidden = rows.length <= state.shown;
    get("found").textContent = `${whole.format(rows.length)} of ${whole.format(data.rows.length)} neurons`;
  }
  const tag = (evidence) => make("span", { class: `tag ${EVIDENCE[evidence][1]}`, text: EVIDENCE[evidence][0] });

  // --- one neuron
  const marks = (group, count) => make("span", { class: "marks", title: `${data.popularity[group]}: ${whole.format(count)} interactions` },
    make("span", { "aria-hidden": "true" }, make("b", { text: "●".repeat(3 - group) }), "●".repeat(group)),
    make("span", { class: "visually-hidden", text: data.popularity[group] }));
  function itemLine(row, value) {
    const [title, count, group, attributes] = data.items[row];
    return make("li", {}, marks(group, count), make("span", {}, bdi(title), " ", make("span", { class: "note", text: attributes.map((a) => data.attributes[a]).join(", ") })), make("span", { class: "move", text: value === undefined ? "" : signed(value) }));
  }
  function chips(notes, of) {
    if (!notes.length) return make("p", { class: "note", text: `Nothing that these ${of} have in common beyond chance.` });
    return make("ul", { class: "chips" }, ...notes.map(([a, ratio, hits, drawn, q]) =>
      make("li", { title: `${hits} of ${drawn}, corrected p = ${q}` }, bdi(data.attributes[a]), ` ×${ratio} `, make("span", { class: "soft", text: `${hits} of ${drawn}` }))));
  }
  function histogram(detail, row) {
    const [, , [low, high], a, b] = detail;
    if (!a.length) return make("p", { class: "note", text: "The two groups of this contrast cannot be made again from its table, so there is no picture of them." });
    const width = 420, height = 150, floor = height - 24, most = Math.max(...a, ...b) || 1;
    const d = row[4 + data.columns.findIndex((column) => column[0] === "cohens_d")];
    const svg = draw("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Pre-activations of made-up users: ${data.groups[0]} and ${data.groups[1]} lie ${Math.abs(d).toFixed(2)} standard deviations apart` });
    const step = width / a.length;
    [["hist-b", b], ["hist-a", a]].forEach(([name, counts]) => counts.forEach((count, bin) => {
      const tall = (floor - 6) * count / most;
      svg.append(draw("rect", { class: name, x: bin * step + 0.5, y: floor - tall, width: step - 1, height: tall }));
    }));
    svg.append(draw("line", { class: "grid-line", x1: 0, x2: width, y1: floor, y2: floor }));
    const zero = -low / (high - low) * width;
    const ends = [[2, low, "start"], [width - 2, high, "end"]];
    if (zero > 50 && zero < width - 50) ends.push([zero, 0, "middle"]);
    ends.forEach(([x, value, anchor]) => svg.append(draw("text", { x, y: height - 7, "text-anchor": anchor }, value ? signed(value) : "0")));
    return make("div", {}, svg, make("ul", { class: "legend" }, make("li", {}, make("i", { class: "a", "aria-hidden": "true" }), bdi(data.groups[0])), make("li", {}, make("i", { class: "b", "aria-hidden": "true" }), bdi(data.groups[1])), make("li", { text: `Cohen's d ${signed(d)}` })));
  }
  function choose(id, jump) {
    const row = index.get(id);
    if (!row) return;
    state.chosen = id;
    body.querySelectorAll("tr").forEach((line) => {
      if (Number(line.dataset.neuron) === id) line.setAttribute("aria-current", "true");
      else line.removeAttribute("aria-current");
    });
    const detail = data.details[id], panel = get("detail");
    const parts = [
      make("h3", {}, `Neuron ${id}: `, bdi(row[1])),
      make("p", { class: "note" }, tag(row[2]), ` Fires after ${percent(row[3])} of real histories.`),
    ];
    if (!detail) {
      parts.push(make("p", { text: "To keep this file small, details of the weakest neurons are left out; `steerrec neuron` shows them." }));
    } else {
      const [mean, rates, , , , raises, lowers, histories, common, similar] = detail;
      parts[1].append(row[3] > 0 ? ` Where it does, it is ${mean} on average.` : "", rates[0] === null ? "" : ` Of the made-up users, ${percent(rates[0])} of the ${data.groups[0]} and ${percent(rates[1])} of the ${data.groups[1]} ones fire it.`);
      parts.push(make("h4", { text: "How active it is in the two groups" }), histogram(detail, row));
      if (raises[0].length) {
        parts.push(
          make("h4", { text: "Raises most" }), make("p", { class: "note", text: "What it adds to scores where it fires as it usually does." }),
          chips(common[0], "items"), make("ul", { class: "items" }, ...raises[0].map((item, place) => itemLine(item, raises[1][place]))),
          make("h4", { text: "Lowers most" }), make("ul", { class: "items" }, ...lowers[0].map((item, place) => itemLine(item, lowers[1][place]))));
      }
      parts.push(make("h4", { text: "Histories that fire it most" }));
      if (histories.length) {
        parts.push(chips(common[1], "histories"), make("ul", { class: "items" }, ...histories.map(([activation, rows]) => {
          const names = make("span", {});
          rows.forEach((item, place) => names.append(place ? " → " : "", place === rows.length - 1 ? make("strong", {}, bdi(data.items[item][0])) : bdi(data.items[item][0])));
          return make("li", {}, make("span", { class: "move", text: activation.toPrecision(3) }), names, "");
        })));
      } else parts.push(make("p", { class: "note", text: "None of the histories here fires it." }));
      parts.push(make("h4", { text: "Neurons most like it" }), make("ul", { class: "items" }, ...similar[0].map((other, place) =>
        make("li", {}, make("a", { href: `#neuron-${other}`, text: other }), bdi(index.get(other)[1]), make("span", { class: "move", text: similar[1][place].toFixed(2) })))));
    }
    panel.replaceChildren(...parts);
    panel.scrollTop = 0;
    if (jump) {
      if (location.hash !== `#neuron-${id}`) history.replaceState(null, "", `#neuron-${id}`);
      panel.focus({ preventScroll: true });
      const box = panel.getBoundingClientRect();
      if (box.top < 50 || box.top > innerHeight * 0.7) panel.scrollIntoView();
    }
  }
  const fromHash = (jump) => {
    const found = /^#neuron-(\d+)$/.exec(location.hash);
    if (found) choose(Number(found[1]), jump);
    return Boolean(found);
  };
  addEventListener("hashchange", () => fromHash(true));
  addEventListener("click", (event) => {  // the same neuron again changes no hash
    const link = event.target.closest ? event.target.closest('a[href^="#neuron-"]') : null;
    if (link && link.getAttribute("href") === location.hash) fromHash(true);
  });
  let waiting;
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => { state.shown = PAGE; show(); }, 120); });
  live.addEventListener("change", () => { state.shown = PAGE; show(); });
  more.addEventListener("click", () => {
    const first = state.shown;
    state.shown += PAGE;
    show();
    if (body.rows[first]) body.rows[first].querySelector("a").focus();
  });
  get("tools").hidden = false;
  show();
  if (!fromHash(true) && body.rows[0]) choose(Number(body.rows[0].dataset.neuron), false);

  // --- on paper every user is there
  let closed = [];
  addEventListener("beforeprint", () => { closed = [...document.querySelectorAll("details:not([open])")]; closed.forEach((each) => { each.open = true; }); });
  addEventListener("afterprint", () => closed.forEach((each) => { each.open = false; }));
})();
