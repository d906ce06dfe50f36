// Files in ONNX Runtime Web.

import * as ort from "../runtime/ort.wasm.bundle.min.mjs";
import { fetched } from "./digits.js";

ort.env.wasm.numThreads = 1; // more threads need headers that not every server sends
ort.env.wasm.proxy = true; // in a worker: the page answers while a network computes

/**
 * A network, ready to run.
 * @param {string} address - of an .onnx file
 * @returns {Promise<ort.InferenceSession>}
 */
export async function open(address) {
  return ort.InferenceSession.create(new Uint8Array(await (await fetched(address)).arrayBuffer()));
}

/**
 * The same values again: what is given to a network goes to the worker, and is gone from here.
 * @param {{type: string, data: ort.Tensor["data"], dims: number[]}} tensor
 * @returns {ort.Tensor}
 */
export function copy({ type, data, dims }) {
  return new ort.Tensor(type, data.slice(), dims);
}

/**
 * Numbers for a network, copied for the same reason.
 * @param {ArrayLike<number>} data
 * @param {number[]} dims
 * @returns {ort.Tensor}
 */
export function floats(data, dims) {
  return new ort.Tensor("float32", Float32Array.from(data), dims);
}

/**
 * Class ids for a network.
 * @param {number[]} ids
 * @returns {ort.Tensor}
 */
export function integers(ids) {
  return new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [ids.length]);
}

/**
 * The logits of a batch as probabilities.
 * @param {ort.Tensor} logits - (batch, classes)
 * @returns {number[][]}
 */
export function probabilities(logits) {
  const [rows, classes] = logits.dims;
  return Array.from({ length: rows }, (_, row) => {
    const values = Array.from(logits.data.subarray(row * classes, (row + 1) * classes));
    const highest = Math.max(...values);
    const powers = values.map((value) => Math.exp(value - highest));
    const sum = powers.reduce((a, b) => a + b);
    return powers.map((power) => power / sum);
  });
}

/**
 * Where the highest value stands.
 * @param {ArrayLike<number>} values
 * @returns {number}
 */
export function winner(values) {
  return Array.from(values).reduce((best, value, i) => (value > values[best] ? i : best), 0);
}
