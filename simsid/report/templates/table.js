// Sorts and filters the table of images; the page is complete without it.
"use strict";
const table = document.getElementById("films");
const body = table.tBodies[0];
const heads = [...table.tHead.rows[0].cells];
const collator = new Intl.Collator("en", { numeric: true });
// Read once: columns 0, 4 and 5 hold the file, finding and label, which the filter searches; 1 holds a failure's reason.
const rows = [...body.rows].map((row) => {
  const text = [...row.cells].map((cell) => cell.textContent.trim());
  const search = text.length > 2 ? [text[0], text[4], text[5]] : text;
  return { row, text, search: search.join(" ").toLowerCase(), flagged: text[3] === "yes" };
});

function sort(column, descending) {
  const number = "number" in heads[column].dataset;
  const sign = descending ? -1 : 1;
  const key = ({ text }) => (number ? parseFloat(text[column]) : text[column]);
  const missing = (value) => !value && value !== 0; // undefined, "" or NaN
  const keyed = rows.map((entry) => [key(entry), entry.row]);
  // Missing values stay at the end in both directions.
  keyed.sort(([a], [b]) => missing(a) - missing(b) ||
    (missing(a) ? 0 : sign * (number ? a - b : collator.compare(a, b))));
  body.append(...keyed.map(([, row]) => row));
  heads.forEach((head, index) => {
    if (index === column) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
}

heads.forEach((head, column) => {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const before = head.getAttribute("aria-sort");
    sort(column, before ? before === "ascending" : "number" in head.dataset);
  });
});

const filter = document.getElementById("filter");
const flagged = document.getElementById("flagged");
const count = document.getElementById("count");

function apply() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const entry of rows) {
    const fits = (!flagged.checked || entry.flagged) && words.every((word) => entry.search.includes(word));
    entry.row.hidden = !fits;
    shown += fits;
  }
  count.textContent = `${shown} of ${rows.length} images`;
}

filter.addEventListener("input", apply);
flagged.addEventListener("change", apply);
document.querySelector(".controls").hidden = false;
apply(); // a browser may restore what was typed before a reload
