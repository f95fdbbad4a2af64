// Rows of lists come one by one. Which there are, and in what order, stands in an element of its own (order.html). A row
// never moves while somebody points at one of them, or has the focus there: it takes its place when they have left.
"use strict";
(() => {
  const orders = () => [...document.querySelectorAll("[data-order]")];
  const rowsOf = (order) => order.dataset.order.split(" ").filter(Boolean);
  const listOf = (order) => document.getElementById(order.dataset.rows);

  // A row that is new is put by htmx into the empty one that is made for it here.
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
