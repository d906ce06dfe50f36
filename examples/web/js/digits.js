// Digits and images: reading them from a file, and laying two into one, as examples/multi_mnist.py does.

/**
 * @typedef {object} Digit
 * @property {number | null} label - what it is; null where nobody has said
 * @property {Uint8Array} pixels - 28 x 28, row by row, 0..255
 */

export const SIDE = 28; // pixels, of a digit and of an image
const PIXELS = SIDE * SIDE;
const CANVAS = 36; // pixels, before two shifted digits are resized
const SHIFT = 6; // pixels, down and to the right, of the right digit against the left one
const MEAN = 0.1307; // of MNIST's pixels in 0..1
const DEVIATION = 0.3081;

/**
 * The digits in a file of records: a byte for the label, and the pixels.
 * @param {string} address
 * @returns {Promise<Digit[]>}
 */
export async function readDigits(address) {
  const bytes = new Uint8Array(await (await fetched(address)).arrayBuffer());
  const record = 1 + PIXELS;
  return Array.from({ length: bytes.length / record }, (_, i) => ({
    label: bytes[i * record],
    pixels: bytes.subarray(i * record + 1, (i + 1) * record),
  }));
}

/**
 * The answer to a request for a file of the page.
 * @param {string} address
 * @returns {Promise<Response>}
 */
export async function fetched(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`${address} is missing (${answer.status})`);
  return answer;
}

/**
 * Two digits on top of each other: their mean, in 0..255.
 * @param {Digit} first
 * @param {Digit} second
 * @returns {Float32Array}
 */
export function overlay(first, second) {
  return Float32Array.from(first.pixels, (value, i) => (value + second.pixels[i]) / 2);
}

/**
 * Two digits side by side, so close that they overlap: the brighter of the two at each pixel, in 0..255.
 * @param {Digit} left
 * @param {Digit} right - lies lower
 * @returns {Float32Array}
 */
export function compose(left, right) {
  const at = (digit, row, column) =>
    row >= 0 && row < SIDE && column >= 0 && column < SIDE ? digit.pixels[row * SIDE + column] : 0;
  const nearest = (i) => Math.floor(((i + 0.5) * CANVAS) / SIDE);
  return Float32Array.from({ length: PIXELS }, (_, i) => {
    const row = nearest(Math.floor(i / SIDE));
    const column = nearest(i % SIDE);
    return Math.max(at(left, row, column), at(right, row - SHIFT, column - SHIFT));
  });
}

/**
 * Images as the networks take them: (number, 1, 28, 28), normalised.
 * @param {Float32Array[]} images - pixels in 0..255
 * @returns {{data: Float32Array, dims: number[]}}
 */
export function batch(images) {
  const data = new Float32Array(images.length * PIXELS);
  images.forEach((image, i) =>
    data.set(
      image.map((value) => (value / 255 - MEAN) / DEVIATION),
      i * PIXELS,
    ),
  );
  return { data, dims: [images.length, 1, SIDE, SIDE] };
}

/**
 * Paint an image on a canvas of 28 x 28.
 * @param {HTMLCanvasElement} canvas
 * @param {ArrayLike<number>} image - pixels in 0..255
 */
export function paint(canvas, image) {
  const picture = new ImageData(SIDE, SIDE);
  for (let i = 0; i < PIXELS; i++) picture.data.set([image[i], image[i], image[i], 255], 4 * i);
  canvas.getContext("2d").putImageData(picture, 0, 0);
}
