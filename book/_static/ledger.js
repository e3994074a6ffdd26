// The ledger sorts by its column heads and filters by chapter and text, without a kernel.
document.addEventListener("DOMContentLoaded", () => {
  const ledger = document.querySelector("div.ledger");
  if (!ledger) return;
  const body = ledger.querySelector("tbody");
  const chapter = ledger.querySelector("select");
  const search = ledger.querySelector("input");
  const status = ledger.querySelector("[role=status]");

  const filter = () => {
    const wanted = search.value.trim().toLowerCase();
    let shown = 0;
    for (const row of body.rows) {
      const ofChapter = !chapter.value || row.id.startsWith(`${chapter.value}.`);
      row.hidden = !(ofChapter && row.textContent.toLowerCase().includes(wanted));
      shown += !row.hidden;
    }
    status.textContent = `${shown} of ${body.rows.length} checks shown`;
  };

  const key = (row, column) => {
    const text = row.cells[column].textContent.replace("≤", "").trim();
    const number = parseFloat(text);
    return Number.isNaN(number) ? text : number;
  };
  const compare = (a, b) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b));
  };
  ledger.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    button.type = "button";
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") === "ascending";
      ledger.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a, column), key(b, column)];
        return descending && x !== "" && y !== "" ? compare(y, x) : compare(x, y);
      });
      body.append(...rows);
    });
  });

  chapter.addEventListener("change", filter);
  search.addEventListener("input", filter);
  ledger.querySelector(".ledger-filters").hidden = false;
  filter();
});
