// From words to what the network would show of what they name: a linear prior over the groups of letters in them.

/**
 * The groups of letters of a text, each word with a space on either side, as scikit-learn's "char_wb" makes them.
 * @param {string} text
 * @param {[number, number]} sizes - of the shortest and the longest group
 * @returns {string[]}
 */
export function groupsOf(text, [shortest, longest]) {
  const groups = [];
  for (const word of text.toLowerCase().split(/\s+/).filter(Boolean)) {
    const padded = ` ${word} `;
    for (let size = shortest; size <= longest; size++) {
      for (let at = 0; at === 0 || at + size <= padded.length; at++) groups.push(padded.slice(at, at + size));
      if (padded.length <= size) break;
    }
  }
  return groups;
}

/**
 * @param {string} text
 * @param {{bias: number[], sizes: [number, number], groups: Object<string, number[]>}} prior - words.json
 * @returns {{activation: number[], known: boolean}} what to steer with, and whether any group of letters is known
 */
export function readWords(text, prior) {
  const found = groupsOf(text, prior.sizes).filter((group) => Object.hasOwn(prior.groups, group));
  const activation = prior.bias.map((bias, i) => found.reduce((sum, group) => sum + prior.groups[group][i], bias));
  return { activation, known: found.length > 0 };
}
