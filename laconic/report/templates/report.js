"use strict";
// Hover texts, sorting, filtering and copying. The page is complete without any of it.

const tip = document.getElementById("tip");

function showTip(target, x, y) {
  tip.textContent = target.dataset.tip;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = Math.min(Math.max(x + 14, 6), innerWidth - box.width - 6);
  const top = y + box.height + 22 > innerHeight ? y - box.height - 12 : y + 16;
  tip.style.left = left + "px";
  tip.style.top = Math.max(top, 6) + "px";
}

document.addEventListener("pointermove", (event) => {
  const target = event.target.closest("[data-tip]");
  if (target) showTip(target, event.clientX, event.clientY);
  else tip.hidden = true;
});
document.addEventListener("focusin", (event) => {
  if (!event.target.dataset || !event.target.dataset.tip) return;
  const box = event.target.getBoundingClientRect();
  showTip(event.target, box.right, box.top);
});
document.addEventListener("focusout", () => { tip.hidden = true; });
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true, capture: true });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });

function sortBy(table, column, down) {
  const body = table.tBodies[0];
  const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const compare = new Intl.Collator("en", { numeric: true }).compare;
  const rows = [...body.rows].sort((a, b) => (down ? -1 : 1) * compare(key(a), key(b)));
  body.append(...rows);
}

for (const table of document.querySelectorAll("table[data-sortable]")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const down = now ? now === "ascending" : head.classList.contains("n");
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      sortBy(table, column, down);
    });
  });
}

for (const input of document.querySelectorAll("input[data-filter]")) {
  const items = [...document.getElementById(input.dataset.filter).children];
  const found = document.querySelector(`[data-found="${input.dataset.filter}"]`);
  const texts = items.map((item) => (item.dataset.text ?? item.textContent).toLowerCase());
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    items.forEach((item, i) => {
      item.hidden = !words.every((word) => texts[i].includes(word));
      shown += item.hidden ? 0 : 1;
    });
    if (found) found.textContent = words.length ? `${shown} of ${items.length} rows` : "";
  });
}

for (const button of document.querySelectorAll("button[data-copy]")) {
  button.addEventListener("click", async () => {
    const target = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(target.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(target); // not allowed here: select it, so that one key copies it
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  });
}
