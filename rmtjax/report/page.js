"use strict";
// Without this the page is a table; here it learns to be sorted, filtered and opened.
// Texts of kernels are moved and set as text, never as markup.
(() => {
  const [dataNode, nameBox, verdictBox, columnsBox, found] = [
    "data", "name", "verdict", "columns", "found",
  ].map((id) => document.getElementById(id));
  const data = JSON.parse(dataNode.textContent);
  const body = document.querySelector("tbody");
  const heads = [...document.querySelectorAll("thead th")];
  const compare = new Intl.Collator("en", { numeric: true }).compare;
  const short = (value) => (value === null ? "-" : String(Number(value.toPrecision(4))));
  const count = (value) => value.toLocaleString("en");

  // A node of HTML, or of SVG.
  const make = (tag, attributes = {}, ...children) => {
    const drawn = ["svg", "path", "line", "text"].includes(tag);
    const space = drawn ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
    const node = document.createElementNS(space, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };

  // What is in a cell becomes a button.
  const makeButton = (cell) => {
    const button = make("button", { type: "button" }, ...cell.childNodes);
    cell.append(button);
    return button;
  };

  // Multiples of 1, 2 or 5 times a power of ten, at most about so many.
  const ticks = (stop, most) => {
    const power = 10 ** Math.floor(Math.log10(stop / most));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power * most >= stop);
    return Array.from({ length: Math.floor(stop / step) + 1 }, (_, i) => i * step);
  };

  const draw = (spectrum, width, label) => {
    const { counts, size, stop, law, largest } = spectrum;
    const [height, left, right, top, floor] = [250, 48, width - 12, 24, 208];
    const density = counts.map((number) => (number * counts.length) / (size * stop));
    const highest = 1.05 * Math.max(...density, law ? law.peak : 0) || 1;
    const x = (value) => (left + ((right - left) * value) / stop).toFixed(1);
    const y = (value) => (floor - ((floor - top) * value) / highest).toFixed(1);

    const box = { viewBox: `0 0 ${width} ${height}`, width, height };
    const svg = make("svg", { ...box, role: "img", "aria-labelledby": label });
    const path = (name, d) => svg.append(make("path", { class: name, d }));
    const line = (name, value, from) => {
      svg.append(make("line", { class: name, x1: x(value), x2: x(value), y1: from, y2: floor }));
    };
    const text = (words, x, y, anchor = "middle") => {
      svg.append(make("text", { x, y, "text-anchor": anchor }, words));
    };

    const border = (i) => x((i * stop) / counts.length);
    const bar = (value, i) => `M${border(i)} ${floor}V${y(value)}H${border(i + 1)}V${floor}Z`;
    path("bars", density.map(bar).join(""));
    if (law) {
      const { lower, upper, peak, heights } = law;
      const last = heights.length - 1;
      // The points crowd at both ends, as they were chosen.
      const along = (i) => lower + (upper - lower) * Math.sin((Math.PI * i) / (2 * last)) ** 2;
      const points = heights.map((height, i) => `${x(along(i))} ${y((peak * height) / 1000)}`);
      path("law", `M${points.join("L")}`);
      // A narrow picture has no room on the right: both names then move to the left.
      const over = Math.max(0, Number(x(Math.sqrt(spectrum.threshold))) + 66 - width);
      for (const [name, anchor, shift] of [["edge", "end", -4], ["threshold", "start", 4]]) {
        const value = Math.sqrt(spectrum[name]);
        line(name, value, top);
        text(name, Number(x(value)) + shift - over, top - 8, anchor);
      }
    }
    for (const spike of largest) if (spike <= stop) line("spikes", spike, floor - 14);
    path("axis", `M${left} ${top}V${floor}H${right}`);
    for (const value of ticks(stop, width / 90)) text(short(value), x(value), floor + 16);
    for (const value of ticks(highest, 4)) text(short(value), left - 6, Number(y(value)) + 4, "end");
    text("√λ = s / √n", (left + right) / 2, height - 6);
    text("density", 4, 12, "start");
    return svg;
  };

  // What the picture shows, in words.
  const tell = (spectrum) => {
    const { size, spikes, beyond, largest, zeros, law, distance, place, matrices } = spectrum;
    const which = matrices > 1 ? `Matrix ${place} of ${matrices}, that with most spikes: ` : "";
    const words = [`${which}${count(size)} eigenvalues.`];
    if (law) {
      words.push("The line is the law of Marchenko and Pastur");
      words.push(`(distance ${short(distance)}).`);
      words.push(`${spikes ? count(spikes) : "None"} above the threshold.`);
    }
    if (spikes) {
      const first = largest.slice(0, 5).map(short).join(", ") + (spikes > 5 ? ", …" : "");
      const hidden = beyond ? `; ${beyond} beyond the right end` : "";
      words.push(`√λ of the largest: ${first}${hidden}.`);
    }
    if (beyond < largest.length) {
      const marked = largest.length < spikes ? `the ${largest.length} largest` : "them";
      words.push(`Ticks at the foot mark ${marked}.`);
    }
    if (zeros) words.push(`${count(zeros)} zeros are not drawn.`);
    return words.join(" ");
  };

  const makeDetail = (index) => {
    const spectrum = data.spectra[index];
    const cell = make("td", { role: "cell", "aria-colspan": heads.length });
    if (spectrum) {
      const label = `words-${index}`;
      // Ends of the bulk as eigenvalues, as in the rows, and as the axis of the picture has them.
      const both = (value) => `λ ${short(value)}, √λ ${value > 0 ? short(Math.sqrt(value)) : "-"}`;
      const numbers = ["ratio", "variance", "edge", "threshold"].map((name) => {
        const form = name === "edge" || name === "threshold" ? both : short;
        return make("div", {}, make("dt", {}, name), make("dd", {}, form(spectrum[name])));
      });
      const words = make("p", { id: label }, tell(spectrum));
      const caption = make("figcaption", {}, words, make("dl", { class: "numbers" }, ...numbers));
      const width = Math.max(260, Math.min(640, body.clientWidth - 40));
      cell.append(make("figure", {}, draw(spectrum, width, label), caption));
    } else {
      cell.append(make("p", {}, "There is no spectrum to draw."));
    }
    return make("tr", { role: "row", class: "detail", id: `detail-${index}` }, cell);
  };

  // A table that is laid out as a grid is no table to some screen readers, unless they are told.
  const roles = {
    table: "table", "thead, tbody": "rowgroup", tr: "row", td: "cell",
    "thead th": "columnheader", "tbody th": "rowheader",
  };
  for (const [place, role] of Object.entries(roles)) {
    for (const node of document.querySelectorAll(place)) node.setAttribute("role", role);
  }

  const kernels = [...body.rows].map((row, index) => {
    row.className = "opens";
    const opener = makeButton(row.cells[0]);
    opener.setAttribute("aria-expanded", "false");
    const name = opener.textContent.toLowerCase();
    return { row, index, opener, name, verdict: row.cells[1].firstChild.className, detail: null };
  });
  const byRow = new Map(kernels.map((kernel) => [kernel.row, kernel]));

  const open = (kernel) => {
    kernel.detail = makeDetail(kernel.index);
    kernel.row.after(kernel.detail);
    kernel.opener.setAttribute("aria-controls", kernel.detail.id);
  };

  const close = (kernel) => {
    kernel.detail.remove();
    kernel.detail = null;
    kernel.opener.removeAttribute("aria-controls");
  };

  const toggle = (kernel) => {
    (kernel.detail ? close : open)(kernel);
    kernel.opener.setAttribute("aria-expanded", String(kernel.detail !== null));
  };

  // In the order of the tree, or of a column; what has no number is last in either direction.
  const sort = (chosen) => {
    const head = heads.find((one) => one.hasAttribute("aria-sort"));
    if (!head) return chosen;
    const sign = head.getAttribute("aria-sort") === "ascending" ? 1 : -1;
    const column = data.numbers[head.dataset.key];
    const order = column ? (a, b) => a - b : compare;
    const value = ({ index, row }) => {
      return column ? column[index] : row.cells[heads.indexOf(head)].textContent;
    };
    const keyed = chosen.map((kernel) => [value(kernel), kernel]);
    keyed.sort(([a], [b]) => (a === null) - (b === null) || sign * order(a, b));
    return keyed.map(([, kernel]) => kernel);
  };

  const arrange = () => {
    const words = nameBox.value.trim().toLowerCase();
    const chosen = kernels.filter(
      ({ name, verdict }) => name.includes(words) && [verdict, ""].includes(verdictBox.value),
    );
    const rows = document.createDocumentFragment();
    for (const { row, detail } of sort(chosen)) rows.append(row, ...(detail ? [detail] : []));
    body.replaceChildren(rows);
    found.textContent = `${count(chosen.length)} of ${count(kernels.length)} rows`;
  };

  // First up, then down, then as it was.
  const nextOrder = { null: "ascending", ascending: "descending", descending: null };
  for (const head of heads) {
    makeButton(head).addEventListener("click", () => {
      const next = nextOrder[head.getAttribute("aria-sort")];
      for (const other of heads) other.removeAttribute("aria-sort");
      if (next) head.setAttribute("aria-sort", next);
      arrange();
    });
  }
  body.addEventListener("click", ({ target }) => {
    const kernel = byRow.get(target.closest("tr"));
    // Whoever selects a text of the row wants it to stay.
    const selects = !target.closest("button") && !getSelection().isCollapsed;
    if (kernel && !selects) toggle(kernel);
  });
  nameBox.addEventListener("input", arrange);
  verdictBox.addEventListener("change", arrange);
  columnsBox.addEventListener("change", () => {
    document.querySelector("table").dataset.columns = columnsBox.value;
    // No order by a column that one does not see.
    for (const head of heads) if (!head.offsetParent) head.removeAttribute("aria-sort");
    arrange();
  });
  document.querySelector(".controls").hidden = false;
  arrange();
  if (data.open !== null) toggle(kernels[data.open]);
})();
