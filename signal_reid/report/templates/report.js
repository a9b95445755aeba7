"use strict";
// What a page does beyond showing: colours, enlarged pictures, switches, values of curves, filters of queries.
// Text from the run is only ever set as text, never as markup.

const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const make = (tag, properties, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
for (const element of all("[data-needs-script]")) element.hidden = false;

// Colours: the reader's system decides until a button is pressed.
const themes = all("[data-theme-choice]");
for (const button of themes) {
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = button.dataset.themeChoice;
    for (const other of themes) other.setAttribute("aria-pressed", other === button);
  });
}

// Enlarged pictures: a dialog that steps through the pictures of one list.
const dialog = document.getElementById("enlarged");
const large = dialog.querySelector(".large");
let shown = null;

function neighbour(step) {
  const group = all("[data-enlarge]", shown.closest("[data-group]") ?? shown.parentElement);
  return group[group.indexOf(shown) + step];
}

function enlarge(button) {
  const source = button.matches(".small") ? button.closest(".picture").querySelector(".drawing") : button;
  const copies = [...source.cloneNode(true).children];
  const parts = source.matches(".stack") ? [make("div", { className: "stack" }, ...copies)] : copies;
  const image = source.querySelector("img");
  if (image) large.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
  for (const element of parts.flatMap((part) => [part, ...all("[id]", part)])) element.removeAttribute("id");
  shown = button;
  large.replaceChildren(...parts);
  document.getElementById("enlarged-title").textContent = source.dataset.caption;
  for (const step of all("[data-step]", dialog)) step.disabled = !neighbour(Number(step.dataset.step));
  if (!dialog.open) dialog.showModal();
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-enlarge]");
  if (button) enlarge(button);
});
dialog.addEventListener("click", (event) => {
  const step = event.target.closest("[data-step]");
  if (step) enlarge(neighbour(Number(step.dataset.step)));
  else if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
});
dialog.addEventListener("keydown", (event) => {
  const next = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (next && neighbour(next)) enlarge(neighbour(next));
});
dialog.addEventListener("close", () => shown?.focus());

// One picture of a group is reached by Tab, the others by the arrow keys.
for (const group of all("[data-group]")) {
  const buttons = all("[data-enlarge]", group);
  const reach = (chosen) => buttons.forEach((button) => { button.tabIndex = button === chosen ? 0 : -1; });
  reach(buttons[0]);
  group.addEventListener("focusin", (event) => { if (buttons.includes(event.target)) reach(event.target); });
  group.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const next = step && buttons[buttons.indexOf(event.target) + step];
    if (!next || !buttons.includes(event.target)) return;
    event.preventDefault();
    next.focus();
  });
}

// Switches of the marks over a picture.
for (const switches of all(".switches")) {
  const show = () => {
    for (const box of all("input", switches)) {
      const marks = all(`svg [data-marks="${box.dataset.marks}"]`, switches.closest(".picture"));
      for (const element of marks) element.toggleAttribute("hidden", !box.checked);
    }
  };
  switches.addEventListener("change", show);
  show();
}

// Values of curves: under the pointer, or by a slider that any keyboard moves.
for (const chart of all("svg[data-hover]")) {
  const hover = JSON.parse(chart.dataset.hover);
  const line = document.createElementNS(chart.namespaceURI, "line");
  const slider = make("input", { type: "range", min: 0, max: hover.x.length - 1, step: 1, value: hover.x.length - 1 });
  const output = make("output", {});
  const read = () => {
    const at = Number(slider.value);
    for (const end of ["x1", "x2"]) line.setAttribute(end, hover.place[at]);
    const values = hover.curves.map(([name, shown]) => `${name} ${shown[at]}`);
    output.textContent = `${hover.label} ${hover.x[at]}: ${values.join(", ")}`;
    slider.setAttribute("aria-valuetext", output.textContent);
  };
  line.setAttribute("class", "cursor");
  line.setAttribute("y1", hover.top);
  line.setAttribute("y2", hover.bottom);
  chart.append(line);
  const label = make("label", {}, `value at ${hover.label}`, slider);
  chart.parentElement.after(make("div", { className: "reading" }, label, output));
  slider.addEventListener("input", read);
  chart.addEventListener("pointermove", (event) => {
    const place = (event.offsetX / chart.clientWidth) * chart.viewBox.baseVal.width;
    const gaps = hover.place.map((x) => Math.abs(x - place));
    slider.value = gaps.indexOf(Math.min(...gaps));
    read();
  });
  read();
}

// Filters: what carries the class `query` is shown, hidden and ordered by what its attributes say.
const form = document.querySelector(".filters");
const unknownLast = (value, last) => (Number.isNaN(value) ? last : value);
const orders = {
  worst: (a, b) => unknownLast(a.precision, 2) - unknownLast(b.precision, 2),
  best: (a, b) => unknownLast(b.precision, -1) - unknownLast(a.precision, -1),
  name: (a, b) => a.name.localeCompare(b.name),
};
const lists = all("[data-filtered]").map((parent) => ({
  parent,
  items: [...parent.children].map((element, place) => ({
    element, place,
    name: element.dataset.name,
    precision: Number.parseFloat(element.dataset.precision),
    camera: element.dataset.camera,
    identity: element.dataset.identity,
  })),
}));

function filter() {
  const { order, camera, identity, text } = Object.fromEntries(new FormData(form));
  const counts = lists.map(({ parent, items }) => {
    const ordered = [...items].sort((a, b) => (orders[order]?.(a, b) || a.place - b.place));
    for (const item of ordered) {
      item.element.hidden = (camera && item.camera !== camera) || (identity && item.identity !== identity) ||
        !item.name.toLowerCase().includes(text.toLowerCase());
    }
    parent.append(...ordered.map((item) => item.element));
    return `${items.filter((item) => !item.element.hidden).length} of ${items.length} ${parent.dataset.filtered}`;
  });
  form.querySelector("output").textContent = `Showing ${counts.join(", ")}.`;
}

if (form) {
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));
  filter();
}
