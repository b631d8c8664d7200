// A scale of colours that is even to the eye, from "next to nothing" (near the background) to "much".
//
// Anchors are in Oklch (B. Ottosson, "A perceptual color space for image processing", 2020). The path between them is
// walked in steps of equal distance in Oklab, so equal differences of value look equally different in either theme.

const ANCHORS = {
  light: [[0.965, 0.012, 110], [0.86, 0.085, 150], [0.66, 0.105, 195], [0.46, 0.105, 250], [0.27, 0.11, 285]],
  dark: [[0.235, 0.02, 265], [0.38, 0.1, 275], [0.54, 0.105, 235], [0.72, 0.115, 175], [0.93, 0.13, 105]],
};
const SIZE = 256;
const FINE = 4096;

/** 256 colours of a theme as [r, g, b], 0 to 255. */
export function ramp(theme) {
  const anchors = ANCHORS[theme].map(([lightness, chroma, hue]) => {
    const angle = (hue * Math.PI) / 180;
    return [lightness, chroma * Math.cos(angle), chroma * Math.sin(angle)];
  });
  const path = Array.from({ length: FINE + 1 }, (_, step) => along(anchors, step / FINE));
  const lengths = [0];
  for (let step = 1; step <= FINE; step += 1) lengths.push(lengths[step - 1] + distance(path[step - 1], path[step]));
  let step = 0;
  return Array.from({ length: SIZE }, (_, index) => {
    const wanted = (index / (SIZE - 1)) * lengths[FINE];
    while (lengths[step] < wanted && step < FINE) step += 1;
    return toRgb(path[step]);
  });
}

/** A point of a smooth curve through the anchors (Catmull-Rom); part is 0 to 1. */
function along(anchors, part) {
  const position = part * (anchors.length - 1);
  const index = Math.min(Math.floor(position), anchors.length - 2);
  const t = position - index;
  const at = (i) => anchors[Math.min(Math.max(i, 0), anchors.length - 1)];
  const [p0, p1, p2, p3] = [at(index - 1), at(index), at(index + 1), at(index + 2)];
  return p1.map((_, axis) => {
    const [a, b, c, d] = [p0[axis], p1[axis], p2[axis], p3[axis]];
    return 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t * t + (3 * b - a - 3 * c + d) * t * t * t);
  });
}

function distance(one, other) {
  return Math.hypot(...one.map((value, axis) => value - other[axis]));
}

/** Oklab to sRGB; matrices of the source. */
function toRgb([lightness, a, b]) {
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ].map((linear) => {
    const clipped = Math.min(1, Math.max(0, linear));
    return Math.round(255 * (clipped <= 0.0031308 ? 12.92 * clipped : 1.055 * clipped ** (1 / 2.4) - 0.055));
  });
}

export const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;

/** Black or white, whichever stands out (relative luminance, WCAG 2). */
export function inkOn(rgb) {
  const [r, g, b] = rgb.map((value) => {
    const part = value / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#000" : "#fff";
}
