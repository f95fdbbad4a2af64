// Lists are updated row by row. A separate element (order.html) holds the ids of their rows, in order. Rows are not moved
// while the pointer or the focus is in the list, but after it has left.
"use strict";
(() => {
  const orders = () => [...document.querySelectorAll("[data-order]")];
  const rowsOf = (order) => order.dataset.order.split(" ").filter(Boolean);
  const listOf = (order) => document.getElementById(order.dataset.rows);

  // Creates an empty row for each new id; htmx then swaps the row's HTML into it.
  document.addEventListener("htmx:oobAfterSwap", ({ target }) => {
    if (!target.matches("[data-order]")) return;
    const list = listOf(target);
    for (const id of rowsOf(target)) {
      if (document.getElementById(id)) continue;
      list.append(Object.assign(document.createElement(list.matches("tbody") ? "tr" : "li"), { id }));
    }
  });

  const inUse = (order) => listOf(order).matches(":hover") || listOf(order).contains(document.activeElement);
  const arrange = () => {
    const wanted = new Set(orders().flatMap(rowsOf));
    for (const order of orders()) {
      for (const row of [...listOf(order).children]) if (!wanted.has(row.id)) row.remove();
    }
    if (orders().some(inUse)) return;
    for (const order of orders()) {
      const list = listOf(order);
      rowsOf(order).forEach((id, at) => {
        const row = document.getElementById(id);
        if (row && list.children[at] !== row) list.insertBefore(row, list.children[at] ?? null);
      });
    }
  };
  document.addEventListener("htmx:afterSettle", arrange);
  for (const type of ["pointerout", "focusout"]) {
    document.addEventListener(type, () => orders().length && requestAnimationFrame(arrange));
  }
})();
