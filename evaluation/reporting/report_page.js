"use strict";
const gallery = document.getElementById("gallery");
if (gallery) {
  const cards = [...gallery.querySelectorAll("figure")];
  const chosen = { task: "all", verdict: "all" };
  const fits = (card) =>
    (chosen.task === "all" || card.dataset.task === chosen.task) &&
    (chosen.verdict === "all" || card.dataset.verdict === chosen.verdict ||
      (chosen.verdict === "changed" && card.dataset.changed === "true"));
  const show = () => {
    for (const card of cards) card.hidden = !fits(card);
    const number = cards.filter((card) => !card.hidden).length;
    gallery.querySelector("output").textContent = `${number} sample${number === 1 ? "" : "s"}`;
  };
  for (const button of gallery.querySelectorAll("nav button")) {
    button.addEventListener("click", () => {
      const { kind, value } = button.dataset;
      chosen[kind] = value;
      for (const other of gallery.querySelectorAll(`nav button[data-kind="${kind}"]`)) {
        other.setAttribute("aria-pressed", String(other === button));
      }
      show();
    });
  }
  const dialog = gallery.querySelector("dialog");
  for (const picture of gallery.querySelectorAll(".picture")) {
    picture.addEventListener("click", () => {
      dialog.querySelector("img").src = picture.querySelector(".tiles").src;
      dialog.showModal();
    });
  }
  dialog.addEventListener("click", () => dialog.close());
}
