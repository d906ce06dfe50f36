// Pictures of the units that an instruction turns on.

import { element } from "./elements.js";

/**
 * A picture of one layer's units.
 * @param {object} site - its name and shape, and by task a string with 1 for each unit that is on
 * @param {string[]} tasks
 * @returns {{figure: HTMLElement, show: (task: number) => void}}
 */
export function unitsOf(site, tasks) {
  const places = layout(site.shape);
  const canvas = element("canvas", { ...places.size, className: "units-map", attributes: { role: "img" } });
  const caption = element("figcaption");
  const figure = element("figure", {}, canvas, caption);

  function show(task) {
    const [here, there] = [site[tasks[task]], site[tasks[1 - task]]];
    const kinds = Array.from(here, (on, i) => (on === "0" ? "off" : there[i] === "1" ? "both" : "only"));
    const style = getComputedStyle(document.documentElement);
    const colours = { off: "--unit-off", both: "--unit-both", only: task ? "--right" : "--left" };
    const context = canvas.getContext("2d");
    kinds.forEach((kind, i) => {
      context.fillStyle = style.getPropertyValue(colours[kind]);
      context.fillRect(...places.at(i), 1, 1);
    });
    document.documentElement.style.setProperty("--unit-only", style.getPropertyValue(colours.only));
    const [on, alone] = [kinds.filter((kind) => kind !== "off").length, kinds.filter((kind) => kind === "only").length];
    caption.textContent = `${site.name}: ${on} of ${kinds.length} units are on, ${alone} of them for “${tasks[task]}” only`;
    canvas.setAttribute("aria-label", caption.textContent);
  }

  return { figure, show };
}

/** Where units are painted: maps (channels, height, width) beside each other, other layers as a square. */
function layout(shape) {
  const [channels, height, width] = shape.length === 3 ? shape : [1, ...square(shape.reduce((a, b) => a * b))];
  const across = square(channels)[1];
  const down = Math.ceil(channels / across);
  return {
    size: { width: across * (width + 1) - 1, height: down * (height + 1) - 1 },
    at: (i) => {
      const [channel, unit] = [Math.floor(i / (height * width)), i % (height * width)];
      const [row, column] = [Math.floor(channel / across), channel % across];
      return [column * (width + 1) + (unit % width), row * (height + 1) + Math.floor(unit / width)];
    },
  };
}

/** Rows and columns for a number of things, about as many of the one as of the other. */
function square(number) {
  const columns = Math.ceil(Math.sqrt(number));
  return [Math.ceil(number / columns), columns];
}
