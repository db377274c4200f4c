// A distilled set's page: the slider through its past, and the feature space under the pointer.
"use strict";

const slider = document.querySelector("input[data-moments]");
if (slider) {
  const moments = slider.dataset.moments.split(" "), titles = slider.dataset.titles.split("|");
  const show = () => {
    slider.closest("label").querySelector("output").textContent = titles[slider.value];
    document.querySelectorAll(".pictures .now").forEach((image) => {
      const address = new URL(image.src);
      address.searchParams.set("which", moments[slider.value]);
      image.src = address;
    });
    document.querySelectorAll(".paging a").forEach((link) => {
      const address = new URL(link.href);
      address.searchParams.set("at", slider.value);
      link.href = address;
    });
  };
  slider.addEventListener("input", show);
}

const RADIUS = [2, 4, 4], REACH = 24;

class Cloud {
  constructor(part, told) {
    this.part = part;
    this.told = told;
    this.hidden = new Set();
    this.marks = new Map();
    this.chosen = -1;
    this.canvas = part.querySelector("canvas");
    this.figure = part.querySelector("figure");
    this.image = new Image(160, 160);
    told.kinds.forEach((title, kind) => told.points.some((point) => point[2] === kind) && this.legend(title, kind));
    this.canvas.addEventListener("pointermove", (event) => this.choose(this.nearest(event.offsetX, event.offsetY)));
    this.canvas.addEventListener("keydown", (event) => this.walk(event));
    new ResizeObserver(() => this.resize()).observe(this.canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.resize();
  }

  legend(title, kind) {
    const label = document.createElement("label"), box = document.createElement("input"), mark = document.createElement("span");
    box.type = "checkbox";
    box.checked = true;
    box.addEventListener("change", () => {
      if (box.checked) this.hidden.delete(kind); else this.hidden.add(kind);
      this.draw();
    });
    mark.className = `mark kind-${kind}`;
    this.marks.set(kind, mark);
    label.className = "check";
    label.append(box, mark, title);
    this.part.querySelector(".kinds").append(label);
  }

  resize() {
    const ratio = devicePixelRatio || 1;
    this.width = this.canvas.clientWidth;
    this.height = this.canvas.clientHeight;
    this.canvas.width = this.width * ratio;
    this.canvas.height = this.height * ratio;
    this.pen = this.canvas.getContext("2d");
    this.pen.scale(ratio, ratio);
    this.draw();
  }

  at(point) {
    return [10 + point[0] * (this.width - 20), this.height - 10 - point[1] * (this.height - 20)];
  }

  draw() {
    const pen = this.pen, { points } = this.told;
    pen.clearRect(0, 0, this.width, this.height);
    this.marks.forEach((mark, kind) => {
      if (this.hidden.has(kind)) return;
      pen.fillStyle = getComputedStyle(mark).backgroundColor;
      for (const point of points) {
        if (point[2] !== kind) continue;
        const [x, y] = this.at(point);
        pen.fillRect(x - RADIUS[kind], y - RADIUS[kind], 2 * RADIUS[kind], 2 * RADIUS[kind]);
      }
    });
    if (this.chosen >= 0) {
      const [x, y] = this.at(points[this.chosen]);
      pen.strokeStyle = getComputedStyle(this.canvas).color;
      pen.lineWidth = 2;
      pen.strokeRect(x - 7, y - 7, 14, 14);
    }
  }

  nearest(x, y) {
    let best = -1, closest = REACH * REACH;
    this.told.points.forEach((point, i) => {
      if (this.hidden.has(point[2])) return;
      const [px, py] = this.at(point), distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < closest) [best, closest] = [i, distance];
    });
    return best;
  }

  walk(event) {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!way) return;
    event.preventDefault();
    if (this.chosen < 0) return this.choose(this.told.points.findIndex((point) => !this.hidden.has(point[2])));
    const [x, y] = this.at(this.told.points[this.chosen]);
    let best = -1, least = Infinity;
    this.told.points.forEach((point, i) => {
      if (this.hidden.has(point[2])) return;
      const [px, py] = this.at(point), along = (px - x) * way[0] + (py - y) * way[1], aside = Math.abs((px - x) * way[1]) + Math.abs((py - y) * way[0]);
      if (along > 0 && along + 2 * aside < least) [best, least] = [i, along + 2 * aside];
    });
    if (best >= 0) this.choose(best);
  }

  choose(i) {
    if (i < 0 || i === this.chosen) return;
    this.chosen = i;
    const [, , kind, index] = this.told.points[i], image = this.image, label = this.told.labels[index];
    const address = new URL(this.part.dataset.image, location.href);
    address.searchParams.set("which", kind === 0 ? "real" : "distilled");
    address.searchParams.set("index", index);
    image.src = address;
    image.alt = [`real image ${this.told.real[index]}`, `label of image ${index}`, `image ${index}`][kind];
    const more = kind === 0 ? (label >= 0 ? `, class ${label}` : "") : kind === 1 ? ": row of Y_s, with its image"
      : `; nearest real image: ${this.told.nearest[index]}, at ${this.told.distances[index]}`;
    this.figure.querySelector("figcaption").textContent = image.alt + more;
    this.figure.prepend(image);
    this.figure.hidden = false;
    this.draw();
  }
}

document.querySelectorAll("[data-points]").forEach(async (part) => {
  const answer = await fetch(part.dataset.points);
  if (answer.ok) new Cloud(part, await answer.json());
});
