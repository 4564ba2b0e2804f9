// Makes elements. All data goes through textContent: nothing that users store is ever read as HTML.

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") made.addEventListener("click", value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return made;
}

export function span(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

export const moment = (at) => (at ? new Date(at * 1000).toLocaleString() : "–");
export const counted = (value, one, many) => `${number(value)} ${value === 1 ? one : many}`;
export const number = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en"));
export const rate = (value) => (value === null || value === undefined ? "–" : value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 }));
export const place = (host, pid) => (host ? `${host}:${pid}` : "");

export function bytes(value) {
  if (value === null) return "–";
  for (const unit of ["B", "KiB", "MiB"]) {
    if (value < 1024) return `${Math.round(value)} ${unit}`;
    value /= 1024;
  }
  return `${value.toFixed(1)} GiB`;
}

// columns: [label, function of the row, class]
export function table(rows, columns, caption) {
  if (!rows.length) return element("p", { class: "empty" }, caption);
  const head = element("tr", {}, columns.map(([label, , kind]) => element("th", { scope: "col", class: kind }, label)));
  const body = rows.map((row) => element("tr", {}, columns.map(([label, cell, kind]) => {
    const content = cell(row);
    return element("td", { class: kind, "data-label": label }, content === "" ? [] : content);
  })));
  return element("table", {}, element("thead", {}, head), element("tbody", {}, body));
}

export function graph(title, rows, name) {
  const points = rows.filter((row) => row[name] !== null && row[name] !== undefined);
  const most = Math.max(1, ...points.map((row) => row[name]));
  const svgns = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(svgns, "svg");
  const end = points.length ? points[points.length - 1].at : 0;
  const width = points.length ? Math.max(60, end - points[0].at) : 60;
  svg.setAttribute("viewBox", `0 0 ${width.toFixed(0)} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  const last = points.length ? points[points.length - 1][name] : null;
  svg.setAttribute("aria-label", `${title}: now ${rate(last)}, at most ${rate(most)} in the last ${span(width)}`);
  if (points.length > 1) {
    const place = (row) => `${(width - (end - row.at)).toFixed(1)},${(98 - (row[name] / most) * 94).toFixed(1)}`;
    const line = `M${points.map(place).join("L")}`;
    const first = (width - (end - points[0].at)).toFixed(1);
    for (const [kind, d] of [["area", `${line}L${width.toFixed(1)},100L${first},100Z`], ["line", line]]) {
      const path = document.createElementNS(svgns, "path");
      path.setAttribute("class", kind);
      path.setAttribute("d", d);
      svg.append(path);
    }
  }
  return element("div", { class: "card" }, element("h2", {}, title), svg, element("small", {}, `now ${rate(last)} · at most ${rate(most)} · last ${span(width)}`));
}
