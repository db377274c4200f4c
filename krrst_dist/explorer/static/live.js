// Parts of a page that are refreshed while it is open, and forms that need no button.
"use strict";

async function refresh(part) {
  if (!document.hidden) {
    try {
      const answer = await fetch(part.dataset.live);
      const html = answer.ok ? await answer.text() : null;
      if (html !== null && html !== part.dataset.shown) {
        part.dataset.shown = html;
        part.innerHTML = html;
      }
    } catch {
      // the server has gone; what was shown stays
    }
  }
  setTimeout(() => refresh(part), 3000);
}

document.querySelectorAll("[data-live]").forEach((part) => setTimeout(() => refresh(part), 3000));
document.querySelectorAll("form.filters select").forEach((choice) => choice.addEventListener("change", () => choice.form.requestSubmit()));
