// The heat map: layers down, experts across, the colour an expert's share of its layer's tokens; beside each layer its balance.

import { css, inkOn, ramp } from "./colour.js";
import { byId } from "./dom.js";
import { percent, ratio } from "./format.js";

const LABEL = 30; // left of the cells
const TOP = 16; // above them
const BALANCE = 76; // right of them
const MIN_CELL = 2;
const MAX_ROW = 72;
const ROOMY = 9; // cells this large are set apart
// Ends of the scale, in multiples of the even share.
const STEPS = [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024];

export class HeatMap {
  /** onSelect(cell, isByKey): a cell {row, expert} is pointed at or chosen, or null. */
  constructor(fleet, onSelect) {
    this.fleet = fleet;
    this.onSelect = onSelect;
    this.canvas = byId("heat-map");
    this.frame = byId("heat-scroll");
    this.chosen = null;
    this.hovered = null;
    this.top = STEPS[0];
    // All but the outlines: pointing at a cell draws nothing anew.
    this.drawn = document.createElement("canvas");
    this.small = document.createElement("canvas");
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    this.dark.addEventListener("change", () => this.#themeChanged());
    new ResizeObserver(() => this.draw()).observe(this.frame);
    this.canvas.addEventListener("pointermove", (event) => this.#hover(this.#cellAt(event)));
    this.canvas.addEventListener("pointerleave", () => this.#hover(null));
    this.canvas.addEventListener("click", (event) => this.choose(this.#cellAt(event)));
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    this.#themeChanged();
  }

  /** Choose a cell, or none. */
  choose(cell, isByKey = false) {
    this.chosen = cell;
    this.#present();
    this.onSelect(this.hovered ?? cell, isByKey);
  }

  draw() {
    const { numExperts, layers } = this.fleet;
    if (!numExperts || !layers.length) return;
    this.#measure(numExperts, layers.length);
    const context = this.drawn.getContext("2d");
    context.setTransform(this.scale, 0, 0, this.scale, 0, 0);
    context.clearRect(0, 0, this.width, this.height);
    this.#chooseScale();
    if (this.cellWidth >= ROOMY && this.cellHeight >= ROOMY) this.#roomyCells(context, numExperts, layers.length);
    else this.#denseCells(context, numExperts, layers.length);
    this.#marks(context, numExperts, layers.length);
    this.#labels(context, numExperts, layers);
    this.#present();
    this.#legend();
  }

  /** Show what is drawn, with outlines. */
  #present() {
    if (!this.width) return;
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    context.drawImage(this.drawn, 0, 0);
    context.scale(this.scale, this.scale);
    for (const [cell, width] of [[this.hovered, 1], [this.chosen, 2]]) if (cell) this.#outline(context, cell, width);
  }

  #measure(numExperts, numLayers) {
    this.scale = window.devicePixelRatio || 1;
    const room = this.frame.clientWidth - LABEL - BALANCE;
    this.cellWidth = Math.max(MIN_CELL, room / numExperts);
    const high = (this.frame.clientHeight - TOP) / numLayers;
    this.cellHeight = Math.max(2 * MIN_CELL, Math.min(MAX_ROW, high));
    this.width = Math.floor(LABEL + this.cellWidth * numExperts + BALANCE);
    this.height = Math.floor(TOP + this.cellHeight * numLayers);
    const [w, h] = [Math.round(this.width * this.scale), Math.round(this.height * this.scale)];
    if (this.canvas.width !== w || this.canvas.height !== h) {
      Object.assign(this.canvas, { width: w, height: h });
      Object.assign(this.drawn, { width: w, height: h });
      this.canvas.style.inlineSize = `${this.width}px`;
      this.canvas.style.blockSize = `${this.height}px`;
    }
  }

  /** The scale ends at the smallest step above all shares, and comes down only when there is much room. */
  #chooseScale() {
    let most = 0;
    this.fleet.layers.forEach((_, row) => {
      for (let expert = 0; expert < this.fleet.numExperts; expert += 1) {
        most = Math.max(most, (this.fleet.share(row, expert) ?? 0) * this.fleet.numExperts);
      }
    });
    const end = Math.min(STEPS.find((step) => step >= most) ?? STEPS.at(-1), Math.max(2, this.fleet.numExperts));
    if (end > this.top || most < this.top * 0.4) this.top = end;
  }

  /** Where a share lies on the scale, 0 to 1: by its square root, so that the even share is not lost at the dark end. */
  #level(share) {
    return Math.sqrt(Math.min(1, (share * this.fleet.numExperts) / this.top));
  }

  /** Which of the 256 colours an expert has. */
  #shade(row, expert) {
    const share = this.fleet.share(row, expert);
    return share === null ? 0 : Math.round(this.#level(share) * 255);
  }

  #roomyCells(context, numExperts, numLayers) {
    for (let row = 0; row < numLayers; row += 1) {
      for (let expert = 0; expert < numExperts; expert += 1) {
        const [x, y, w, h] = this.#box(row, expert);
        context.fillStyle = css(this.colours[this.#shade(row, expert)]);
        context.fillRect(x, y, w - 1, h - 1);
      }
    }
  }

  /** Thousands of cells: a picture with one pixel each, made larger. */
  #denseCells(context, numExperts, numLayers) {
    Object.assign(this.small, { width: numExperts, height: numLayers });
    const pixels = new ImageData(numExperts, numLayers);
    for (let row = 0; row < numLayers; row += 1) {
      for (let expert = 0; expert < numExperts; expert += 1) {
        const at = (row * numExperts + expert) * 4;
        [pixels.data[at], pixels.data[at + 1], pixels.data[at + 2]] = this.colours[this.#shade(row, expert)];
        pixels.data[at + 3] = 255;
      }
    }
    this.small.getContext("2d").putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.small, LABEL, TOP, this.cellWidth * numExperts, this.cellHeight * numLayers);
  }

  #marks(context, numExperts, numLayers) {
    const { base = 1 } = this.fleet;
    const size = this.cellWidth >= ROOMY ? 3 : 1;
    for (let row = 0; row < numLayers; row += 1) {
      for (let expert = 0; expert < numExperts; expert += 1) {
        const more = this.fleet.numReplicas(row, expert) - base;
        if (more <= 0) continue;
        const [x, y, w] = this.#box(row, expert);
        this.#mark(context, [x + w - (size > 1), y], size, Math.min(more, 3), inkOn(this.colours[this.#shade(row, expert)]));
      }
    }
  }

  /** One square in the upper right corner for each replica beyond what most have. */
  #mark(context, [right, top], size, number, ink) {
    const inset = size >= 3 ? 2 : 0;
    context.fillStyle = ink;
    context.globalAlpha = size >= 3 ? 1 : 0.6;
    for (let index = 0; index < number; index += 1) {
      const x = right - inset - size - index * (size + 2);
      if (index && size < 3) break;
      context.fillRect(x, top + inset, size, size);
    }
    context.globalAlpha = 1;
  }

  /** The cell's box on whole device pixels. */
  #box(row, expert) {
    const snap = (value) => Math.round(value * this.scale) / this.scale;
    const [x, y] = [snap(LABEL + expert * this.cellWidth), snap(TOP + row * this.cellHeight)];
    return [x, y, snap(LABEL + (expert + 1) * this.cellWidth) - x, snap(TOP + (row + 1) * this.cellHeight) - y];
  }

  #labels(context, numExperts, layers) {
    const style = getComputedStyle(document.documentElement);
    const [text, soft, fill] = ["--muted", "--line", "--bar"].map((name) => style.getPropertyValue(name));
    context.font = `11px ${style.getPropertyValue("--font")}`;
    context.fillStyle = text;
    context.textBaseline = "middle";
    context.textAlign = "center";
    const everyExpert = niceStep(26 / this.cellWidth);
    for (let expert = 0; expert < numExperts; expert += everyExpert) {
      context.fillText(`E${expert}`, LABEL + (expert + 0.5) * this.cellWidth, TOP / 2 - 1);
    }
    const everyLayer = niceStep(12 / this.cellHeight);
    const right = LABEL + numExperts * this.cellWidth + 8;
    context.textAlign = "left";
    context.fillText("balance", right, TOP / 2 - 1);
    layers.forEach((layer, row) => {
      const [, y, , h] = this.#box(row, 0);
      const balance = this.fleet.balance?.[row];
      const isNamed = row % everyLayer === 0;
      const long = this.cellHeight >= 12 ? 34 : BALANCE - 12;
      const high = Math.max(1, Math.min(6, h - 2));
      context.fillStyle = soft;
      context.fillRect(right, y + (h - high) / 2, long, high);
      context.fillStyle = fill;
      context.fillRect(right, y + (h - high) / 2, long * (balance ?? 0), high);
      context.fillStyle = text;
      if (isNamed) {
        context.textAlign = "right";
        context.fillText(`L${layer}`, LABEL - 6, y + h / 2);
      }
      context.textAlign = "left";
      if (this.cellHeight >= 12) context.fillText(ratio(balance), right + long + 5, y + h / 2);
    });
  }

  #outline(context, { row, expert }, width) {
    const [x, y, w, h] = this.#box(row, expert);
    const style = getComputedStyle(document.documentElement);
    context.strokeStyle = style.getPropertyValue("--card");
    context.lineWidth = width + 2;
    context.strokeRect(x - 0.5, y - 0.5, w, h);
    context.strokeStyle = style.getPropertyValue("--text");
    context.lineWidth = width;
    context.strokeRect(x - 0.5, y - 0.5, w, h);
  }

  #legend() {
    // Those that lie far enough from each other to be read.
    const ticks = [...(this.top < 16 ? [0] : []), 1, ...(this.top >= 16 ? [this.top / 4] : []), this.top];
    const key = `${this.top}/${this.fleet.numExperts}`;
    if (this.legendKey === key) return;
    this.legendKey = key;
    const spans = ticks.map((multiple) => {
      const span = document.createElement("span");
      span.style.insetInlineStart = `${Math.sqrt(multiple / this.top) * 100}%`;
      span.textContent = percent(multiple / this.fleet.numExperts) + (multiple === 1 ? " even" : "");
      return span;
    });
    byId("legend-ticks").replaceChildren(...spans);
  }

  #themeChanged() {
    this.colours = ramp(this.dark.matches ? "dark" : "light");
    const canvas = byId("legend-ramp");
    const pixels = new ImageData(256, 1);
    this.colours.forEach((rgb, index) => pixels.data.set([...rgb, 255], index * 4));
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    this.draw();
  }

  #cellAt(event) {
    const area = this.canvas.getBoundingClientRect();
    const expert = Math.floor((event.clientX - area.left - LABEL) / this.cellWidth);
    const row = Math.floor((event.clientY - area.top - TOP) / this.cellHeight);
    const isInside = expert >= 0 && expert < this.fleet.numExperts && row >= 0 && row < this.fleet.layers.length;
    return isInside ? { row, expert } : null;
  }

  #hover(cell) {
    const isSame = cell?.row === this.hovered?.row && cell?.expert === this.hovered?.expert;
    if (isSame) return;
    this.hovered = cell;
    this.#present();
    this.onSelect(cell ?? this.chosen, false);
  }

  #key(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const { row, expert } = this.chosen ?? { row: 0, expert: -1 };
    const last = this.fleet.numExperts - 1;
    let to = null;
    if (event.key in steps) to = [row + steps[event.key][0], expert + steps[event.key][1]];
    else if (event.key === "Home") to = [row, 0];
    else if (event.key === "End") to = [row, last];
    else if (event.key !== "Escape") return;
    event.preventDefault();
    const clamp = (value, most) => Math.min(Math.max(value, 0), most);
    this.hovered = null;
    this.choose(to && { row: clamp(to[0], this.fleet.layers.length - 1), expert: clamp(to[1], last) }, true);
  }
}

/** The smallest of 1, 2, 4, 8, ... that is not below a number. */
function niceStep(least) {
  let step = 1;
  while (step < least) step *= 2;
  return step;
}
