// A squarified treemap: rectangles whose areas are as the weights and whose sides are as equal as can be.
// The idea is that of Bruls, Huizing and van Wijk (2000): fill the shorter side with a row, and begin the next row
// when one more would make the shapes of this one worse.

function squarify(weights, box) {
  const total = weights.reduce((a, b) => a + b, 0);
  const found = [];
  if (total <= 0) return weights.map(() => ({ x: box.x, y: box.y, width: 0, height: 0 }));
  const scale = (box.width * box.height) / total;
  let free = { ...box }, start = 0;
  while (start < weights.length) {
    const side = Math.min(free.width, free.height);
    let end = start, area = 0, worst = Infinity;
    while (end < weights.length) {
      const next = area + weights[end] * scale;
      // The row's largest weight comes first, its smallest last.
      const shape = worstShape(weights[start] * scale, weights[end] * scale, next, side);
      if (end > start && shape > worst) break;
      worst = shape;
      area = next;
      end += 1;
    }
    free = placeRow(weights.slice(start, end), scale, area, free, found);
    start = end;
  }
  return found;
}

function worstShape(largest, smallest, area, side) {
  if (smallest <= 0 || area <= 0) return Infinity;
  const squared = side * side;
  return Math.max((squared * largest) / (area * area), (area * area) / (squared * smallest));
}

function placeRow(weights, scale, area, free, found) {
  const isUpright = free.width >= free.height;
  const side = isUpright ? free.height : free.width;
  const thickness = side > 0 ? area / side : 0;
  let along = 0;
  for (const weight of weights) {
    const length = thickness > 0 ? (weight * scale) / thickness : 0;
    found.push(isUpright
      ? { x: free.x, y: free.y + along, width: thickness, height: length }
      : { x: free.x + along, y: free.y, width: length, height: thickness });
    along += length;
  }
  return isUpright
    ? { x: free.x + thickness, y: free.y, width: Math.max(0, free.width - thickness), height: free.height }
    : { x: free.x, y: free.y + thickness, width: free.width, height: Math.max(0, free.height - thickness) };
}
