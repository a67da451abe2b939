// What all parts of the page share: the data, elements made from it, and figures in words.
// Names from the data only ever become text nodes, never markup.

const report = JSON.parse(document.getElementById("report-data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function make(name, attributes = {}, ...content) {
  return fill(document.createElement(name), attributes, content);
}

function draw(name, attributes = {}, ...content) {
  return fill(document.createElementNS(SVG, name), attributes, content);
}

function fill(element, attributes, content) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...content);
  return element;
}

function bytesInWords(count) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
  let size = count, unit = 0;
  while (Math.abs(size) >= 1023.95 && unit + 1 < units.length) { size /= 1024; unit += 1; }
  if (unit === 0) return count === 1 ? "1 byte" : `${count} bytes`;
  return `${size.toFixed(1)} ${units[unit]}`;
}

function secondsInWords(seconds) {
  if (seconds < 0.0995) return `${Number((seconds * 1000).toPrecision(3))} ms`;
  if (seconds < 9.95) return `${Number(seconds.toPrecision(2))} s`;
  if (seconds < 100) return `${seconds.toFixed(0)} s`;
  if (seconds < 6000) return `${(seconds / 60).toFixed(0)} min`;
  return `${(seconds / 3600).toFixed(0)} h`;
}

function momentInWords(seconds) {
  const moment = new Date(seconds * 1000);
  return Number.isNaN(moment.getTime()) ? String(seconds) : moment.toISOString().slice(0, 19).replace("T", " ");
}

function count(number, one, several = `${one}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? one : several}`;
}

// Some `wanted` round numbers between two others, the ends included where they are round.
function roundValues(low, high, wanted, steps = [1, 2, 5, 10]) {
  const span = high - low || 1;
  const magnitude = 10 ** Math.floor(Math.log10(span / wanted));
  const unit = steps.map((step) => step * magnitude).find((step) => span / step <= wanted) ?? 10 * magnitude;
  const values = [];
  for (let index = Math.ceil(low / unit); index * unit <= high; index += 1) values.push(index * unit || 0); // never -0
  return values;
}

// The place in a sorted list whose value is nearest.
function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1; else high = middle;
  }
  return low > 0 && value - sorted[low - 1] <= sorted[low] - value ? low - 1 : low;
}

// Calls `render` when the element has got another size, but not for its first one, and not for what it draws itself.
function onResize(element, render) {
  let width = element.clientWidth;
  new ResizeObserver(() => {
    if (element.clientWidth === width) return;
    width = element.clientWidth;
    render();
  }).observe(element);
}
