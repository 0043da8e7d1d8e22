"use strict";
(() => {
  const table = document.getElementById("table");
  if (!table) return;
  const SHOWN = 500; // rows at first: a browser lays out no more at once without a pause
  const data = JSON.parse(document.getElementById("data").textContent);
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows];
  const places = new Map(rows.map((row, at) => [row, at]));
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const words = document.getElementById("words");
  const count = document.getElementById("count");
  const all = document.getElementById("all");
  let order = rows;
  let sorted = { column: -1, sign: 1 };
  let isWhole = rows.length <= SHOWN;

  const behind = (column, at) => (column.at ? column.kinds[column.at[at]] : column.kinds[at]);

  // What a cell is sorted by: the number behind it, or its text.
  const key = (row, column) => {
    const at = column - data.first;
    if (at >= 0) return behind(data.values[at], places.get(row));
    const text = row.cells[column].textContent;
    return text !== "" && !Number.isNaN(Number(text)) ? Number(text) : text;
  };

  const isNone = (value) => value === null || value === "–";

  // Numbers by size, words by the alphabet; what has no number comes last either way.
  const compare = (a, b, sign) => {
    if (isNone(a) || isNone(b)) return Number(isNone(a)) - Number(isNone(b));
    const both = typeof a === "number" && typeof b === "number";
    return sign * (both ? a - b : String(a).localeCompare(String(b), "en", { numeric: true }));
  };

  const matching = () => {
    const asked = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    return order.filter((row) => {
      const text = texts[places.get(row)];
      return asked.every((word) => text.includes(word));
    });
  };

  const show = () => {
    const found = matching();
    const shown = isWhole ? found : found.slice(0, SHOWN);
    body.replaceChildren(...shown);
    const cut = shown.length < found.length ? ", the first " + shown.length + " shown" : "";
    count.textContent = found.length + " of " + rows.length + " matrices" + cut;
    all.hidden = isWhole || cut === "";
  };

  const sort = (column) => {
    sorted = { column, sign: sorted.column === column ? -sorted.sign : 1 };
    const keys = new Map(rows.map((row) => [row, key(row, column)]));
    order = [...rows].sort((a, b) => compare(keys.get(a), keys.get(b), sorted.sign));
    heads.forEach((head, at) => {
      if (at === column) head.ariaSort = sorted.sign > 0 ? "ascending" : "descending";
      else head.removeAttribute("aria-sort");
    });
    show();
  };

  const quoted = (value) => {
    const text = value === null ? "" : String(value);
    const safe = /^[=+@-]/.test(text) && Number.isNaN(Number(text)) ? "'" + text : text;
    return /[",\n]/.test(safe) ? '"' + safe.replaceAll('"', '""') + '"' : safe;
  };

  // The rows that match: names as shown, numbers with six digits beside their nulls.
  const csv = () => {
    const names = heads.slice(0, data.first).map((head) => head.textContent);
    const ids = data.ids.flatMap((id) => [id, "nulls." + id]);
    const lines = matching().map((row) => {
      const at = places.get(row);
      const own = [...row.cells].slice(0, data.first).map((cell) => cell.textContent);
      const numbers = data.ids.flatMap((_, column) => [
        behind(data.values[column], at),
        behind(data.nulls[column], at),
      ]);
      return [...own, ...numbers];
    });
    return [[...names, ...ids], ...lines].map((line) => line.map(quoted).join(",")).join("\n");
  };

  const copy = async () => {
    const text = csv() + "\n";
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    count.textContent = "copied " + matching().length + " rows";
  };

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.addEventListener("click", () => sort(column));
    head.replaceChildren(button);
  });
  words.addEventListener("input", show);
  all.addEventListener("click", () => {
    isWhole = true;
    show();
  });
  document.getElementById("copy").addEventListener("click", copy);
  const form = document.getElementById("filter");
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  show();
  window.addEventListener("beforeprint", () => {
    for (const each of document.querySelectorAll("details")) each.open = true;
  });
})();
