// Lines of the last minutes, without axes: what they show is said beside them.

const SVG = "http://www.w3.org/2000/svg";
const GAP_S = 4; // longer between two looks: nobody looked, so nothing is drawn

/** Draw lines into an <svg>; each of `fields` of the looks is one, the first with an area below it. */
export function drawSpark(svg, looks, fields, spanSeconds) {
  const width = svg.clientWidth || 160;
  const height = svg.clientHeight || 32;
  const end = looks.at(-1)?.time_s ?? 0;
  const most = Math.max(...looks.flatMap((look) => fields.map((field) => look[field] ?? 0)), 0) || 1;
  const x = (time) => width - ((end - time) / spanSeconds) * width;
  const y = (value) => height - 1.5 - (value / most) * (height - 4);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren();
  fields.forEach((field, index) => {
    for (const run of runs(looks, field)) {
      const points = run.map((look) => `${x(look.time_s).toFixed(1)},${y(look[field]).toFixed(1)}`);
      if (index === 0) {
        const [first, last] = [x(run[0].time_s), x(run.at(-1).time_s)];
        append(svg, "path", `area`, `M${first.toFixed(1)},${height}L${points.join("L")}L${last.toFixed(1)},${height}Z`);
      }
      append(svg, "path", `line line-${index}`, `M${points.join("L")}`);
    }
  });
}

/** Stretches of looks that follow each other and know the field. */
function runs(looks, field) {
  const found = [];
  let before = null;
  for (const look of looks) {
    if (look[field] == null) {
      before = null;
      continue;
    }
    if (before === null || look.time_s - before.time_s > GAP_S) found.push([]);
    found.at(-1).push(look);
    before = look;
  }
  return found;
}

function append(svg, tag, className, path) {
  const made = document.createElementNS(SVG, tag);
  made.setAttribute("class", className);
  made.setAttribute("d", path);
  svg.append(made);
}
