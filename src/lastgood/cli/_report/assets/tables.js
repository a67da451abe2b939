// Tables that are there already: a button in each column's head sorts, long ones are cut until asked for.

const ROWS_AT_FIRST = 25;

function setUpTable(table) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((head, column) => {
    if (!head.textContent) return;
    const button = make("button", { type: "button" }, head.textContent);
    button.addEventListener("click", () => sortBy(table, head, column));
    head.replaceChildren(button);
  });
  if (body.rows.length <= ROWS_AT_FIRST + 5) return;
  const button = make("button", { type: "button", class: "all-rows" }, `Show all ${body.rows.length} rows`);
  button.addEventListener("click", () => {
    table.dataset.all = "yes";
    cut(table);
    button.remove();
  });
  table.parentElement.after(button);
  cut(table);
}

function cut(table) {
  [...table.tBodies[0].rows].forEach((row, place) => {
    row.classList.toggle("beyond", !table.dataset.all && place >= ROWS_AT_FIRST);
  });
}

function sortBy(table, head, column) {
  const isNumber = head.classList.contains("number");
  const before = head.getAttribute("aria-sort");
  const order = before === null ? (isNumber ? "descending" : "ascending")
    : before === "ascending" ? "descending" : "ascending";
  table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const keyed = [...table.tBodies[0].rows].map((row) => {
    const cell = row.cells[column];
    return { row, key: cell.dataset.order === undefined ? cell.textContent : Number(cell.dataset.order) };
  });
  keyed.sort((a, b) => sign * (typeof a.key === "number" && typeof b.key === "number"
    ? a.key - b.key : String(a.key).localeCompare(String(b.key), "en", { numeric: true })));
  table.tBodies[0].append(...keyed.map((item) => item.row));
  cut(table);
}
