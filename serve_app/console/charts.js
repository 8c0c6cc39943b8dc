// Small SVG charts and the icicle of prefixes. Nothing here fetches; text goes in as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";

function node(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Lines over time. series: [{values, className}], null values leave a gap; marks: horizontal lines. */
export function lines(svg, times, series, { format, top = null, marks = [], now }) {
  const width = Math.max(svg.clientWidth, 200), height = Math.max(svg.clientHeight, 100);
  const left = 62, bottom = 18, right = 6, head = 8;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const all = series.flatMap((one) => one.values).filter((value) => value !== null);
  const max = top ?? Math.max(...all, ...marks, 0) * 1.05;
  const first = times.find((_, i) => series.some((one) => one.values[i])) ?? now;
  const span = Math.min(Math.max((now - first) * 1.1, 300), 3600), begin = now - span;
  const x = (time) => left + ((time - begin) / span) * (width - left - right);
  const y = (value) => height - bottom - (max ? value / max : 0) * (height - bottom - head);
  const parts = [];
  for (const share of [0, 0.5, 1]) {
    const at = y(max * share);
    parts.push(node("line", { class: "grid", x1: left, x2: width - right, y1: at, y2: at }));
    parts.push(node("text", { x: left - 5, y: at + 4, "text-anchor": "end" }, format(max * share)));
  }
  for (const [share, anchor] of [[1, "start"], [0.5, "middle"], [0, "end"]]) {
    const label = share ? `${Math.round((span * share) / 60)} min ago` : "now";
    parts.push(node("text", { x: x(now - span * share), y: height - 4, "text-anchor": anchor }, label));
  }
  for (const mark of marks) parts.push(node("path", { class: "l3", d: `M${left} ${y(mark)}H${width - right}` }));
  if (!all.length) parts.push(node("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing yet"));
  for (const { values, className } of series) parts.push(node("path", { class: className, d: path(times, values, x, y, begin) }));
  svg.replaceChildren(...parts);
}

function path(times, values, x, y, begin) {
  let drawn = "", up = true;
  for (let i = 0; i < times.length; i++) {
    if (values[i] === null || times[i] < begin) { up = true; continue; }
    const at = `${x(times[i]).toFixed(1)} ${y(values[i]).toFixed(1)}`;
    drawn += up ? `M${at}h.1` : `L${at}`;  // a lone value shows as a dot
    up = false;
  }
  return drawn;
}

/** Points (x on a log scale) joined by a line; one of them is where we are now. */
export function curve(svg, points, { formatX, formatY, now, ceiling }) {
  const width = Math.max(svg.clientWidth, 200), height = Math.max(svg.clientHeight, 100);
  const left = 40, bottom = 20, right = 34, head = 18;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  if (!points.length) {
    svg.replaceChildren(node("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "no look-ups yet"));
    return;
  }
  const low = Math.log(points[0].x), high = Math.log(points.at(-1).x) || low + 1;
  const max = Math.max(ceiling ?? 0, ...points.map((point) => point.y), 0.01);
  const x = (value) => left + ((Math.log(value) - low) / (high - low || 1)) * (width - left - right);
  const y = (value) => height - bottom - (value / max) * (height - bottom - head);
  const parts = [];
  if (ceiling !== null && ceiling !== undefined) {
    parts.push(node("path", { class: "l3", d: `M${left} ${y(ceiling)}H${width - right}` }));
    parts.push(node("text", { x: left + 4, y: y(ceiling) - 4 }, `${formatY(ceiling)} with room for everything`));
  }
  parts.push(node("path", { class: "l1", d: points.map((p, i) => `${i ? "L" : "M"}${x(p.x)} ${y(p.y)}`).join("") }));
  for (const point of points) {
    parts.push(node("circle", { class: point.x === now ? "now" : "", cx: x(point.x), cy: y(point.y), r: 3.5 }));
    parts.push(node("text", { x: x(point.x), y: y(point.y) + 16, "text-anchor": "middle" }, formatY(point.y)));
    parts.push(node("text", { x: x(point.x), y: height - 4, "text-anchor": "middle" }, formatX(point.x)));
  }
  svg.replaceChildren(...parts);
}

const LEVEL_REM = 1.65;

/** Boxes whose width is their share of look-ups. Returns how many levels there are. */
export function icicle(box, roots, tiers, tell) {
  const made = [], total = roots.reduce((sum, root) => sum + root.hits, 0);
  let deepest = 0;
  const place = (prefix, from, width, level) => {
    if (width < 0.004) return;
    deepest = Math.max(deepest, level + 1);
    const button = document.createElement("button");
    const share = prefix.blocks ? prefix.resident_blocks / prefix.blocks : 0;
    button.className = share ? `t${Math.min(Math.max(tiers.indexOf(prefix.storage), 0), 3)}` : "gone";
    button.style.left = `${from * 100}%`;
    button.style.width = `${width * 100}%`;
    button.style.top = `${level * LEVEL_REM}rem`;
    button.style.opacity = share ? 0.45 + 0.55 * share : "";
    button.textContent = `${prefix.blocks} blocks`;
    button.title = tell(prefix);
    button.addEventListener("click", () => box.dispatchEvent(new CustomEvent("told", { detail: tell(prefix) })));
    made.push(button);
    let at = from;
    for (const child of prefix.children) {
      const part = (child.hits / prefix.hits) * width;
      place(child, at, part, level + 1);
      at += part;
    }
  };
  let at = 0;
  for (const root of roots) {
    const width = total ? root.hits / total : 0;
    place(root, at, width, 0);
    at += width;
  }
  box.style.height = `${Math.max(deepest, 1) * LEVEL_REM}rem`;
  box.replaceChildren(...made);
}
