// <ref>the cup</ref><box>(12, 34), (567, 890)</box>: corners in thousandths of the picture's sides.
// The same form as runtime/requests/boxes.py reads.

const NUMBER = String.raw`\s*(-?\d+(?:\.\d+)?)\s*`;
const BOX = new RegExp(
  String.raw`(?:<ref>([^<]*)</ref>\s*)?<box>\s*\(${NUMBER},${NUMBER}\)\s*,\s*\(${NUMBER},${NUMBER}\)\s*</box>`,
  "g",
);
const SIDE = 1000;
const SVG = "http://www.w3.org/2000/svg"; // a name, which nobody fetches

function boxesOf(text) {
  return [...text.matchAll(BOX)].map(([, ref, ...corners]) => {
    const [x1, y1, x2, y2] = corners.map((each) => Math.min(SIDE, Math.max(0, Number(each))));
    const [left, right, top, bottom] = [Math.min(x1, x2), Math.max(x1, x2), Math.min(y1, y2), Math.max(y1, y2)];
    return { ref: ref ?? "", left, top, width: right - left, height: bottom - top };
  });
}

// Over a picture: `frame` holds its image. Earlier boxes go.
function drawBoxes(frame, boxes) {
  frame.querySelectorAll("svg, span").forEach((each) => each.remove());
  if (boxes.length === 0) return;
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${SIDE} ${SIDE}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `Boxes: ${boxes.map((box) => box.ref || "without a name").join(", ")}`);
  frame.append(svg);
  for (const { ref, left, top, width, height } of boxes) {
    const rect = document.createElementNS(SVG, "rect");
    const places = { x: left, y: top, width, height };
    Object.entries(places).forEach(([name, value]) => rect.setAttribute(name, value));
    svg.append(rect);
    if (ref) frame.append(labelAt(ref, left, top));
  }
}

function labelAt(ref, left, top) {
  const label = make("span", "", ref);
  label.style.left = `${left / 10}%`;
  label.style.top = `${top / 10}%`;
  return label;
}
