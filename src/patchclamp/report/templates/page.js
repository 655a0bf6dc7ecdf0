// What the page gains with scripts: a theme, long tables that page, sort and filter,
// commands that copy. Without this file all content is on the page already.
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
