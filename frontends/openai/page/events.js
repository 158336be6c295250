// What the person does: keys, buttons, files that are dropped, pasted or chosen.

const on = (id, kind, listener) => byId(id).addEventListener(kind, listener);

on("composer", "submit", (event) => {
  event.preventDefault();
  if (stopping) stopping.abort();
  else ask();
});
on("question", "keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stopping?.abort();
});

on("key", "keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  event.target.blur(); // which is a change
});
on("key", "change", (event) => {
  server.key = event.target.value.trim();
  event.target.value = "";
  meet();
});

on("most_tiles", "input", () => { byId("most_tiles_shown").textContent = mostTiles(); });
on("most_tiles", "change", tileAgain);
on("anew", "click", beginAnew);
on("copy_curl", "click", () => copyAs(asCurl));
on("copy_python", "click", () => copyAs(asPython));

on("choose", "click", () => byId("files").click());
on("files", "change", (event) => {
  attach([...event.target.files]);
  event.target.value = "";
});
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length === 0) return; // text goes where it belongs
  event.preventDefault();
  attach(files);
});
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
}
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  attach([...event.dataTransfer.files]);
});

byId("question").focus();
meet();
