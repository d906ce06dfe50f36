// From strokes of a pen to a digit as MNIST has them: of 20 pixels, its centre of mass in the middle of the image.

import { SIDE } from "./digits.js";

/** @typedef {{x: number, y: number}} Point - in pixels of the image */
/** @typedef {Point[]} Stroke */

const SIZE = 20; // pixels, of the longer side of a digit
const PEN = 1.1; // pixels, half the width of a line
const EDGE = 0.8; // pixels, over which a line fades

/**
 * The strokes where they were drawn.
 * @param {Stroke[]} strokes
 * @returns {Uint8Array} 28 x 28 pixels in 0..255
 */
export function drawn(strokes) {
  const lines = strokes.flatMap((points) => points.map((to, i) => [points[Math.max(0, i - 1)], to]));
  return Uint8Array.from({ length: SIDE * SIDE }, (_, i) => {
    const pixel = { x: (i % SIDE) + 0.5, y: Math.floor(i / SIDE) + 0.5 };
    const near = lines.reduce((least, [from, to]) => Math.min(least, distance(pixel, from, to)), Infinity);
    return 255 * Math.max(0, Math.min(1, (PEN + EDGE - near) / EDGE));
  });
}

/**
 * The strokes at the size and place that the networks know digits in.
 * @param {Stroke[]} strokes
 * @returns {Uint8Array} 28 x 28 pixels in 0..255
 */
export function asDigit(strokes) {
  const points = strokes.flat();
  if (!points.length) return new Uint8Array(SIDE * SIDE);
  const [left, right] = range(points.map((point) => point.x));
  const [top, bottom] = range(points.map((point) => point.y));
  const scale = (SIZE - 2 * PEN) / Math.max(right - left, bottom - top, 4); // a dot stays small
  const middle = { x: (left + right) / 2, y: (top + bottom) / 2 };
  const scaled = moved(strokes, (at, axis) => (at - middle[axis]) * scale + SIDE / 2);
  const mass = centreOfMass(drawn(scaled));
  return drawn(moved(scaled, (at, axis) => at - mass[axis] + SIDE / 2));
}

/** Every coordinate of the strokes, changed. */
function moved(strokes, change) {
  return strokes.map((points) => points.map(({ x, y }) => ({ x: change(x, "x"), y: change(y, "y") })));
}

function range(values) {
  return [Math.min(...values), Math.max(...values)];
}

function centreOfMass(pixels) {
  let [mass, x, y] = [0, 0, 0];
  pixels.forEach((value, i) => {
    mass += value;
    x += value * ((i % SIDE) + 0.5);
    y += value * (Math.floor(i / SIDE) + 0.5);
  });
  return { x: x / mass, y: y / mass };
}

/** From a point to a line between two others. */
function distance(point, from, to) {
  const [dx, dy] = [to.x - from.x, to.y - from.y];
  const along = ((point.x - from.x) * dx + (point.y - from.y) * dy) / (dx * dx + dy * dy || 1);
  const share = Math.max(0, Math.min(1, along));
  return Math.hypot(point.x - from.x - share * dx, point.y - from.y - share * dy);
}
