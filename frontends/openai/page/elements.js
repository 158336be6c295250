// Makes elements. Text goes in as text: nothing that a model or a server says becomes HTML.

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

function imageOf(url, alt) {
  const image = make("img");
  image.src = url;
  image.alt = alt;
  return image;
}

const byId = (id) => document.getElementById(id);
