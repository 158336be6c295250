// A picture: its file as a data: URL, and a view of it beside its tiles, as the server cuts them.

class Picture {
  constructor(name, url) {
    this.url = url;
    this.frame = make("figure", "shown");
    this.element = make("div", "picture");
    this.seen = make("div", "seen");
    this.image = imageOf(url, name);
    this.frame.append(this.image);
    this.remover = make("button", "", "Remove"); // there as long as it is not asked about
    this.remover.type = "button";
    this.element.append(this.frame, this.seen);
    this.cut = 0; // how often it was tiled: only the last answer is shown
  }

  get part() {
    return { type: "image_url", image_url: { url: this.url } };
  }

  // Raises the server's refusal.
  async tile(server, mostTiles) {
    const number = ++this.cut;
    const message = { role: "user", content: [this.part] };
    const body = { messages: [message], mm_processor_kwargs: { max_num_tiles: mostTiles } };
    const told = await server.post("v1/tiles", body);
    if (number !== this.cut) return;
    this.#showTiles(told.pictures, told.tokens_per_tile);
  }

  #showTiles([{ grid, tiles }], tokensPerTile) {
    const num = tiles.length;
    const told = `${num} ${num === 1 ? "tile" : "tiles"}, ${num * tokensPerTile} tokens`;
    const cut = make("div", "grid");
    cut.style.gridTemplateColumns = `repeat(${grid[0]}, max-content)`;
    const figures = tiles.map(tileFigure);
    const thumbnail = num > 1 ? [figures.pop()] : [];
    thumbnail.forEach((each) => each.classList.add("thumbnail"));
    cut.append(...figures);
    this.seen.replaceChildren(make("p", "", told), cut, ...thumbnail);
    // What a browser cannot show, such as TIFF, the model can: its last tile is the whole picture.
    const showLast = () => { this.image.src = tiles[num - 1].url; };
    if (this.image.complete && this.image.naturalWidth === 0) showLast();
    else this.image.addEventListener("error", showLast, { once: true });
  }
}

function tileFigure({ tag, url }) {
  const figure = make("figure", "tile");
  figure.append(make("figcaption", "", tag), imageOf(url, ""));
  return figure;
}

function readFile(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(new Picture(file.name || "pasted picture", reader.result));
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}
