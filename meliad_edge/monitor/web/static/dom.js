// Texts come from cameras and data sets and may be hostile: they are only ever set as text.

export function byId(id) {
  return document.getElementById(id);
}

export function clone(templateId) {
  return byId(templateId).content.firstElementChild.cloneNode(true);
}

export function fieldsOf(root) {
  const fields = {};
  for (const element of root.querySelectorAll("[data-field]")) fields[element.dataset.field] = element;
  return fields;
}

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function svg(tag, attributes = {}) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// Leaves what is the same untouched: screen readers and selections notice every change.
export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

export function setState(target, { state, word }) {
  if (target.dataset.state !== state) target.dataset.state = state;
  setText(target, word);
}

export function setFacts(list, facts) {
  const parts = [];
  for (const [term, description] of facts) parts.push(element("dt", {}, term), element("dd", {}, description));
  list.replaceChildren(...parts);
}
