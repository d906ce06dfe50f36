// A table of what a network thinks of each class.

import { element, percent } from "./elements.js";
import { winner } from "./networks.js";

export class Predictions {
  /**
   * @param {HTMLElement} root - is filled
   * @param {string} caption
   * @param {string[]} columns - what each run of the network is called
   */
  constructor(root, caption, columns) {
    const head = element("tr", {}, headCell("digit", "col"), ...columns.map((column) => headCell(column, "col")));
    this.rows = Array.from({ length: 10 }, (_, label) => {
      const cells = columns.map(() => {
        const bar = element("span", { className: "bar" });
        const share = element("span", { className: "share" });
        return { bar, share, cell: element("td", {}, element("span", { className: "track" }, bar), share) };
      });
      const name = headCell(String(label), "row");
      return { name, cells, row: element("tr", {}, name, ...cells.map(({ cell }) => cell)) };
    });
    const rows = this.rows.map(({ row }) => row);
    const title = element("caption", {}, `${caption}.`, mark(), "is in the image.");
    const body = element("tbody", {}, ...rows);
    root.append(element("table", { className: "predictions" }, title, element("thead", {}, head), body));
  }

  /** There is nothing to show. */
  clear() {
    for (const { name, cells } of this.rows) {
      name.replaceChildren(name.firstChild);
      for (const { bar, share, cell } of cells) {
        bar.style.width = 0;
        share.textContent = "–";
        cell.classList.remove("winner");
      }
    }
  }

  /**
   * @param {number[][]} runs - the probabilities of each run
   * @param {(number | null)[]} present - the digits that are in the image
   */
  show(runs, present) {
    const winners = runs.map(winner);
    this.rows.forEach(({ name, cells }, label) => {
      name.replaceChildren(String(label), ...(present.includes(label) ? [mark(), inWords()] : []));
      cells.forEach(({ bar, share, cell }, run) => {
        bar.style.width = percent(runs[run][label], 1).replace("\u00a0", "");
        share.textContent = percent(runs[run][label]);
        cell.classList.toggle("winner", winners[run] === label);
      });
    });
  }
}

/** Marks the digits that are in the image. */
function mark() {
  return element("span", { className: "mark", attributes: { "aria-hidden": "true" } }, "●");
}

/** What the mark says, for those who do not see it. */
function inWords() {
  return element("span", { className: "unseen" }, " in the image");
}

function headCell(text, scope) {
  return element("th", { scope }, text);
}
