"use strict";
// The page is whole without this script: it makes figures answer, and tables be sorted, cut and copied.
const contents = (id) => JSON.parse(document.getElementById(id).textContent);

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function drawFigures() {
  const specs = contents("figures");
  for (const place of document.querySelectorAll("[data-figure]")) {
    const inside = element("div", {});
    vegaEmbed(inside, specs[place.dataset.figure], { renderer: "svg", actions: false })
      .then(() => { place.replaceChildren(inside); place.dataset.drawn = "yes"; })
      .catch((error) => console.error(place.dataset.figure, error));
  }
}

// Numbers as they are shown: "87.1 ≈", "−3.2", "1,024", "1.2 GB"; what is missing comes last.
function sortKey(text) {
  const scales = { k: 1e3, M: 1e6, G: 1e9, T: 1e12, P: 1e15 };
  const match = text.replace(/−/g, "-").replace(/,/g, "").match(/^[<]?\s*([+-]?[0-9]*[.]?[0-9]+(?:e[+-]?[0-9]+)?)\s*([kMGTP]?)/);
  return match ? Number(match[1]) * (scales[match[2]] || 1) : text;
}

function makeSortable(table) {
  for (const header of table.tHead.rows[table.tHead.rows.length - 1].cells) {
    const button = element("button", { type: "button" }, ...header.childNodes);
    header.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = header.getAttribute("aria-sort") === "descending";
      for (const other of header.parentNode.cells) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", down ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      const key = (row) => sortKey(row.cells[header.cellIndex].textContent.trim());
      rows.sort((first, second) => {
        const [a, b] = [key(first), key(second)];
        if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
        const order = a < b ? -1 : a > b ? 1 : 0;
        return down ? order : -order;
      });
      table.tBodies[0].append(...rows);
    });
  }
}

function choices(title, names, change) {
  const boxes = names.map((name, position) => {
    const box = element("input", { type: "checkbox", checked: true });
    box.addEventListener("change", () => change(position, box.checked));
    return element("label", {}, box, " ", name);
  });
  return element("details", {}, element("summary", {}, title), ...boxes);
}

function makeChoosable(table, controls) {
  const headers = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  const groups = table.tHead.rows.length > 1 ? table.tHead.rows[0] : null;
  const rows = [...table.tBodies[0].rows];
  if (rows.length < 3 && headers.length < 4) return;
  const names = rows.map((row) => [...row.cells].filter((cell) => cell.classList.contains("text")).map((cell) => cell.textContent.trim()).join(", "));
  controls.append(choices("Choose rows", names, (row, shown) => { rows[row].hidden = !shown; }));
  controls.append(choices("Choose columns", headers.slice(1).map((cell) => cell.textContent.trim()), (column, shown) => {
    for (const row of [headers[0].parentNode, ...rows]) row.cells[column + 1].hidden = !shown;
    if (groups) groups.hidden = headers.some((cell) => cell.hidden); // its cells span several
  }));
}

function copyText(text, button) {
  const said = button.textContent;
  const done = () => { button.textContent = "Copied"; setTimeout(() => { button.textContent = said; }, 1500); };
  const byHand = () => {
    const area = element("textarea", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    done();
  };
  if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, byHand); else byHand();
}

function equipTables() {
  const texts = contents("texts");
  for (const place of document.querySelectorAll("[data-table]")) {
    const table = place.querySelector("table");
    const controls = element("div", { className: "controls" });
    for (const [ending, title] of [["md", "Copy as Markdown"], ["tex", "Copy as LaTeX"]]) {
      const button = element("button", { type: "button" }, title);
      button.dataset.copy = ending;
      button.addEventListener("click", () => copyText(texts[place.dataset.table][ending], button));
      controls.append(button);
    }
    makeChoosable(table, controls);
    makeSortable(table);
    place.before(controls);
  }
}

function equipSections() {
  for (const section of document.querySelectorAll("[data-choose]")) {
    const options = [...section.querySelectorAll("[data-option]")];
    const select = element("select", {}, ...options.map((option) => element("option", {}, option.dataset.option)));
    const show = () => options.forEach((option, position) => { option.hidden = position !== select.selectedIndex; });
    select.addEventListener("change", show);
    section.querySelector("h2").after(element("p", { className: "controls" }, element("label", {}, section.dataset.choose, ": ", select)));
    show();
  }
}

equipTables();
equipSections();
drawFigures();
