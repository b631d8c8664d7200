// Elements from text. Whatever comes from the server is put in as text, never as markup.

export const byId = (id) => document.getElementById(id);

/** An element with a class and children, each a node or text. */
export function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return made;
}

/** Set an element's text if it changed, so that nothing is drawn or spoken for nothing. */
export function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/** A bar with a part filled; `set(part)` takes 0 to 1. */
export function bar(label) {
  const fill = element("span", "fill");
  const root = element("span", "meter", fill);
  root.setAttribute("role", "meter");
  root.setAttribute("aria-label", label);
  root.setAttribute("aria-valuemin", "0");
  root.setAttribute("aria-valuemax", "100");
  return {
    root,
    set(part) {
      const percent = Math.round(Math.min(1, Math.max(0, part)) * 1000) / 10;
      fill.style.inlineSize = `${percent}%`;
      root.setAttribute("aria-valuenow", String(percent));
    },
  };
}

/** Keep one child of `container` for each item, in the items' order: made once, then updated. */
export function keyed(container, items, make) {
  const known = (container.known ??= new Map());
  const kept = new Set(items.map((item) => item.id));
  for (const [id, child] of known) {
    if (kept.has(id)) continue;
    child.root.remove();
    known.delete(id);
  }
  items.forEach((item, index) => {
    if (!known.has(item.id)) known.set(item.id, make(item));
    const child = known.get(item.id);
    if (container.children[index] !== child.root) container.insertBefore(child.root, container.children[index] ?? null);
    child.update(item);
  });
}
