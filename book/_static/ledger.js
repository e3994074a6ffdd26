// The ledger filters by part, chapter, kind and text and sorts by |z| and sharpness, without a kernel.
document.addEventListener("DOMContentLoaded", () => {
  const ledger = document.querySelector("div.ledger");
  if (!ledger) return;
  const table = ledger.querySelector("table");
  const search = ledger.querySelector("input");
  const status = ledger.querySelector("[role=status]");
  const select = (name) => ledger.querySelector(`select[name=${name}]`);
  const text = new Map();
  const claims = [...table.tBodies].map((body) => ({ body, head: body.rows[0], checks: [...body.rows].slice(1) }));
  for (const row of table.rows) text.set(row, row.textContent.toLowerCase());
  const total = claims.reduce((sum, { checks }) => sum + checks.length, 0);

  const filter = () => {
    const [part, chapter, kind] = ["part", "chapter", "kind"].map((name) => select(name).value);
    const wanted = search.value.trim().toLowerCase();
    let shown = 0;
    for (const { body, head, checks } of claims) {
      const here = (!part || body.dataset.part === part) && (!chapter || body.dataset.chapter === chapter);
      const stated = text.get(head).includes(wanted);
      let found = 0;
      for (const check of checks) {
        const fits = (!kind || check.dataset.kind === kind) && (stated || text.get(check).includes(wanted));
        check.hidden = !(here && fits);
        found += !check.hidden;
      }
      body.hidden = found === 0;
      shown += found;
    }
    status.textContent = `${shown} of ${total} checks shown`;
  };

  // What is smallest comes first; checks that are not simulations have no figure, and come last.
  const key = {
    "": () => 0,
    z: (check) => -check.dataset.z,
    sharp: (check) => +check.dataset.catches,
    blunt: (check) => -check.dataset.catches,
  };
  const sort = () => {
    const of = (check) => (check.dataset.z ? key[select("order").value](check) : Infinity);
    const first = new Map();
    for (const { body, checks } of claims) {
      const sorted = select("order").value ? [...checks].sort((a, b) => (of(a) === of(b) ? 0 : of(a) - of(b))) : checks;
      body.append(...sorted);
      first.set(body, of(sorted[0]));
    }
    const bodies = claims.map(({ body }) => body);
    if (select("order").value)
      bodies.sort((a, b) => (first.get(a) === first.get(b) ? 0 : first.get(a) - first.get(b)));
    table.append(...bodies);
  };

  for (const name of ["part", "chapter", "kind"]) select(name).addEventListener("change", filter);
  select("order").addEventListener("change", sort);
  search.addEventListener("input", filter);
  ledger.querySelector(".ledger-filters").hidden = false;
  filter();
});
