// Two digits that the reader picks or draws.

import { paint, SIDE } from "./digits.js";
import { choices, element, grey } from "./elements.js";
import { asDigit, drawn } from "./handwriting.js";

/** A place for one digit, picked from those of the page or drawn by hand. */
export class Slot {
  /**
   * @param {HTMLElement} root - is filled
   * @param {string} name - "Left digit"
   * @param {import("./digits.js").Digit[]} digits - to pick from
   * @param {number} start - the digit to begin with
   * @param {() => void} changed - called whenever there is another digit
   */
  constructor(root, name, digits, start, changed) {
    this.name = name;
    this.digits = digits;
    this.changed = changed;
    this.strokes = [];
    this.pad = element("canvas", {
      className: "pad",
      width: SIDE,
      height: SIDE,
      attributes: { role: "img" },
    });
    this.another = element("button", {
      id: `${root.id}-another`,
      className: "another",
      type: "button",
      onclick: () => this.pick(this.digit.label, this.place + 1),
    });
    const clear = element("button", { type: "button", onclick: () => this.draw([]) }, "Clear");
    clear.setAttribute("aria-label", `Clear the ${name.toLowerCase()}`);
    const classes = element("fieldset", { className: "choices" }, element("legend", {}, name));
    this.classes = choices(classes, name, new Map(tenDigits()), (value) => this.pick(Number(value), 0));
    root.append(this.pad, classes, element("div", { className: "row" }, this.another, clear));
    this.followPen();
    const { label } = digits[start];
    this.pick(label, this.ofClass(label).indexOf(digits[start]));
  }

  /** Take the digit that stands at a place among those of its class; after the last comes the first. */
  pick(label, place) {
    const some = this.ofClass(label);
    this.place = place % some.length;
    this.strokes = [];
    this.show(some[this.place], some[this.place].pixels, `a ${label}, picked`);
  }

  /** Take what these strokes make. */
  draw(strokes) {
    this.strokes = strokes;
    const about = strokes.length ? "drawn by hand" : "empty";
    this.show({ label: null, pixels: asDigit(strokes) }, drawn(strokes), about);
  }

  /**
   * Show a digit, and say that it is another one.
   * @param {import("./digits.js").Digit} digit
   * @param {Uint8Array} picture - what the pad shows: a drawing stays where it was drawn
   * @param {string} about
   */
  show(digit, picture, about) {
    this.digit = digit;
    paint(this.pad, picture);
    this.pad.setAttribute("aria-label", `${this.name}: ${about}`);
    this.classes.value = String(digit.label);
    grey(this.another, digit.label === null ? "Only a digit that was picked has others like it." : "");
    this.another.textContent = digit.label === null ? "Another" : `Another ${digit.label}`;
    this.another.setAttribute("aria-label", `${this.another.textContent}, as ${this.name.toLowerCase()}`);
    this.changed();
  }

  ofClass(label) {
    return this.digits.filter((digit) => digit.label === label);
  }

  /** Draw along with mouse, pen or finger. */
  followPen() {
    const point = (event) => {
      const box = this.pad.getBoundingClientRect();
      const scale = SIDE / box.width;
      return { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale };
    };
    this.pad.addEventListener("pointerdown", (event) => {
      this.pad.setPointerCapture(event.pointerId);
      this.draw([...this.strokes, [point(event)]]);
    });
    this.pad.addEventListener("pointermove", (event) => {
      if (!this.pad.hasPointerCapture(event.pointerId)) return;
      this.strokes.at(-1).push(point(event));
      this.draw(this.strokes);
    });
  }
}

/**
 * What to say where a digit is empty: no network reads what is not there.
 * @param {import("./digits.js").Digit[]} pair - left, right
 * @returns {string} empty if both are there
 */
export function missing(pair) {
  const sides = ["left", "right"].filter((_, i) => pair[i].pixels.every((value) => value === 0));
  if (sides.length === 0) return "";
  if (sides.length === 2) return "Both digits are empty: pick or draw them.";
  return `The digit on the ${sides[0]} is empty: pick or draw one.`;
}

/** "0" to "9", as choices. */
export function tenDigits() {
  return Array.from({ length: 10 }, (_, i) => [String(i), String(i)]);
}
