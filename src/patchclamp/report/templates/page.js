// What the page gains with scripts: a theme, long tables that page, sort and filter,
// drawings that show paths, commands that copy. Without this file all content is on the page already.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("document-data").textContent);
  const PAGE = 50;
  const MAX_INDENT = 12;
  const MINUS = "\u2212";

  // --- text: the same rules as text.py -------------------------------------
  const HIDDEN = new RegExp(
    "[\\u{0}-\\u{1f}\\u{7f}-\\u{9f}\\u{ad}\\u{61c}\\u{180e}\\u{200b}\\u{200e}\\u{200f}" +
      "\\u{2028}-\\u{202e}\\u{2060}-\\u{206f}\\u{d800}-\\u{dfff}\\u{feff}\\u{fff9}-\\u{fffb}" +
      "\\u{fffe}\\u{ffff}\\u{e0000}-\\u{e007f}]", "gu");

  const visible = (text) => text.replace(HIDDEN, (character) =>
    "\u27e8U+" + character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "\u27e9");

  const stripped = (digits) => digits.includes(".") ? digits.replace(/\.?0+$/, "") : digits;
  const grouped = (digits) => {
    const [whole, part] = digits.split(".");
    const spaced = whole.replace(/\B(?=(\d{3})+$)/g, ",");
    return part === undefined ? spaced : spaced + "." + part;
  };

  const number = (value) => {
    if (value === 0) return "0";
    const size = Math.abs(value);
    const sign = value < 0 ? MINUS : "";
    if (Number.isSafeInteger(size)) return sign + grouped(String(size));
    const exponent = Number(size.toExponential().split("e")[1]);
    if (exponent >= -4 && exponent < 6) {
      return sign + stripped(grouped(size.toFixed(Math.max(0, 3 - exponent))));
    }
    const [mantissa, power] = size.toExponential(2).split("e");
    return sign + stripped(mantissa) + "e" + power.replace("-", MINUS);
  };

  const share = (value) => {
    const percent = Math.min(Math.max(value, 0), 1) * 100;
    if (percent > 0 && percent < 0.1) return "<0.1%";
    if (percent > 99.9 && percent < 100) return ">99.9%";
    return stripped(percent.toFixed(1)) + "%";
  };

  // --- elements --------------------------------------------------------------
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };

  const drawing = (from, to, low, high) => {
    const space = document.querySelector("svg").namespaceURI;
    const svg = document.createElementNS(space, "svg");
    const rect = document.createElementNS(space, "rect");
    const place = (x) => 100 * ((x / 2 - low / 2) / (high / 2 - low / 2));
    const set = (element, values) => {
      for (const [name, value] of Object.entries(values)) element.setAttribute(name, value);
    };
    set(svg, { class: "cell-bar", width: "100%", height: "10", "aria-hidden": "true" });
    set(rect, {
      class: from < 0 ? "bar below" : "bar", x: place(from).toFixed(2) + "%", y: "0",
      width: (place(to) - place(from)).toFixed(2) + "%", height: "10",
    });
    svg.append(rect);
    return svg;
  };

  // --- tables ----------------------------------------------------------------
  const cell = (head, value, depth) => {
    const td = make("td", { class: "c-" + head.role + (depth ? " in-" + Math.min(depth, MAX_INDENT) : "") });
    if (value === null) td.append(make("span", { class: "none" }, "\u2013"));
    else if (typeof value === "boolean") {
      td.append(make("span", { class: value ? "yes" : "no" },
        make("i", { "aria-hidden": "true" }, value ? "\u25cf" : "\u25cb"), value ? " yes" : " no"));
    } else if (typeof value === "string") td.append(visible(value));
    else if (head.role === "share") {
      td.append(drawing(0, Math.min(Math.max(value, 0), 1), 0, 1), share(value));
    } else {
      if (head.role === "bar") td.append(drawing(Math.min(0, value), Math.max(0, value), head.low, head.high));
      td.append(number(value));
    }
    return td;
  };

  const compare = (a, b) => {
    if (typeof a === "string" || typeof b === "string") {
      return String(a).localeCompare(String(b), "en", { numeric: true });
    }
    return Number(a) - Number(b);
  };

  class PagedTable {
    constructor(block) {
      this.block = block;
      this.table = data.sections[block.dataset.section].blocks[block.dataset.block];
      this.body = block.querySelector("tbody");
      this.heads = Array.from(block.querySelectorAll("th"), (th) => {
        const index = Number(th.dataset.column);
        return { th, index, role: this.table.columns[index].role,
          low: Number(th.dataset.low), high: Number(th.dataset.high) };
      });
      this.order = null; // {index, down}: the column sorted by
      this.words = "";
      this.page = 0;
      this.status = make("span", { class: "status", role: "status" });
      if (this.table.rows.length > 8) this.addControls();
      if (this.table.rows.length > 1) this.heads.forEach((head) => this.addSort(head));
      if (this.table.rows.length > PAGE) this.draw();
    }

    addControls() {
      const filter = make("input", { type: "search", placeholder: "Filter rows",
        "aria-label": "Filter the rows of " + visible(this.table.title) });
      filter.addEventListener("input", () => {
        this.words = filter.value.toLowerCase();
        this.page = 0;
        this.draw();
      });
      this.back = make("button", { type: "button", "aria-label": "Previous rows" }, "\u2190");
      this.next = make("button", { type: "button", "aria-label": "Next rows" }, "\u2192");
      this.back.addEventListener("click", () => this.turn(-1));
      this.next.addEventListener("click", () => this.turn(1));
      this.block.prepend(make("div", { class: "controls" }, filter,
        make("div", { class: "pager" }, this.status, this.back, this.next)));
      this.tell(this.table.rows.length);
    }

    addSort(head) {
      const button = make("button", { type: "button", class: "sort" }, ...head.th.childNodes);
      head.th.append(button);
      button.addEventListener("click", () => {
        // Numbers are asked for largest first; a third press gives the first order back.
        const firstDown = !["text", "address"].includes(head.role);
        if (!this.order || this.order.index !== head.index) {
          this.order = { index: head.index, down: firstDown };
        } else if (this.order.down === firstDown) this.order = { index: head.index, down: !firstDown };
        else this.order = null;
        for (const other of this.heads) {
          if (this.order && other.index === this.order.index) {
            other.th.setAttribute("aria-sort", this.order.down ? "descending" : "ascending");
          } else other.th.removeAttribute("aria-sort");
        }
        this.page = 0;
        this.draw();
      });
    }

    turn(step) {
      this.page += step;
      this.draw();
      this.block.querySelector(".scroll").scrollTop = 0;
    }

    chosen() {
      let rows = this.table.rows;
      if (this.words) {
        rows = rows.filter((row) => this.heads.some(({ index }) =>
          row[index] !== null && visible(String(row[index])).toLowerCase().includes(this.words)));
      }
      if (this.order) {
        const { index, down } = this.order;
        const missing = (row) => row[index] === null;
        rows = rows.slice().sort((a, b) => {
          if (missing(a) || missing(b)) return missing(a) - missing(b); // always last
          return down ? compare(b[index], a[index]) : compare(a[index], b[index]);
        });
      }
      return rows;
    }

    draw() {
      const rows = this.chosen();
      const flat = this.order !== null || this.words !== ""; // a tree out of order has no depth
      const from = this.page * PAGE;
      this.body.replaceChildren(...rows.slice(from, from + PAGE).map((row) => {
        const cells = this.heads.map((head) => {
          const before = this.table.columns[head.index - 1];
          const depth = !flat && before && before.role === "depth" ? row[head.index - 1] : 0;
          return cell(head, row[head.index], depth);
        });
        return make("tr", {}, ...cells);
      }));
      if (!rows.length) {
        this.body.append(make("tr", {}, make("td", { class: "nothing", colspan: this.heads.length }, "No rows match.")));
      }
      this.tell(rows.length);
    }

    tell(num) {
      const from = this.page * PAGE;
      const to = Math.min(from + PAGE, num);
      const all = this.table.rows.length;
      this.status.textContent = (num ? grouped(String(from + 1)) + "\u2013" + grouped(String(to)) + " of " : "") +
        grouped(String(num)) + " rows" + (num < all ? ", " + grouped(String(all)) + " in all" : "");
      if (this.back) {
        this.back.hidden = this.next.hidden = num <= PAGE;
        this.back.disabled = this.page === 0;
        this.next.disabled = to >= num;
      }
    }
  }

  document.querySelectorAll(".table-block").forEach((block) => new PagedTable(block));

  // --- drawings ------------------------------------------------------------------
  // Pointing at a node, or walking to it with the arrow keys, shows the ways that lead
  // to it and from it; circuits can be thinned to their strongest edges.
  class Drawing {
    constructor(block) {
      this.svg = block.querySelector(".drawing");
      this.nodes = [];
      for (const node of block.querySelectorAll("[data-node]")) this.nodes[node.dataset.node] = node;
      this.edges = Array.from(block.querySelectorAll(".edge"), (element) => ({
        element, from: Number(element.dataset.from), to: Number(element.dataset.to),
        score: "score" in element.dataset ? Number(element.dataset.score) : null,
      }));
      this.scored = this.edges.filter((edge) => edge.score !== null)
        .sort((a, b) => Math.abs(b.score) - Math.abs(a.score));
      this.words = make("p", { class: "readout", role: "status" });
      this.rest();
      block.append(this.words);
      if (this.scored.length > 1) this.addThinning(block);
      const box = this.svg.parentElement;
      box.scrollLeft = (box.scrollWidth - box.clientWidth) / 2;
      this.nodes.forEach((node, i) => {
        node.setAttribute("tabindex", i ? "-1" : "0");
        this.listen(node, () => this.follow(node, [i], [i]));
      });
      this.edges.forEach((edge) => {
        const reach = edge.element.querySelector("path").cloneNode(); // a thin line is hard to hit
        reach.setAttribute("class", "reach");
        edge.element.prepend(reach);
        this.listen(edge.element, () => this.follow(edge.element, [edge.from], [edge.to], edge));
      });
      this.svg.addEventListener("keydown", (event) => this.walk(event));
      this.nodes.forEach((node, i) => node.addEventListener("focus", () => {
        this.nodes.forEach((other, j) => other.setAttribute("tabindex", i === j ? "0" : "-1"));
      }));
    }

    listen(element, show) {
      for (const name of ["pointerenter", "focus", "click"]) element.addEventListener(name, show);
      for (const name of ["pointerleave", "blur"]) element.addEventListener(name, () => this.rest());
    }

    addThinning(block) {
      const num = String(this.scored.length);
      this.slider = make("input", { type: "range", min: "1", max: num, value: num });
      this.told = make("output", { class: "status" });
      this.slider.addEventListener("input", () => this.thin());
      block.prepend(make("div", { class: "controls" },
        make("label", {}, "Strongest edges ", this.slider), this.told));
      this.thin();
    }

    thin() {
      const num = Number(this.slider.value);
      this.scored.forEach((edge, i) => edge.element.classList.toggle("gone", i >= num));
      const told = grouped(String(num)) + " of " + grouped(String(this.scored.length)) +
        " edges, each " + number(Math.abs(this.scored[num - 1].score)) + " or more in size";
      this.told.textContent = told;
      this.slider.setAttribute("aria-valuetext", told);
      this.rest();
    }

    shown() {
      return this.edges.filter((edge) => !edge.element.classList.contains("gone"));
    }

    // All that `back` reads and all that reads `ahead`, by every way that is shown.
    follow(element, back, ahead, through) {
      const kept = new Set(through ? [through] : []);
      const walk = (start, end, next) => {
        const seen = new Set(start);
        const stack = start.slice();
        while (stack.length) {
          const at = stack.pop();
          for (const edge of this.shown()) {
            if (edge[end] !== at) continue;
            kept.add(edge);
            if (!seen.has(edge[next])) { seen.add(edge[next]); stack.push(edge[next]); }
          }
        }
        return seen;
      };
      const nodes = new Set([...walk(back, "to", "from"), ...walk(ahead, "from", "to")]);
      this.nodes.forEach((node, i) => node.classList.toggle("off", !nodes.has(i)));
      this.edges.forEach((edge) => edge.element.classList.toggle("off", !kept.has(edge)));
      this.words.textContent = element.querySelector("title").textContent;
    }

    // Nothing is pointed at: only nodes whose edges are all hidden step back.
    rest() {
      const focused = this.nodes.indexOf(document.activeElement);
      if (focused >= 0) return this.follow(this.nodes[focused], [focused], [focused]);
      const touched = new Set(this.shown().flatMap((edge) => [edge.from, edge.to]));
      this.nodes.forEach((node, i) => node.classList.toggle("off", !touched.has(i)));
      this.edges.forEach((edge) => edge.element.classList.remove("off"));
      this.words.textContent = "Point at a node or an edge, or walk with the arrow keys, to follow its paths.";
    }

    walk(event) {
      const at = this.nodes.indexOf(document.activeElement);
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [1, 0], ArrowDown: [-1, 0] }[event.key];
      if (at < 0 || !step) return;
      event.preventDefault();
      const middle = (node) => { const box = node.getBBox(); return box.x + box.width / 2; };
      const here = this.nodes[at];
      const row = Number(here.dataset.row);
      const ahead = this.nodes.filter((node) => Number(node.dataset.row) === row + step[0] &&
        (step[0] || Math.sign(middle(node) - middle(here)) === step[1]));
      ahead.sort((a, b) => Math.abs(middle(a) - middle(here)) - Math.abs(middle(b) - middle(here)));
      if (ahead.length) ahead[0].focus();
    }
  }

  document.querySelectorAll(".drawing-block").forEach((block) => new Drawing(block));

  // --- theme -------------------------------------------------------------------
  const theme = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const nameTheme = () => { theme.textContent = isDark() ? "Light page" : "Dark page"; };
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  system.addEventListener("change", nameTheme);
  theme.hidden = false;
  nameTheme();

  // --- data and commands ---------------------------------------------------------
  const save = document.getElementById("save-data");
  save.addEventListener("click", () => {
    const file = new Blob([JSON.stringify(data, null, 1)], { type: "application/json" });
    const link = make("a", { href: URL.createObjectURL(file), download: "findings.json" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
  save.hidden = false;

  if (navigator.clipboard) {
    document.querySelectorAll(".command").forEach((command) => {
      const button = make("button", { type: "button", class: "copy" }, "Copy");
      button.addEventListener("click", async () => {
        try {
          await navigator.clipboard.writeText(command.querySelector("code").textContent);
          button.textContent = "Copied";
        } catch {
          button.textContent = "Select it by hand";
        }
      });
      command.append(button);
    });
  }

  // A link to a finding opens what it is folded into. Paper shows all
  // but the records and the numbers behind charts, which are in the data.
  const unfold = () => {
    const target = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
    for (let e = target; e; e = e.parentElement) if (e.tagName === "DETAILS") e.open = true;
  };
  addEventListener("hashchange", unfold);
  unfold();
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = Array.from(document.querySelectorAll("details:not([open], .record, .numbers)"));
    opened.forEach((details) => { details.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((details) => { details.open = false; }));
})();
