// Keeps the focus from falling back to <body>: when the focused element is removed, hidden or disabled, the nearest
// usable control gets the focus.
"use strict";
(() => {
  const CONTROLS = "a[href], button, input:not([type=hidden]), select, textarea, summary, [tabindex='0']";
  const PARTS = "tr, li, form, dialog, .banner, .panel"; // small enough for their first control to be near
  const usable = (it) => Boolean(it?.isConnected && it.checkVisibility() && !it.matches(":disabled"));
  const control = (part) => part && [...part.querySelectorAll(CONTROLS)].find(usable);

  // The focused element and its ancestors, innermost first, each with its siblings: a whole row may be removed.
  let trail = [];
  const trailOf = (it) => {
    const steps = [];
    for (let at = it; at && at !== document.body; at = at.parentElement) {
      steps.push({ at, id: at.id, next: at.nextElementSibling, before: at.previousElementSibling });
    }
    return steps;
  };
  const isIn = (steps, dialog) => steps.some(({ at }) => at === dialog);
  const remember = (it) => {
    const dialog = it.closest("dialog"); // inside a dialog, the trail goes on with the element that opened it
    const opener = !dialog ? [] : isIn(trail, dialog) ? trail.slice(trail.findIndex(({ at }) => at === dialog) + 1) : trail;
    const steps = trailOf(it);
    trail = dialog ? [...steps.slice(0, steps.findIndex(({ at }) => at === dialog) + 1), ...opener] : steps;
  };

  const nearest = () => {
    for (const [number, { at, id, next, before }] of trail.entries()) {
      const now = at.isConnected ? at : (id && document.getElementById(id)) || at;
      if (usable(now) && (!number || now.matches(CONTROLS))) return now; // what opened a dialog is in its trail
      if (now.popover !== null && !usable(now)) {
        const invoker = document.querySelector(`[popovertarget="${CSS.escape(id)}"]`);
        if (usable(invoker)) return invoker;
      }
      const near = usable(now) && now.matches(PARTS) ? now.querySelector("[autofocus]") ?? control(now) : null;
      if (near) return near;
      if (usable(now) && now.hasAttribute("tabindex")) return now;
      if (!now.isConnected && now.matches("tr, li")) {
        const neighbour = control(next) ?? control(before);
        if (neighbour) return neighbour;
      }
    }
    return document.getElementById("main");
  };
  const keep = () => {
    const active = document.activeElement;
    const lost = !active || active === document.body || !usable(active);
    if (!lost && !trail.length) remember(active);
    if (lost && trail.length) nearest()?.focus({ preventScroll: true });
  };

  document.addEventListener("focusin", ({ target }) => remember(target));
  document.addEventListener("pointerdown", () => { trail = []; }); // a click on nothing focusable clears the focus
  new MutationObserver(keep).observe(document.body, {
    childList: true, subtree: true, attributes: true, attributeFilter: ["disabled", "hidden", "open"],
  });
  document.addEventListener("toggle", keep, true);
})();
