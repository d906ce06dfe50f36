// A network that learns: the loop that fxfeedback.runtime.Learner runs in Python.

import { fetched } from "./digits.js";
import { copy, floats, integers, open } from "./networks.js";
import { readSafetensors } from "./safetensors.js";

const NEW = ".new"; // ends the name of an output that takes the place of an input in the next step
const TASKS = 2;

export class Learner {
  /**
   * A learner from the files of make_models.py: a step, a prediction, and the weights to start from.
   * @param {string} folder
   * @returns {Promise<Learner>}
   */
  static async open(folder) {
    const [step, prediction, weights] = await Promise.all([
      open(`${folder}/learner_step.onnx`),
      open(`${folder}/learner_predict.onnx`),
      fetched(`${folder}/weights.safetensors`).then((answer) => answer.arrayBuffer()),
    ]);
    return new Learner(step, prediction, readSafetensors(weights));
  }

  constructor(step, prediction, weights) {
    this.stepping = step;
    this.predicting = prediction;
    const shapes = new Map(step.inputMetadata.map(({ name, shape }) => [name, shape]));
    this.changing = step.outputNames.filter((name) => name.endsWith(NEW)).map((name) => name.slice(0, -NEW.length));
    this.start = new Map(this.changing.map((name) => [name, weights.get(name) ?? zeros(shapes.get(name))]));
    this.reset();
  }

  /** Forget what was learned here, and what the optimizer keeps. */
  reset() {
    this.state = this.start;
  }

  /**
   * One step of learning: a pass down from the instructions, one up from the images, one down from the error.
   * @param {{data: Float32Array, dims: number[]}} images - (batch, 1, 28, 28)
   * @param {number[]} labels - (batch,)
   * @param {number[]} tasks - (batch,) 0: the label is the left digit's; 1: the right one's
   * @param {number} rate - of learning
   * @returns {Promise<number>} the loss before the step
   */
  async step(images, labels, tasks, rate) {
    const results = await this.stepping.run({
      ...this.inputs(this.stepping, images, tasks),
      target: integers(labels),
      lr: floats([rate], []),
    });
    this.state = new Map(this.changing.map((name) => [name, results[name + NEW]]));
    return results.loss.data[0];
  }

  /**
   * What the network reads now.
   * @param {{data: Float32Array, dims: number[]}} images - (batch, 1, 28, 28)
   * @param {number} task - 0: the left digit; 1: the right one
   * @returns {Promise<ort.Tensor>} logits (batch, 10)
   */
  async predict(images, task) {
    const tasks = Array(images.dims[0]).fill(task);
    return (await this.predicting.run(this.inputs(this.predicting, images, tasks))).prediction;
  }

  /** The images, the instructions, and of the weights and the optimizer's state what this file takes. */
  inputs(session, images, tasks) {
    const oneHot = tasks.flatMap((task) => Array.from({ length: TASKS }, (_, i) => Number(i === task)));
    const given = {
      input: floats(images.data, images.dims),
      instruction: floats(oneHot, [tasks.length, TASKS]),
    };
    for (const name of session.inputNames) {
      const value = this.state.get(name);
      if (value) given[name] = copy(value);
    }
    return given;
  }
}

function zeros(dims) {
  return floats(new Float32Array(dims.reduce((a, b) => a * b, 1)), dims);
}
