// Numbers and times as people read them.

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const CLOCK = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const DAY = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });

export const NONE = "–";

export const count = (value) => (value == null ? NONE : WHOLE.format(value));

/** Three digits or so. */
export function rate(value) {
  if (value == null) return NONE;
  return value >= 100 || value === 0 ? WHOLE.format(value) : value.toFixed(value >= 10 ? 1 : 2);
}

/** Seconds as ms below a second. */
export function duration(seconds) {
  if (seconds == null) return NONE;
  if (seconds >= 1) return `${seconds.toFixed(seconds >= 10 ? 0 : 2)} s`;
  const ms = seconds * 1000;
  return `${ms.toFixed(ms >= 100 ? 0 : ms >= 10 ? 1 : 2)} ms`;
}

export function percent(part) {
  if (part == null || Number.isNaN(part)) return NONE;
  const value = part * 100;
  return `${value.toFixed(value >= 10 || value === 0 ? 0 : value >= 1 ? 1 : 2)} %`;
}

export const ratio = (value) => (value == null ? NONE : value.toFixed(2));

export function bytes(number) {
  let value = number;
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (value < 1024) return `${value.toFixed(unit === "B" ? 0 : 1)} ${unit}`;
    value /= 1024;
  }
  return `${value.toFixed(1)} TiB`;
}

/** Clock time, with the day when it is not today. */
export function clock(seconds, now = new Date()) {
  const date = new Date(seconds * 1000);
  const time = CLOCK.format(date);
  return date.toDateString() === now.toDateString() ? time : `${DAY.format(date)} ${time}`;
}

export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;
