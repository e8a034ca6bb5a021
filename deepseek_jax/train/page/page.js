// Shows the numbers under the pointer. Without it the page is complete.
'use strict';
const range = (text) => text.split(' ').map(Number);
const short = (x) => Number(x.toPrecision(4)).toLocaleString('en');
const make = (parent, kind, tag) => {
  const made = document.createElement(tag);
  made.className = kind;
  parent.append(made);
  return made;
};
const readPath = (path) =>
  [...path.getAttribute('d').matchAll(/[ML](-?[\d.]+) (-?[\d.]+)/g)].map((m) => [+m[1], +m[2]]);

function linesUnder(figure, share) {
  const [left, right] = range(figure.dataset.x);
  const [low, high] = range(figure.dataset.y);
  const log = figure.dataset.scale === 'log';
  const value = (y) => log
    ? Math.exp(Math.log(low) + (1 - y / 1000) * (Math.log(high) - Math.log(low)))
    : low + (1 - y / 1000) * (high - low);
  const said = [];
  let at = null;
  for (const path of figure.querySelectorAll('.plot path[data-label]')) {
    path.points ??= readPath(path);
    let best = null;
    for (const point of path.points) {
      if (best === null || Math.abs(point[0] - share * 1000) < Math.abs(best[0] - share * 1000)) {
        best = point;
      }
    }
    if (best === null) continue;
    at ??= best[0];
    said.push(`${path.dataset.label}  ${short(value(best[1]))}`);
  }
  if (at === null) return null;
  const x = left + (at / 1000) * (right - left);
  return [at / 1000, [`${figure.dataset.unit} ${short(x)}`, ...said].join('\n')];
}

function loadUnder(figure, share, down) {
  const image = figure.querySelector('img');
  if (!figure.pixels) {
    const canvas = document.createElement('canvas');
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    const context = canvas.getContext('2d');
    context.drawImage(image, 0, 0);
    figure.pixels = context.getImageData(0, 0, canvas.width, canvas.height);
    const stops = figure.dataset.stops.split(' ')
      .map((stop) => [1, 3, 5].map((i) => parseInt(stop.slice(i, i + 2), 16)));
    figure.ramp = Array.from({length: 255}, (_, i) => {
      const at = (i / 254) * (stops.length - 1);
      const from = Math.min(Math.floor(at), stops.length - 2);
      return stops[from].map((x, c) => x + (at - from) * (stops[from + 1][c] - x));
    });
  }
  const size = Number(figure.dataset.pixels);
  const width = figure.pixels.width / size;
  const height = figure.pixels.height / size;
  const column = Math.min(width - 1, Math.floor(share * width));
  const row = Math.min(height - 1, Math.floor(down * height));
  const at = 4 * size * (row * figure.pixels.width + column);
  const pixel = figure.pixels.data.slice(at, at + 4);
  if (pixel[3] === 0) return null;
  let best = 0;
  let least = Infinity;
  figure.ramp.forEach((colour, i) => {
    const distance = colour.reduce((sum, x, c) => sum + (x - pixel[c]) ** 2, 0);
    if (distance < least) [least, best] = [distance, i];
  });
  const band = Number(figure.dataset.band);
  const period = band + Number(figure.dataset.gap);
  const layer = figure.dataset.layers.split(' ')[Math.floor(row / period)];
  const expert = figure.dataset.sorted === '1' ? 'by load' : 'expert';
  const load = best >= 254 ? '2 or more' : short(best / 127);
  const step = Math.round(((column + 1) / width) * range(figure.dataset.x)[1]);
  return [share, `step ${short(step)}\nlayer ${layer}, ${expert} ${row % period}\nload  ${load} × equal share`];
}

for (const figure of document.querySelectorAll('figure[data-x]')) {
  const plot = figure.querySelector('.plot');
  const cursor = make(plot, 'cursor', 'div');
  const tip = make(plot, 'tip', 'span');
  const hide = () => { cursor.hidden = tip.hidden = true; };
  hide();
  plot.addEventListener('pointerleave', hide);
  plot.addEventListener('pointermove', (event) => {
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const down = Math.min(1, Math.max(0, (event.clientY - box.top) / box.height));
    const found = figure.classList.contains('heat')
      ? loadUnder(figure, share, down)
      : linesUnder(figure, share);
    if (found === null) return hide();
    cursor.hidden = tip.hidden = false;
    cursor.style.left = `${100 * found[0]}%`;
    tip.textContent = found[1];
    const right = found[0] > 0.5;
    tip.style.left = right ? 'auto' : `calc(${100 * found[0]}% + 8px)`;
    tip.style.right = right ? `calc(${100 * (1 - found[0])}% + 8px)` : 'auto';
  });
}
