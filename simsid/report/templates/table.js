// Sorts and filters the table of images; the page is complete without it.
"use strict";
const table = document.getElementById("films");
const body = table.tBodies[0];
const heads = [...table.tHead.rows[0].cells];
const [filter, flagged, count, more] = ["filter", "flagged", "count", "more"].map((id) => document.getElementById(id));
const collator = new Intl.Collator("en", { numeric: true });
// Laying out thousands of rows takes a second, so only the first ones that fit are shown until the reader wants all.
let limit = 500;

// Read once: columns 0, 4 and 5 hold the file, finding and label, which the filter searches; 1 holds a failure's reason.
const rows = [...body.rows].map((row) => {
  const text = [...row.cells].map((cell) => cell.textContent.trim());
  const search = text.length > 2 ? [text[0], text[4], text[5]] : text;
  return { row, text, search: search.join(" ").toLowerCase(), flagged: text[3] === "yes" };
});

function show() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let fitting = 0;
  for (const entry of rows) {
    const fits = (!flagged.checked || entry.flagged) && words.every((word) => entry.search.includes(word));
    fitting += fits;
    entry.row.hidden = !fits || fitting > limit;
  }
  count.textContent = `${fitting} of ${rows.length} images` + (fitting > limit ? `, the first ${limit} shown` : "");
  more.hidden = fitting <= limit;
}

function sort(column, descending) {
  const number = "number" in heads[column].dataset;
  const sign = descending ? -1 : 1;
  const missing = (value) => !value && value !== 0; // undefined, "" or NaN
  for (const entry of rows) entry.key = number ? parseFloat(entry.text[column]) : entry.text[column];
  // Missing values stay at the end in both directions.
  rows.sort(({ key: a }, { key: b }) => missing(a) - missing(b) ||
    (missing(a) ? 0 : sign * (number ? a - b : collator.compare(a, b))));
  body.append(...rows.map((entry) => entry.row));
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
  show();
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
filter.addEventListener("input", show);
flagged.addEventListener("change", show);
more.addEventListener("click", () => {
  limit = Infinity;
  show();
});
document.querySelector(".controls").hidden = false;
show(); // also applies what a browser restores in the fields after a reload
