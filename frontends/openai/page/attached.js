// The pictures of the next question.

class Attached {
  pictures = [];

  constructor(element, server) {
    this.element = element;
    this.server = server;
  }

  // Shows files, each with its tiles as soon as these come. `refuse` hears what goes wrong.
  add(files, mostTiles, refuse) {
    return Promise.all([...files].map((file) => this.#addOne(file, mostTiles, refuse)));
  }

  // In front of those that came meanwhile.
  putBack(pictures) {
    pictures.forEach((each) => each.side.append(each.remover));
    this.pictures = [...pictures, ...this.pictures];
    this.element.prepend(...pictures.map((each) => each.element));
  }

  // Those of the question that is asked now.
  take() {
    const taken = this.pictures;
    taken.forEach((each) => each.remover.remove());
    this.pictures = [];
    return taken;
  }

  clear() {
    this.pictures.forEach((each) => each.element.remove());
    this.pictures = [];
  }

  async #addOne(file, mostTiles, refuse) {
    let picture;
    try {
      picture = await readFile(file);
      this.#show(picture);
      await picture.tile(this.server, mostTiles()); // as it is now: reading took a while
    } catch (error) {
      refuse(error);
      if (picture && error.status === 400) this.#drop(picture); // it is no picture
    }
  }

  #show(picture) {
    picture.remover.addEventListener("click", () => this.#drop(picture));
    this.pictures.push(picture);
    picture.side.append(picture.remover);
    this.element.append(picture.element);
  }

  #drop(picture) {
    if (!this.pictures.includes(picture)) return;
    this.pictures = this.pictures.filter((each) => each !== picture);
    picture.element.remove();
    byId("question").focus();
  }
}
