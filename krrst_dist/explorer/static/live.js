// Parts of a page that are refreshed while it is open, and forms that need no button.
"use strict";

// What something that has the focus is found again by, when its surroundings are new.
function nameOf(each) {
  return each.getAttribute("href") ?? each.closest("details")?.id ?? "";
}

async function refresh(part) {
  if (!document.hidden) {
    try {
      const answer = await fetch(part.dataset.live);
      const html = answer.ok ? await answer.text() : null;
      if (html !== null && html !== part.dataset.shown) {
        const open = [...part.querySelectorAll("details[open]")].map((each) => each.id);
        const held = part.contains(document.activeElement) ? nameOf(document.activeElement) : "";
        part.dataset.shown = html;
        part.innerHTML = html;
        part.querySelectorAll("details").forEach((each) => { each.open = open.includes(each.id); });
        if (held) [...part.querySelectorAll("a, summary")].find((each) => nameOf(each) === held)?.focus({ preventScroll: true });
      }
    } catch {
      // the server has gone; what was shown stays
    }
  }
  setTimeout(() => refresh(part), 3000);
}

document.querySelectorAll("[data-live]").forEach((part) => setTimeout(() => refresh(part), 3000));

// A choice made with the pointer is sent at once. With the keyboard one walks through a list: what it stops at is sent when the field
// is left, or by the button.
document.querySelectorAll("form.filters select").forEach((choice) => {
  let typed = false;
  const first = choice.value;
  choice.addEventListener("keydown", (event) => { typed ||= event.key !== "Tab"; });
  choice.addEventListener("pointerdown", () => { typed = false; });
  choice.addEventListener("change", () => { if (!typed) choice.form.requestSubmit(); });
  choice.addEventListener("blur", () => { if (typed && choice.value !== first) choice.form.requestSubmit(); });
});
document.querySelectorAll("input[data-now]").forEach((box) => box.addEventListener("change", () => box.form.requestSubmit()));
