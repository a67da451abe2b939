// The time line: one panel a measure over a common axis, with failures and restarts.
// Each panel is one stretched drawing of WIDTH by HEIGHT units with a path for all saves. Where saves stand closer
// than they can be told apart, each unit shows their spread instead: ten thousand saves cost what a thousand do.

const WIDTH = 1000, HEIGHT = 100;
const MEASURES = {
  stall: { label: "Stall", words: secondsInWords },
  staged: { label: "Staging", words: secondsInWords },
  durable: { label: "Until durable", words: secondsInWords },
  nbytes: { label: "Size", words: bytesInWords },
};

class Timeline {
  constructor(place, readout, saves) {
    this.place = place;
    this.readout = readout;
    this.saves = saves.columns;
    this.events = saves.events;
    this.errors = new Map(this.saves.failed.map((save, index) => [save, this.saves.errors[index]]));
    this.shown = new Set(Object.keys(MEASURES));
    this.logarithmic = false;
    this.chosen = null;
    this.setAxis("time");
    this.listen();
    onResize(place, () => this.render());
  }

  setAxis(axis) {
    this.axis = axis;
    const values = this.saves[axis];
    this.order = values.map((_, save) => save).sort((a, b) => values[a] - values[b]);
    this.sorted = this.order.map((save) => values[save]);
    const all = [this.sorted[0], this.sorted.at(-1), ...this.events.map((event) => event[axis])];
    const low = all.reduce((a, b) => Math.min(a, b)), high = all.reduce((a, b) => Math.max(a, b));
    const margin = (high - low || 1) * 0.01;
    this.whole = [low - margin, high + margin];
    this.range = this.whole;
    this.render();
  }

  zoomTo(low, high) {
    const least = (this.whole[1] - this.whole[0]) / 1e5;
    if (high - low < least) return;
    this.range = [Math.max(low, this.whole[0]), Math.min(high, this.whole[1])];
    this.render();
  }

  zoomBy(factor) {
    const [low, high] = this.range;
    const middle = this.chosen === null ? (low + high) / 2 : this.saves[this.axis][this.chosen];
    this.zoomTo(middle - (middle - low) * factor, middle + (high - middle) * factor);
  }

  across(value) {
    return ((value - this.range[0]) / (this.range[1] - this.range[0])) * WIDTH;
  }

  // The saves in view, in the order of the axis.
  visible() {
    return this.order.filter((save) => {
      const value = this.saves[this.axis][save];
      return value >= this.range[0] && value <= this.range[1];
    });
  }

  render() {
    const visible = this.visible();
    this.scales = {};
    const panels = Object.keys(MEASURES).filter((key) => this.shown.has(key)).map((key) => this.panel(key, visible));
    this.place.replaceChildren(this.eventLane(), ...panels, this.axisLabels());
    this.mark();
    const button = document.getElementById("whole-run");
    button.disabled = this.range === this.whole;
  }

  scale(values, isBytes) {
    const positive = values.filter((value) => value > 0);
    const largest = values.reduce((a, b) => Math.max(a, b), 0) || 1;
    if (!this.logarithmic || !positive.length) {
      const unit = isBytes ? 1024 ** Math.floor(Math.log(largest) / Math.log(1024)) : 1;
      const ticks = roundValues(0, (largest * 1.06) / unit, 3).map((tick) => tick * unit);
      return { up: (value) => HEIGHT - (value / (largest * 1.06)) * HEIGHT, ticks };
    }
    const low = Math.log10(positive.reduce((a, b) => Math.min(a, b))) - 0.1;
    const high = Math.max(low + 0.3, Math.log10(largest) + 0.1);
    const up = (value) => HEIGHT - ((Math.log10(Math.max(value, 10 ** low)) - low) / (high - low)) * HEIGHT;
    return { up, ticks: [10 ** low, 10 ** ((low + high) / 2), 10 ** high] };
  }

  panel(key, visible) {
    const column = this.saves[key];
    const drawn = visible.filter((save) => column[save] !== null);
    const scale = this.scale(drawn.map((save) => column[save]), key === "nbytes");
    this.scales[key] = scale;
    const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" },
      draw("path", { class: "grid", d: scale.ticks.map((tick) => `M0 ${scale.up(tick).toFixed(1)}H${WIDTH}`).join("") }),
      draw("path", { class: "restarts", d: this.eventTicks(["restart"], 0, HEIGHT) }),
      this.points(drawn, column, scale),
      draw("path", { class: "cursor" }), draw("path", { class: "chosen" }));
    const ticks = scale.ticks.map((tick) => {
      const label = make("span", { class: "tick" }, tick === 0 ? "0" : MEASURES[key].words(tick));
      label.style.top = `${scale.up(tick)}%`;
      return label;
    });
    return make("div", { class: "panel", "data-measure": key, "data-drawn": drawn.length },
      make("span", { class: "name" }, MEASURES[key].label), svg, ...ticks);
  }

  points(drawn, column, scale) {
    const place = (save) => [this.across(this.saves[this.axis][save]), scale.up(column[save])];
    if (drawn.length <= WIDTH / 2) {
      const dots = drawn.map(place).map(([x, y]) => `M${x.toFixed(1)} ${y.toFixed(1)}h0`);
      return draw("path", { class: "dots", d: dots.join("") });
    }
    const spread = new Map();
    for (const [x, y] of drawn.map(place)) {
      const at = Math.round(x), known = spread.get(at);
      spread.set(at, known ? [Math.min(known[0], y), Math.max(known[1], y)] : [y, y]);
    }
    const bars = [...spread].map(([x, [top, bottom]]) => `M${x} ${top.toFixed(1)}V${(bottom + 0.1).toFixed(1)}`);
    return draw("path", { class: "spread", d: bars.join("") });
  }

  eventTicks(kinds, top, bottom) {
    const places = this.events.filter((event) => kinds.includes(event.kind)).map((event) => event[this.axis]);
    return this.ticksAt(places, top, bottom);
  }

  ticksAt(values, top, bottom) {
    const inside = values.filter((value) => value >= this.range[0] && value <= this.range[1]);
    const places = new Set(inside.map((value) => this.across(value).toFixed(1)));
    return [...places].map((x) => `M${x} ${top}V${bottom}`).join("");
  }

  eventLane() {
    const failed = this.saves.failed.map((save) => this.saves[this.axis][save]);
    const lane = (label, name, path) => make("div", { class: `events ${name}-lane` },
      make("span", { class: "lane-name" }, label),
      draw("svg", { viewBox: `0 0 ${WIDTH} 20`, preserveAspectRatio: "none", "aria-hidden": "true" },
        draw("path", { class: name, d: path })));
    return make("div", {}, lane("failed", "failures", this.ticksAt(failed, 3, 17)),
      lane("restart", "restarts", this.eventTicks(["restart"], 3, 17)));
  }

  axisLabels() {
    const [low, high] = this.range;
    const wanted = Math.max(2, Math.floor(this.place.clientWidth / 150));
    const words = this.axis === "step" ? (value) => value.toLocaleString("en")
      : (value) => momentInWords(value).slice(...(high - low > 2 * 86400 ? [5, 16] : [11, high - low > 600 ? 16 : 19]));
    const values = this.axis === "step" ? roundValues(low, high, wanted).filter(Number.isInteger)
      : roundTimes(low, high, wanted);
    return make("div", { class: "axis-labels" }, ...values.map((value) => {
      const label = make("span", {}, words(value));
      label.style.left = `${this.across(value) / (WIDTH / 100)}%`;
      return label;
    }));
  }

  // The line and the dots of the save that was chosen, and its figures.
  mark() {
    const save = this.chosen;
    for (const panel of this.place.querySelectorAll(".panel")) {
      const key = panel.dataset.measure;
      const x = save === null ? -1 : this.across(this.saves[this.axis][save]);
      const isInView = x >= 0 && x <= WIDTH;
      panel.querySelector(".cursor").setAttribute("d", isInView ? `M${x} 0V${HEIGHT}` : "");
      const value = save === null ? null : this.saves[key][save];
      const dot = isInView && value !== null ? `M${x} ${this.scales[key].up(value)}h0` : "";
      panel.querySelector(".chosen").setAttribute("d", dot);
    }
  }

  choose(save) {
    this.chosen = save;
    this.mark();
    const columns = this.saves;
    const told = Object.entries(MEASURES).filter(([key]) => columns[key][save] !== null)
      .map(([key, measure]) => `${measure.label.toLowerCase()} ${measure.words(columns[key][save])}`);
    const parts = [make("strong", {}, `Step ${columns.step[save].toLocaleString("en")}`),
      ` at ${momentInWords(columns.time[save])}: ${told.join(", ")}.`];
    if (this.errors.has(save)) parts.push(make("span", { class: "failure" }, ` Failed: ${this.errors.get(save)}`));
    const close = (this.range[1] - this.range[0]) * 0.008;
    const here = columns[this.axis][save];
    const events = this.events.filter((event) => Math.abs(event[this.axis] - here) <= close).slice(0, 3);
    for (const event of events) parts.push(` ${event.words} (${momentInWords(event.time)}).`);
    this.readout.replaceChildren(...parts);
  }

  // The next save to the left or the right; zooms out where that one is not in view.
  step(by) {
    const at = this.chosen === null ? (by > 0 ? -1 : this.order.length) : this.order.indexOf(this.chosen);
    const save = this.order[Math.min(this.order.length - 1, Math.max(0, at + by))];
    const value = this.saves[this.axis][save];
    if (value < this.range[0] || value > this.range[1]) { this.range = this.whole; this.render(); }
    this.choose(save);
  }

  valueAt(event) {
    const panel = this.place.querySelector(".axis-labels").getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - panel.left) / panel.width));
    return this.range[0] + share * (this.range[1] - this.range[0]);
  }

  listen() {
    let from = null, brush = null;
    this.place.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      from = { value: this.valueAt(event), x: event.clientX };
    });
    this.place.addEventListener("pointermove", (event) => {
      this.choose(this.order[nearest(this.sorted, this.valueAt(event))]);
      if (from === null || Math.abs(event.clientX - from.x) < 6) return;
      brush ??= this.place.appendChild(make("div", { class: "brush" }));
      const left = this.place.getBoundingClientRect().left;
      brush.style.left = `${Math.min(from.x, event.clientX) - left}px`;
      brush.style.width = `${Math.abs(event.clientX - from.x)}px`;
    });
    const end = (event) => {
      if (from !== null && brush !== null && event.type === "pointerup") {
        const to = this.valueAt(event);
        this.zoomTo(Math.min(from.value, to), Math.max(from.value, to));
      }
      brush?.remove();
      from = brush = null;
    };
    for (const type of ["pointerup", "pointercancel", "pointerleave"]) this.place.addEventListener(type, end);
    const keys = {
      ArrowLeft: () => this.step(-1), ArrowRight: () => this.step(1),
      Home: () => this.step(-Infinity), End: () => this.step(Infinity),
      "+": () => this.zoomBy(0.5), "=": () => this.zoomBy(0.5), "-": () => this.zoomBy(2),
      Escape: () => { this.range = this.whole; this.render(); },
    };
    this.place.addEventListener("keydown", (event) => {
      if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      keys[event.key]();
    });
  }
}

function roundTimes(low, high, wanted) {
  const units = [1, 5, 15, 60, 300, 900, 3600, 3 * 3600, 6 * 3600, 12 * 3600, 86400, 2 * 86400, 7 * 86400, 28 * 86400];
  const unit = units.find((seconds) => (high - low) / seconds <= wanted) ?? 365 * 86400;
  const values = [];
  for (let index = Math.ceil(low / unit); index * unit <= high && values.length < 50; index += 1) values.push(index * unit);
  return values;
}
