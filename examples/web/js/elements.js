// Small parts of the page, and what they say.

/**
 * The element that index.html calls so.
 * @param {string} id
 * @returns {HTMLElement}
 */
export function byId(id) {
  return document.getElementById(id);
}

/**
 * A new element.
 * @param {string} tag
 * @param {Object<string, any>} properties - of the element; `attributes` are set as such
 * @param {...(Node | string)} children
 * @returns {HTMLElement}
 */
export function element(tag, { attributes = {}, ...properties } = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/**
 * Radio buttons, added to a fieldset.
 * @param {HTMLElement} fieldset
 * @param {string} name - of the group
 * @param {Map<string, string>} texts - value -> what the reader sees
 * @param {(value: string) => void} chosen - called with every choice that the reader makes
 * @returns {{value: string | null}} the choice at present; it can be set
 */
export function choices(fieldset, name, texts, chosen) {
  const buttons = [...texts].map(([value, text]) => {
    const button = element("input", { type: "radio", name, value, onchange: () => chosen(value) });
    fieldset.append(element("label", { className: "choice" }, button, element("span", { attributes: { "data-text": text } }, text)));
    return button;
  });
  return {
    get value() {
      return buttons.find((button) => button.checked)?.value ?? null;
    },
    set value(value) {
      for (const button of buttons) button.checked = button.value === value;
    },
  };
}

const notes = new WeakMap(); // a control -> where it says why it is grey

/**
 * Make a control grey and let it say why, for everybody to read; or give it back.
 * @param {HTMLElement} control - in the page
 * @param {string} why - empty: it can be used
 */
export function grey(control, why) {
  if (!notes.has(control)) {
    const note = element("span", { className: "why", id: `why-${control.id}` });
    if (control.tagName === "FIELDSET") control.after(note);
    else control.parentElement.append(note);
    control.setAttribute("aria-describedby", note.id);
    notes.set(control, note);
  }
  control.disabled = why !== "";
  notes.get(control).textContent = why;
}

/**
 * A share in 0..1 as people read it.
 * @param {number} share
 * @param {number} digits - behind the point
 * @returns {string}
 */
export function percent(share, digits = 0) {
  return `${(100 * share).toFixed(digits)}\u00a0%`;
}

/**
 * Runs a task again where it was asked for meanwhile, but never twice at once: what it shows is always the newest.
 * @param {() => Promise<void>} task
 * @returns {() => Promise<void>}
 */
export function newest(task) {
  let [running, asked] = [false, false];
  return async () => {
    asked = true;
    if (running) return;
    running = true;
    try {
      while (asked) {
        asked = false;
        await task();
      }
    } finally {
      running = false;
    }
  };
}
