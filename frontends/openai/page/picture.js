// A picture: its file as a data: URL, and a view of it beside its tiles, as the server cuts them.

const LEAST_SIDE = 140; // what the style sheet never makes smaller

class Picture {
  constructor(name, url) {
    this.url = url;
    this.frame = make("figure", "shown");
    this.element = make("div", "picture");
    this.seen = make("div", "seen");
    this.image = imageOf(url, name);
    this.image.addEventListener("load", () => enlarge(this.image));
    this.frame.append(this.image);
    this.remover = make("button", "", "Remove"); // there as long as it is not asked about
    this.remover.type = "button";
    this.side = make("div", "side"); // the remover comes below the picture
    this.side.append(this.frame);
    this.element.append(this.side, this.seen);
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
    const reply = await server.post("v1/tiles", body);
    if (number !== this.cut) return;
    this.#showTiles(reply.pictures, reply.tokens_per_tile);
  }

  #showTiles([{ grid, tiles }], tokensPerTile) {
    const num = tiles.length;
    const summary = `${num} ${num === 1 ? "tile" : "tiles"}, ${num * tokensPerTile} tokens`;
    const cells = make("div", "grid");
    cells.style.gridTemplateColumns = `repeat(${grid[0]}, max-content)`;
    const figures = tiles.map(tileFigure);
    const thumbnail = figures.pop();
    thumbnail.classList.add("thumbnail");
    cells.append(...figures);
    const cut = make("div", "cut");
    cut.append(...(num > 1 ? [cells] : []), thumbnail);
    this.seen.replaceChildren(make("p", "", summary), cut);
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

// A picture of a few pixels would hardly be seen. Its sides keep their ratio.
function enlarge(image) {
  const factor = LEAST_SIDE / Math.max(image.naturalWidth, image.naturalHeight);
  if (factor > 1) image.width = Math.round(factor * image.naturalWidth);
}

function readFile(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(new Picture(file.name || "pasted picture", reader.result));
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}
