// The Studio's form: what was typed survives reloads and refusals, until a run was started with it; a double click
// starts one run.
"use strict";
(() => {
  const sent = document.querySelector("[data-sent-draft]");
  if (sent) {
    const key = `draft of ${sent.dataset.sentDraft}`;
    const same = (text) => text?.replaceAll("\r\n", "\n").trim() === sent.dataset.sent;
    if (same(sessionStorage.getItem(key))) sessionStorage.removeItem(key);
  }
  for (const field of document.querySelectorAll("[data-draft-of]")) {
    const key = `draft of ${field.dataset.draftOf}`;
    field.value ||= sessionStorage.getItem(key) ?? "";
    field.addEventListener("input", () => {
      if (field.value) sessionStorage.setItem(key, field.value);
      else sessionStorage.removeItem(key);
    });
  }
  const form = document.getElementById("studio-form");
  if (!form) return;
  form.addEventListener("submit", (event) => {
    if (form.ariaBusy) event.preventDefault(); // until the answer to the first comes
    form.ariaBusy = "true";
  });
  addEventListener("pageshow", () => { form.ariaBusy = null; }); // the browser's "Back" shows the form as it was left
})();
