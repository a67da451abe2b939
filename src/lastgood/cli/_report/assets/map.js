// The map of what takes the space. Five levels are drawn at a time, and nothing that would be too small to see.
// Tab reaches one tile, arrow keys go to its neighbours in size, Enter or a click zooms in, Escape zooms out.

const LEVELS = 5, LEAST_SIDE = 8, TITLE_HEIGHT = 18;

class SpaceMap {
  constructor(place, space) {
    this.place = place;
    this.nodes = space.nodes;
    this.total = space.nbytes || 1;
    this.children = this.nodes.parent.map(() => []);
    this.nodes.parent.forEach((parent, node) => { if (parent >= 0) this.children[parent].push(node); });
    for (const list of this.children) list.sort((a, b) => this.nodes.nbytes[b] - this.nodes.nbytes[a]);
    this.paths = [];
    this.nodes.parent.forEach((parent, node) => { this.paths.push(this.pathOf(node, parent)); });
    this.matches = null;
    this.holding = new Set();
    this.root = 0;
    this.listen();
    onResize(place, () => this.render());
  }

  pathOf(node, parent) {
    if (parent <= 0) return node === 0 ? "" : this.nodes.name[node];
    const name = this.nodes.name[node];
    return this.paths[parent] + (name.startsWith("[") ? name : `.${name}`);
  }

  // The colour of a node is that of its ancestor right below the whole; what is no tensor is grey.
  hue(node) {
    if (this.nodes.kind[node] === "o") return 7;
    let at = node;
    while (this.nodes.parent[at] > 0) at = this.nodes.parent[at];
    return Math.min(7, this.children[0].indexOf(at));
  }

  render() {
    const focused = this.place.contains(document.activeElement) ? document.activeElement.dataset.node : undefined;
    this.place.replaceChildren();
    const box = { x: 0, y: 0, width: this.place.clientWidth, height: this.place.clientHeight };
    this.layOut(this.root, box, 1);
    const first = this.place.querySelector(`.depth-1[data-node="${focused}"]`) ?? this.place.querySelector(".depth-1");
    first?.setAttribute("tabindex", "0");
    if (focused !== undefined) first?.focus();
    this.showPath();
    this.showMatches();
  }

  layOut(node, box, depth) {
    const children = this.children[node].filter((child) => this.nodes.nbytes[child] > 0);
    const boxes = squarify(children.map((child) => this.nodes.nbytes[child]), box);
    children.forEach((child, place) => {
      const { x, y, width, height } = boxes[place];
      if (width < LEAST_SIDE || height < LEAST_SIDE) return;
      const tile = this.tile(child, depth, width, height);
      Object.assign(tile.style, { left: `${x}px`, top: `${y}px`, width: `${width - 1}px`, height: `${height - 1}px` });
      this.place.append(tile);
      if (depth < LEVELS && this.children[child].length && width > 50 && height > TITLE_HEIGHT + 24) {
        const inner = { x: x + 4, y: y + TITLE_HEIGHT, width: width - 9, height: height - TITLE_HEIGHT - 5 };
        this.layOut(child, inner, depth + 1);
      }
    });
  }

  tile(node, depth, width, height) {
    const isGroup = this.children[node].length > 0;
    const title = width > 34 && height > 15 ? this.nodes.name[node] : "";
    const tile = make("div", { class: `tile depth-${depth} hue-${this.hue(node)}`, "data-node": node }, title);
    tile.classList.toggle("group", isGroup);
    if (title && height > 32 && !isGroup && width > 60) tile.append(make("br"), bytesInWords(this.nodes.nbytes[node]));
    if (title && isGroup && width > 170) tile.append(` · ${bytesInWords(this.nodes.nbytes[node])}`);
    if (depth === 1) {
      fill(tile, { role: "button", tabindex: "-1", "aria-label": this.words(node) }, []);
    } else {
      tile.setAttribute("aria-hidden", "true");
    }
    return tile;
  }

  words(node) {
    const { nbytes, kind, tensors, dtype, shape, note } = this.nodes;
    const share = `${((100 * nbytes[node]) / this.total).toPrecision(3)} %`;
    const what = kind[node] === "t" ? `${dtype[node]} ${shape[node]}` : tensors[node] ? count(tensors[node], "tensor") : "";
    return [this.paths[node] || this.nodes.name[node], what, `${bytesInWords(nbytes[node])} (${share})`, note[node]]
      .filter(Boolean).join(" · ");
  }

  describe(node) {
    const detail = document.getElementById("map-detail");
    const [path, ...rest] = this.words(node).split(" · ");
    detail.replaceChildren(make("strong", { class: "key" }, path), ` · ${rest.join(" · ")}`);
    for (const tile of this.place.querySelectorAll(".chosen")) tile.classList.remove("chosen");
    this.place.querySelector(`[data-node="${node}"]`)?.classList.add("chosen");
  }

  zoomTo(node, focusOn = null) {
    const hadFocus = this.place.contains(document.activeElement);
    this.root = node;
    this.render();
    this.describe(node);
    if (!hadFocus && focusOn === null) return;
    const tile = this.place.querySelector(`.depth-1[data-node="${focusOn}"]`) ?? this.place.querySelector(".depth-1");
    if (tile) this.focus(tile);
  }

  zoomOut() {
    if (this.root !== 0) this.zoomTo(this.nodes.parent[this.root], this.root);
  }

  // The tile's ancestor, or itself, that stands right below what the map shows.
  topTile(node) {
    let at = node;
    while (this.nodes.parent[at] !== this.root) at = this.nodes.parent[at];
    return at;
  }

  open(node) {
    if (this.children[node].length) this.zoomTo(node); else this.describe(node);
  }

  focus(tile) {
    for (const other of this.place.querySelectorAll('[tabindex="0"]')) other.setAttribute("tabindex", "-1");
    tile.setAttribute("tabindex", "0");
    tile.focus();
  }

  showPath() {
    const path = document.getElementById("map-path");
    const chain = [];
    for (let at = this.root; at >= 0; at = this.nodes.parent[at]) chain.unshift(at);
    path.replaceChildren(...chain.flatMap((node, place) => {
      if (node === this.root) return [make("span", { "aria-current": "location" }, this.nodes.name[node])];
      const button = make("button", { type: "button" }, this.nodes.name[node]);
      button.addEventListener("click", () => this.zoomTo(node, chain[place + 1]));
      return [button, make("span", { "aria-hidden": "true" }, "›")];
    }));
  }

  search(text) {
    const wanted = text.trim().toLowerCase();
    this.holding.clear();
    this.matches = wanted === "" ? null : new Set();
    if (this.matches !== null) {
      this.paths.forEach((path, node) => {
        if (this.nodes.kind[node] !== "t" || !path.toLowerCase().includes(wanted)) return;
        this.matches.add(node);
        for (let at = this.nodes.parent[node]; at >= 0 && !this.holding.has(at); at = this.nodes.parent[at]) this.holding.add(at);
      });
    }
    this.showMatches();
    this.listMatches();
  }

  showMatches() {
    this.place.classList.toggle("searching", this.matches !== null);
    for (const tile of this.place.children) {
      const node = Number(tile.dataset.node);
      tile.classList.toggle("match", this.matches?.has(node) ?? false);
      tile.classList.toggle("holds-match", this.holding.has(node));
    }
  }

  listMatches() {
    const found = document.getElementById("map-found"), list = document.getElementById("map-matches");
    list.replaceChildren();
    found.value = "";
    if (this.matches === null) return;
    const sorted = [...this.matches].sort((a, b) => this.nodes.nbytes[b] - this.nodes.nbytes[a]);
    const bytes = sorted.reduce((sum, node) => sum + this.nodes.nbytes[node], 0);
    found.value = sorted.length ? `${count(sorted.length, "key")}, ${bytesInWords(bytes)}` : "no key";
    for (const node of sorted.slice(0, 8)) {
      const button = make("button", { type: "button" }, this.paths[node]);
      button.addEventListener("click", () => { this.zoomTo(this.nodes.parent[node], node); this.describe(node); });
      list.append(button);
    }
  }

  listen() {
    const nodeOf = (event) => {
      const tile = event.target.closest(".tile");
      return tile === null ? null : Number(tile.dataset.node);
    };
    this.place.addEventListener("pointerover", (event) => { const node = nodeOf(event); if (node !== null) this.describe(node); });
    this.place.addEventListener("focusin", (event) => { const node = nodeOf(event); if (node !== null) this.describe(node); });
    this.place.addEventListener("click", (event) => {
      const node = nodeOf(event);
      if (node === null) return;
      const top = this.topTile(node);
      this.open(this.children[top].length ? top : node);
    });
    this.place.parentElement.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && event.target.type !== "search") this.zoomOut();
    });
    this.place.addEventListener("keydown", (event) => {
      const tiles = [...this.place.querySelectorAll(".depth-1")];
      const at = tiles.indexOf(event.target);
      const by = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (at < 0) return;
      if (by !== undefined) this.focus(tiles[Math.min(tiles.length - 1, Math.max(0, at + by))]);
      else if (event.key === "Enter" || event.key === " ") this.open(Number(event.target.dataset.node));
      else return;
      event.preventDefault();
    });
    document.getElementById("map-search").addEventListener("input", (event) => this.search(event.target.value));
  }
}
