// Updates relative times ("5 min ago") in place, with the wording of `ago` in blueprints/filters.py.
"use strict";
(() => {
  const UNITS = [[86400, "day"], [3600, "h"], [60, "min"], [1, "s"]];
  const WEEK = 7 * 86400; // older times are shown as dates
  const ahead = Date.now() / 1000 - document.documentElement.dataset.now; // how far this clock is ahead of the server's

  const words = (past) => {
    if (past < 10) return "just now";
    const [length, unit] = UNITS.find(([seconds]) => past >= seconds);
    const count = Math.floor(past / length);
    return `${count} ${unit}${unit === "day" && count > 1 ? "s" : ""} ago`;
  };
  const grow = () => {
    for (const time of document.querySelectorAll("time[data-ago]")) {
      const past = Date.now() / 1000 - ahead - Date.parse(time.dateTime) / 1000;
      if (past < WEEK && time.textContent !== words(past)) time.textContent = words(past);
    }
  };
  setInterval(grow, 5000);
  for (const type of ["htmx:afterSettle", "visibilitychange"]) document.addEventListener(type, grow);
})();
