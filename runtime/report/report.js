"use strict";
let DATA = JSON.parse(document.getElementById("data").textContent);
const COLOURS = 8, DASHES = ["", "7 3", "2 3", "10 3 2 3", "15 5", "4 2 4 6", "7 2 2 2 2 2", "11 2 5 2"], WIDTHS = [1.9, 3.4, 1.1], POINTS = 120, MOST_TOLD = 9;
const MARKS = ["circle", "square", "up", "diamond", "down", "cross", "plus", "star"];
const main = document.querySelector("main");
const state = { hidden: new Set(), filters: {}, logx: false, logy: true, logtau: true, y: null, views: {}, timeline: 0 };
const redraws = [];
const redraw = () => redraws.forEach((one) => one());

// -- Small things --------------------------------------------------------------------------

const esc = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
const colour = (at) => `var(--c${at % COLOURS})`;
const clamp = (v, low, high) => Math.max(low, Math.min(high, v));
const median = (values) => {
  const sorted = [...values].sort((a, b) => a - b), half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
};
const SUPER = "⁰¹²³⁴⁵⁶⁷⁸⁹";
const power = (n) => "10" + (n < 0 ? "⁻" : "") + [...String(Math.abs(n))].map((d) => SUPER[d]).join("");
function num(v, digits = 4) {
  if (v === null || v === undefined || Number.isNaN(v)) return "";
  if (typeof v !== "number") return String(v);
  if (!Number.isFinite(v)) return v > 0 ? "∞" : "−∞";
  const size = Math.abs(v);
  if (size !== 0 && (size >= 1e6 || size < 1e-3)) {
    let n = Math.floor(Math.log10(size)), m = +(v / 10 ** n).toPrecision(Math.min(digits, 3));
    if (Math.abs(m) >= 10) { m /= 10; n += 1; }
    return m === 1 ? power(n) : `${String(m).replace("-", "−")}·${power(n)}`;
  }
  return (+v.toPrecision(digits)).toLocaleString("en-US", { maximumFractionDigits: 8 }).replace("-", "−");
}
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== false && value !== null) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}
function section(id, title, note, ...tools) {
  const made = el("section", { id });
  made.append(el("div", { class: "top" }, el("h2", {}, title), ...tools));
  if (note) made.append(el("p", { class: "note" }, note));
  main.append(made);
  return made;
}
function select(label, values, chosen, change) {
  const made = el("select", { onchange: () => change(made.value), "aria-label": label });
  for (const [value, text] of values) made.append(el("option", { value, selected: value === chosen ? "" : null }, text));
  return el("label", {}, label, made);
}
const toggle = (text, pressed, click) => {
  const made = el("button", { type: "button", "aria-pressed": String(pressed), onclick: () => {
    made.setAttribute("aria-pressed", made.getAttribute("aria-pressed") !== "true");
    click(made.getAttribute("aria-pressed") === "true");
  } }, text);
  return made;
};
function mark(kind, x, y, r, attributes) {
  const paths = {
    square: `M${x - r},${y - r}h${2 * r}v${2 * r}h${-2 * r}z`,
    up: `M${x},${y - 1.3 * r}l${1.2 * r},${2.2 * r}h${-2.4 * r}z`,
    down: `M${x},${y + 1.3 * r}l${1.2 * r},${-2.2 * r}h${-2.4 * r}z`,
    diamond: `M${x},${y - 1.4 * r}l${1.4 * r},${1.4 * r}l${-1.4 * r},${1.4 * r}l${-1.4 * r},${-1.4 * r}z`,
    cross: `M${x - r},${y - r}l${2 * r},${2 * r}m0,${-2 * r}l${-2 * r},${2 * r}`,
    plus: `M${x - 1.2 * r},${y}h${2.4 * r}m${-1.2 * r},${-1.2 * r}v${2.4 * r}`,
    star: `M${x - r},${y - r}l${2 * r},${2 * r}m0,${-2 * r}l${-2 * r},${2 * r}M${x - 1.2 * r},${y}h${2.4 * r}`,
  };
  return paths[kind]
    ? `<path d="${paths[kind]}" ${attributes}/>`
    : `<circle cx="${x}" cy="${y}" r="${1.1 * r}" ${attributes}/>`;
}

// -- Scales ----------------------------------------------------------------------------------

function scale(low, high, from, to, log) {
  const f = log ? Math.log10 : (v) => v, g = log ? (v) => 10 ** v : (v) => v;
  const a = f(low), span = f(high) - a || 1;
  const map = (v) => from + ((f(v) - a) / span) * (to - from);
  map.invert = (p) => g(a + ((p - from) / (to - from)) * span);
  return Object.assign(map, { low, high, log });
}
function ticks(s, most) {
  if (s.log) {
    const a = Math.log10(s.low), b = Math.log10(s.high), found = [];
    if (b - a < 1.2) return plain(s.low, s.high, most).filter((v) => v > 0);
    const step = Math.max(1, Math.ceil((b - a) / most)), inner = b - a < 3 && most > 4 ? [1, 2, 5] : [1];
    for (let n = Math.floor(a); n <= Math.ceil(b); n++)
      if (n % step === 0) for (const m of inner) found.push(m * 10 ** n);
    return found.filter((v) => v >= s.low * 0.999 && v <= s.high * 1.001);
  }
  return plain(s.low, s.high, most);
}
function plain(low, high, most) {
  const raw = (high - low) / Math.max(1, most), base = 10 ** Math.floor(Math.log10(raw || 1));
  const step = [1, 2, 5, 10].map((m) => m * base).find((v) => v >= raw) || base, found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + 1e-9 * step; n++) found.push(+(n * step).toPrecision(12));
  return found;
}
function extent(values, log) {
  let low = Infinity, high = -Infinity;
  for (const v of values) if (v !== null && Number.isFinite(v) && !(log && v <= 0)) { low = Math.min(low, v); high = Math.max(high, v); }
  if (low > high) return log ? [0.1, 1] : [0, 1];
  if (low === high) return log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const room = 0.03;
  if (log) { const f = (high / low) ** room; return [low / f, high * f]; }
  const d = (high - low) * room;
  return [low >= 0 && low < 0.3 * high ? 0 : low - d, high + d];
}

// -- A chart: lines with bands, points with ranges, steps -------------------------------------

function chart(host, name, spec) {
  const box = el("div", { class: "chart" }), tip = el("div", { class: "tip" });
  host.append(box);
  let view = state.views[name] || null, frame = null, live = null;

  function draw() {
    const s = spec(), width = Math.max(260, box.clientWidth || 600);
    const height = s.height || clamp(width * 0.62, 230, 380);
    const shown = s.series.filter((one) => one.x.length);
    const named = s.categories, left = named ? clamp(7 * Math.max(...named.map((c) => c.length), 4) + 12, 60, width * 0.42) : 58;
    const pad = { left, right: 14, top: 10, bottom: 42 };
    const all = (key) => shown.flatMap((one) => [...one[key], ...(key === "y" ? [...(one.lo || []), ...(one.hi || [])] : [...(one.xlo || []), ...(one.xhi || [])])]);
    let [x0, x1] = s.x.range || extent(all("x"), s.x.log), [y0, y1] = named ? [named.length - 0.5, -0.5] : extent([...all("y"), ...(s.level ? [s.level.at] : [])], s.y.log);
    if (view) ({ x0, x1, y0, y1 } = view);
    const x = scale(x0, x1, pad.left, width - pad.right, s.x.log), y = scale(y0, y1, height - pad.bottom, pad.top, !named && s.y.log);
    live = { x, y, pad, width, height, shown, s };
    const id = `clip-${name}`.replace(/[^\w-]/g, "_"), out = [];
    out.push(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" role="img" aria-label="${esc(s.label || `${s.y.label} against ${s.x.label}`)}" font-family="system-ui, DejaVu Sans, sans-serif" font-size="12">`);
    out.push(`<clipPath id="${id}"><rect x="${pad.left}" y="${pad.top - 4}" width="${width - pad.left - pad.right + 4}" height="${height - pad.top - pad.bottom + 8}"/></clipPath>`);
    for (const v of ticks(x, width / 80)) out.push(`<line x1="${x(v)}" x2="${x(v)}" y1="${pad.top}" y2="${height - pad.bottom}" stroke="var(--grid)"/><text x="${x(v)}" y="${height - pad.bottom + 16}" text-anchor="middle" fill="var(--soft)">${num(v)}</text>`);
    if (named) named.forEach((c, at) => out.push(`<line x1="${pad.left}" x2="${width - pad.right}" y1="${y(at)}" y2="${y(at)}" stroke="var(--grid)"/><text x="${pad.left - 8}" y="${y(at) + 4}" text-anchor="end" fill="var(--ink)">${esc(c.length * 7 > left ? c.slice(0, Math.floor(left / 7) - 1) + "…" : c)}<title>${esc(c)}</title></text>`));
    else for (const v of ticks(y, height / 45)) out.push(`<line x1="${pad.left}" x2="${width - pad.right}" y1="${y(v)}" y2="${y(v)}" stroke="var(--grid)"/><text x="${pad.left - 6}" y="${y(v) + 4}" text-anchor="end" fill="var(--soft)">${num(v)}</text>`);
    out.push(`<text x="${(pad.left + width - pad.right) / 2}" y="${height - 6}" text-anchor="middle" fill="var(--ink)">${esc(s.x.label)}</text>`);
    if (!named) out.push(`<text transform="translate(13 ${(pad.top + height - pad.bottom) / 2}) rotate(-90)" text-anchor="middle" fill="var(--ink)">${esc(s.y.label)}</text>`);
    out.push(`<g clip-path="url(#${id})">`);
    if (s.level && (!s.y.log || s.level.at > 0)) out.push(`<line x1="${pad.left}" x2="${width - pad.right}" y1="${y(s.level.at)}" y2="${y(s.level.at)}" stroke="var(--soft)" stroke-dasharray="4 4"><title>${esc(s.level.label)}</title></line>`);
    for (const one of shown) out.push(drawn(one, x, y, s));
    for (const fit of s.fits || []) {
      const ends = fit.x.map((v, at) => `${at ? "L" : "M"}${x(v)},${y(fit.y[at])}`).join("");
      out.push(`<path d="${ends}" fill="none" stroke="${fit.colour}" stroke-width="1.3" stroke-dasharray="${fit.dash}"/>`);
    }
    out.push(`</g><rect x="${pad.left}" y="${pad.top}" width="${width - pad.left - pad.right}" height="${height - pad.top - pad.bottom}" fill="none" stroke="var(--line)"/>`);
    if (!shown.length) out.push(`<text x="${width / 2}" y="${height / 2}" text-anchor="middle" fill="var(--soft)">${esc(s.empty || "nothing to show")}</text>`);
    out.push(`<g class="over"></g></svg>`);
    box.innerHTML = out.join("");
    box.append(tip);
  }

  const at = (event) => {
    const r = box.getBoundingClientRect(), k = live.width / r.width;
    return [(event.clientX - r.left) * k, (event.clientY - r.top) * k];
  };
  const over = (html) => { const g = box.querySelector(".over"); if (g) g.innerHTML = html; };
  function look(event) {
    if (!live || !live.shown.length) return;
    const [px, py] = at(event), { x, y, pad, width, height, shown, s } = live;
    if (px < pad.left || px > width - pad.right || py < pad.top || py > height - pad.bottom) return leave();
    const points = s.kind === "points";
    let rows = shown.map((one) => {
      let best = -1, gap = Infinity;
      one.x.forEach((v, i) => {
        if (s.x.log && v <= 0) return;
        const dx = x(v) - px, d = points ? Math.hypot(dx, y(one.y[i]) - py) : Math.abs(dx);
        if (d < gap) { gap = d; best = i; }
      });
      return { one, best, gap, dy: best < 0 ? Infinity : Math.abs(y(one.y[best]) - py) };
    }).filter((row) => row.best >= 0);
    rows = points ? rows.sort((a, b) => a.gap - b.gap).slice(0, 1).filter((row) => row.gap < 40)
      : rows.filter((row) => row.gap < 40).sort((a, b) => a.dy - b.dy).slice(0, MOST_TOLD);
    if (!rows.length) return leave();
    const first = rows[0], xv = first.one.x[first.best];
    over((points ? "" : `<line x1="${x(xv)}" x2="${x(xv)}" y1="${pad.top}" y2="${height - pad.bottom}" stroke="var(--soft)" stroke-width=".7"/>`)
      + rows.map(({ one, best }) => `<circle cx="${x(one.x[best])}" cy="${y(one.y[best])}" r="4" fill="none" stroke="${one.colour}" stroke-width="2"/>`).join(""));
    const range = (one, i, lo, hi) => one[lo] && one[hi] && one[lo][i] !== one[hi][i] ? ` (${num(one[lo][i])} to ${num(one[hi][i])})` : "";
    tip.innerHTML = points
      ? `<i style="background:${first.one.colour}"></i>${esc(first.one.labels ? first.one.labels[first.best] : first.one.name)}<br>${esc(s.x.label)}: ${num(xv)}${range(first.one, first.best, "xlo", "xhi")}` + (s.categories ? "" : `<br>${esc(s.y.label)}: ${num(first.one.y[first.best])}${range(first.one, first.best, "lo", "hi")}`)
      : `${esc(s.x.label)} ${num(xv)}<br>` + rows.map(({ one, best }) => `<i style="background:${one.colour}"></i>${esc(one.name)}: ${num(one.y[best])}${range(one, best, "lo", "hi")}`).join("<br>");
    tip.style.display = "block";
    const k = box.clientWidth / width, room = tip.offsetWidth + 14, right = px * k + room < box.clientWidth;
    tip.style.left = `${clamp(right ? px * k + 14 : px * k - room, 0, Math.max(0, box.clientWidth - tip.offsetWidth))}px`;
    tip.style.top = `${clamp(py * k - 20, 0, Math.max(0, height * k - tip.offsetHeight))}px`;
  }
  const leave = () => { tip.style.display = "none"; over(""); };
  const set = (next) => { view = state.views[name] = next; draw(); };

  const fingers = new Map();
  let from = null, moved = false;
  box.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, event);
    if (event.pointerType === "mouse" && event.button === 0) { from = { p: at(event), live, shift: event.shiftKey }; moved = false; box.setPointerCapture(event.pointerId); }
    if (fingers.size === 2) from = { live, fingers: [...fingers.values()].map(at) };
  });
  box.addEventListener("pointermove", (event) => {
    if (fingers.has(event.pointerId)) fingers.set(event.pointerId, event);
    if (from && from.fingers && fingers.size === 2) {
      const now = [...fingers.values()].map(at), { x, y } = from.live, [a, b] = from.fingers;
      const zoom = clamp(Math.hypot(a[0] - b[0], a[1] - b[1]) / Math.max(20, Math.hypot(now[0][0] - now[1][0], now[0][1] - now[1][1])), 0.05, 20);
      const mid = (p, i) => (p[0][i] + p[1][i]) / 2, map = (p, i, s) => s.invert(mid(from.fingers, i) + (p - mid(now, i)) * zoom);
      const { pad, width, height } = from.live;
      cancelAnimationFrame(frame);
      frame = requestAnimationFrame(() => set({ x0: map(pad.left, 0, x), x1: map(width - pad.right, 0, x), y0: map(height - pad.bottom, 1, y), y1: map(pad.top, 1, y) }));
      return;
    }
    if (from && from.p) {
      const [px, py] = at(event), [qx, qy] = from.p, { x, y, pad, width, height } = from.live;
      moved = moved || Math.hypot(px - qx, py - qy) > 5;
      if (!moved) return;
      leave();
      if (from.shift) {
        cancelAnimationFrame(frame);
        frame = requestAnimationFrame(() => set({ x0: x.invert(pad.left - px + qx), x1: x.invert(width - pad.right - px + qx), y0: y.invert(height - pad.bottom - py + qy), y1: y.invert(pad.top - py + qy) }));
      } else over(`<rect x="${Math.min(px, qx)}" y="${Math.min(py, qy)}" width="${Math.abs(px - qx)}" height="${Math.abs(py - qy)}" fill="var(--soft)" fill-opacity=".15" stroke="var(--soft)"/>`);
      return;
    }
    look(event);
  });
  const up = (event) => {
    fingers.delete(event.pointerId);
    if (from && from.p && moved && !from.shift) {
      const [px, py] = at(event), [qx, qy] = from.p, { x, y } = from.live;
      if (Math.abs(px - qx) > 8 && Math.abs(py - qy) > 8) set({ x0: x.invert(Math.min(px, qx)), x1: x.invert(Math.max(px, qx)), y0: y.invert(Math.max(py, qy)), y1: y.invert(Math.min(py, qy)) });
      else over("");
    }
    if (fingers.size === 0) from = null;
  };
  box.addEventListener("pointerup", up);
  box.addEventListener("pointercancel", up);
  box.addEventListener("pointerleave", leave);
  box.addEventListener("dblclick", () => set(null));
  new ResizeObserver(() => requestAnimationFrame(() => { if (live && Math.abs(live.width - Math.max(260, box.clientWidth)) > 1) draw(); })).observe(box);
  redraws.push(draw);
  draw();
  return { reset: () => set(null) };
}

function drawn(one, x, y, s) {
  const low = (v, scale) => scale.log && v <= 0 ? scale.low : v; // what a logarithm cannot show is at the edge
  const good = (v, log) => v !== null && Number.isFinite(v) && !(log && v <= 0);
  const ok = one.x.map((v, i) => good(v, s.x.log) && (s.categories || one.step || good(one.y[i], s.y.log)));
  const style = `stroke="${one.colour}"`, title = `<title>${esc(one.name)}</title>`;
  let out = "";
  if (one.lo && s.kind !== "points") {
    const up = [], down = [];
    one.x.forEach((v, i) => { if (ok[i]) { up.push(`${x(v).toFixed(1)},${y(low(one.hi[i], y)).toFixed(1)}`); down.push(`${x(v).toFixed(1)},${y(low(one.lo[i], y)).toFixed(1)}`); } });
    out += `<polygon points="${[...up, ...down.reverse()].join(" ")}" fill="${one.colour}" fill-opacity=".16"/>`;
  }
  if (s.kind === "points") {
    one.x.forEach((v, i) => {
      if (!ok[i]) return;
      if (one.xlo && one.xlo[i] !== one.xhi[i]) out += `<line x1="${x(low(one.xlo[i], x))}" x2="${x(one.xhi[i])}" y1="${y(one.y[i])}" y2="${y(one.y[i])}" ${style} stroke-opacity=".6"/>`;
      if (one.lo && one.lo[i] !== one.hi[i]) out += `<line x1="${x(v)}" x2="${x(v)}" y1="${y(low(one.lo[i], y))}" y2="${y(one.hi[i])}" ${style} stroke-opacity=".6"/>`;
      out += mark(one.mark, +x(v).toFixed(1), +y(one.y[i]).toFixed(1), 4, `fill="${["cross", "plus", "star"].includes(one.mark) ? "none" : one.colour}" ${style} stroke-width="1.4" fill-opacity=".85"`);
    });
    return `<g>${title}${out}</g>`;
  }
  let path = "", pen = false;
  one.x.forEach((v, i) => {
    if (!ok[i]) { pen = false; return; }
    const px = x(v).toFixed(1), py = y(low(one.y[i], y)).toFixed(1);
    path += one.step && pen ? `H${px}V${py}` : `${pen ? "L" : "M"}${px},${py}`;
    pen = true;
  });
  return `<g>${title}${out}<path d="${path}" fill="none" ${style} stroke-width="${one.wide || 1.9}" stroke-linejoin="round" stroke-dasharray="${one.dash || ""}"/></g>`;
}

// -- Settings: what is shown, and how ----------------------------------------------------------

// What is chosen is kept by its name, not by its place: a page that follows a job gets new data.
const chosen = (axis) => state.filters[axis.key] ?? null;
function shownSettings() {
  return DATA.settings.filter((one) => DATA.axes.every((axis, i) => chosen(axis) === null || axis.values[one.at[i]] === chosen(axis)));
}
const hidden = (one) => state.hidden.has(`s${one.name}`);
function named(one) {
  const free = DATA.axes.map((axis, i) => [axis, i]).filter(([axis]) => axis.values.length > 1 && chosen(axis) === null);
  return free.map(([axis, i]) => axis.short[one.at[i]]).filter(Boolean).join(" · ") || one.name;
}
function styled(one) {
  const others = DATA.axes.map((_, i) => i).filter((i) => i !== DATA.colour && chosen(DATA.axes[i]) === null);
  const seen = new Map();
  for (const s of shownSettings()) {
    const key = others.map((i) => s.at[i]).join();
    if (!seen.has(key)) seen.set(key, seen.size);
  }
  const c = DATA.axes.length ? one.at[DATA.colour] : 0, place = seen.get(others.map((i) => one.at[i]).join()) || 0;
  return { ...line(c, place, seen.size), mark: MARKS[c % MARKS.length] };
}
function line(c, place, places) { // no two alike: colours, then dashes, then widths
  const at = place + places * Math.floor(c / COLOURS);
  return { colour: colour(c), dash: DASHES[at % DASHES.length], wide: WIDTHS[Math.floor(at / DASHES.length) % WIDTHS.length] };
}
function legend(host, entries) {
  const made = el("div", { class: "legend" });
  host.append(made);
  const draw = () => {
    made.replaceChildren();
    const all = entries();
    if (all.length < 2) return;
    for (const { key, name, colour, dash, wide, mark: kind } of all) {
      const pressed = !state.hidden.has(key);
      const button = el("button", { type: "button", "aria-pressed": String(pressed) });
      button.innerHTML = `<svg width="${(kind ? 12 : 0) + (dash === undefined ? 0 : 36)}" height="12">${kind ? mark(kind, 6, 6, 3.4, `fill="${colour}" stroke="${colour}"`) : ""}${dash === undefined ? "" : `<line x1="${kind ? 13 : 1}" x2="${kind ? 48 : 35}" y1="6" y2="6" stroke="${colour}" stroke-width="${wide || 1.9}" stroke-dasharray="${dash}"/>`}</svg><span>${esc(name)}</span>`;
      button.addEventListener("click", (event) => {
        const others = all.map((one) => one.key).filter((other) => other !== key);
        if (event.detail < 2) state.hidden.has(key) ? state.hidden.delete(key) : state.hidden.add(key);
        else if (others.every((other) => state.hidden.has(other))) state.hidden.clear();
        else state.hidden = new Set(others);
        redraw(); // a new button: no dblclick would come
      });
      made.append(button);
    }
  };
  redraws.push(draw);
  draw();
}
// A legend shows what its chart does: lines without marks, or marks without lines.
const entriesOfSettings = (without) => () => shownSettings().map((one) => ({ key: `s${one.name}`, name: named(one), ...styled(one), [without]: undefined }));
function saver(host, name) {
  return el("button", { type: "button", title: "Save the figures of this section", onclick: () => {
    host.querySelectorAll("svg[role=img]").forEach((svg, at) => save(svg, `${name}-${at + 1}`));
  } }, "save");
}
function save(svg, name) {
  const style = getComputedStyle(document.documentElement);
  const text = new XMLSerializer().serializeToString(svg).replace(/var\((--[\w-]+)\)/g, (_, key) => style.getPropertyValue(key).trim())
    .replace(/(<svg[^>]*>)/, `$1<rect width="100%" height="100%" fill="${style.getPropertyValue("--card").trim()}"/>`);
  const send = (url, ending) => el("a", { href: url, download: `${name}.${ending}` }).click();
  const url = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  send(url, "svg");
  const image = new Image();
  image.onload = () => {
    const canvas = el("canvas", { width: 2 * svg.viewBox.baseVal.width, height: 2 * svg.viewBox.baseVal.height });
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    send(canvas.toDataURL("image/png"), "png");
  };
  image.src = url;
}

// -- Curves --------------------------------------------------------------------------------------

function along(xs, ys, at) {
  let low = 0, high = xs.length - 1;
  if (at <= xs[0]) return ys[0];
  if (at >= xs[high]) return ys[high];
  while (high - low > 1) { const mid = (low + high) >> 1; xs[mid] <= at ? (low = mid) : (high = mid); }
  const f = (at - xs[low]) / (xs[high] - xs[low] || 1);
  return ys[low] === null || ys[high] === null ? null : ys[low] + f * (ys[high] - ys[low]);
}
function band(runs, xkey, ykey, log) {
  const unit = (DATA.columns[xkey] || {}).unit || 1, yunit = (DATA.columns[ykey] || {}).unit || 1;
  const have = runs.filter((run) => run.c[xkey] && run.c[ykey]).map((run) => [run.c[xkey].map((v) => v / unit), run.c[ykey].map((v) => (v === null ? null : v / yunit))]);
  if (!have.length) return { x: [], y: [] };
  if (have.length === 1) return { x: have[0][0], y: have[0][1] };
  const first = Math.max(...have.map(([x]) => x[0])), last = Math.min(...have.map(([x]) => x[x.length - 1]));
  const start = log && first <= 0 ? Math.min(...have.map(([x]) => x.find((v) => v > 0) || last)) : first, x = [];
  for (let i = 0; i < POINTS; i++) { const f = i / (POINTS - 1); x.push(log ? start * (last / start) ** f : start + f * (last - start)); }
  const made = { x, y: [], lo: [], hi: [] };
  for (const v of x) {
    const values = have.map(([xs, ys]) => along(xs, ys, v)), known = values.every((y) => y !== null);
    made.y.push(known ? median(values) : null); made.lo.push(known ? Math.min(...values) : null); made.hi.push(known ? Math.max(...values) : null);
  }
  return made;
}
function label(key) {
  const c = DATA.columns[key] || {};
  return c.label || key;
}
function curves() {
  if (!DATA.runs.length) return;
  state.y = state.y && DATA.y.includes(state.y) ? state.y : DATA.y[0];
  const tools = [];
  if (DATA.y.length > 1) tools.push(select("of", DATA.y.map((key) => [key, label(key)]), state.y, (value) => { state.y = value; state.views = {}; redraw(); }));
  tools.push(toggle("log x", state.logx, (on) => { state.logx = on; state.views = {}; redraw(); }));
  if (positive(state.y)) tools.push(toggle("log y", state.logy, (on) => { state.logy = on; state.views = {}; redraw(); }));
  const many = DATA.runs.length > DATA.settings.length;
  const host = section("curves", "Progress", many ? "Lines: median over the seeds. Bands: from the least to the greatest." : "", ...tools);
  host.querySelector(".top").append(saver(host, "curves"));
  const bar = el("div", { class: "top" });
  host.append(bar);
  DATA.axes.forEach((axis, i) => {
    if (axis.values.length < 2 || (i === DATA.colour && DATA.settings.length <= 12)) return;
    if (!(axis.key in state.filters)) state.filters[axis.key] = axis.first === null ? null : axis.values[axis.first];
    bar.append(select(axis.label, [["", "all"], ...axis.values.map((v, at) => [String(at), v])], chosen(axis) === null ? "" : String(axis.values.indexOf(chosen(axis))), (value) => { state.filters[axis.key] = value === "" ? null : axis.values[+value]; state.views = {}; redraw(); }));
  });
  const count = el("p", { class: "note" });
  host.append(count);
  redraws.push(() => {
    const shown = new Set(shownSettings().map((one) => DATA.settings.indexOf(one))), runs = DATA.runs.filter((run) => shown.has(run.s)).length;
    count.textContent = runs < DATA.runs.length ? `Shown: ${runs} of ${DATA.runs.length} runs; “all” above shows more. The page opens where the best setting is.` : "";
  });
  redraws[redraws.length - 1]();
  legend(host, entriesOfSettings("mark"));
  const grid = el("div", { class: "charts" });
  host.append(grid);
  for (const xkey of DATA.x) chart(grid, `curves-${xkey}`, () => ({
    x: { label: label(xkey), log: state.logx }, y: { label: label(state.y), log: state.logy && positive(state.y) },
    level: DATA.target && DATA.target.metric === state.y ? { at: DATA.target.level, label: `target ${num(DATA.target.level)}` } : null,
    series: shownSettings().filter((one) => !hidden(one)).map((one) => {
      const at = DATA.settings.indexOf(one);
      return { name: named(one), ...styled(one), ...band(DATA.runs.filter((run) => run.s === at), xkey, state.y, state.logx) };
    }),
  }));
}
const positive = (key) => DATA.runs.some((run) => (run.c[key] || []).some((v) => v > 0)) && (DATA.columns[key] || {}).better !== "higher";

// -- How long to the target, or how low ----------------------------------------------------------

function targets() {
  const measures = DATA.measures.filter((m) => DATA.runs.some((run) => Number.isFinite(run.t[m.key])));
  if (!measures.length || DATA.settings.length < 2) return;
  state.measure = measures.some((m) => m.key === state.measure) ? state.measure : measures[0].key;
  const tools = measures.length > 1 ? [select("", measures.map((m) => [m.key, m.label]), state.measure, (value) => { state.measure = value; state.views = {}; redraw(); })] : [];
  const title = DATA.target ? `To ${label(DATA.target.metric)} ${num(DATA.target.level)}` : "Where runs end";
  const host = section("targets", title, "Marks: median over the seeds. Lines: from the least to the greatest.", ...tools);
  host.querySelector(".top").append(saver(host, "targets"));
  const missing = el("p", { class: "note" });
  legend(host, entriesOfSettings("dash"));
  chart(host, "targets", () => {
    const m = measures.find((one) => one.key === state.measure) || measures[0], unit = m.unit || 1;
    const rows = [], never = [];
    for (const one of shownSettings()) {
      const at = DATA.settings.indexOf(one);
      if (hidden(one)) continue;
      const values = DATA.runs.filter((run) => run.s === at).map((run) => run.t[m.key] ?? Infinity);
      const mid = values.length ? median(values) : Infinity, finite = values.filter(Number.isFinite);
      if (!Number.isFinite(mid)) { never.push(named(one)); continue; }
      rows.push({ name: named(one), ...styled(one), mid: mid / unit, lo: Math.min(...finite) / unit, hi: Math.max(...finite) / unit, lost: values.length - finite.length });
    }
    rows.sort((a, b) => (m.better === "higher" ? b.mid - a.mid : a.mid - b.mid));
    missing.textContent = never.length ? `Not reached in at least half of the runs: ${never.join("; ")}.` : "";
    const mids = rows.map((row) => row.mid), least = Math.min(...mids), spread = rows.length && least > 0 && Math.max(...mids) / least > 5;
    return {
      kind: "points", height: 60 + 24 * Math.max(2, rows.length), categories: rows.map((row) => row.name), x: { label: m.label, log: spread, range: spread || !rows.length ? null : [0, 1.05 * Math.max(...rows.map((row) => row.hi))] }, y: { label: "" },
      series: rows.map((row, i) => ({ name: row.name, colour: row.colour, mark: row.mark, x: [row.mid], xlo: [row.lo], xhi: [row.hi], y: [i] })),
      empty: "no run got there", label: title,
    };
  });
  host.append(missing);
}

// -- One number against another, on logarithms ----------------------------------------------------

function against(one) {
  const host = section(one.id, one.title, "A mark for each setting, median over the seeds; what did not get there has none. Lines: least squares on the logarithms of the marks.");
  host.querySelector(".top").append(saver(host, one.id));
  const places = Math.max(...one.series.map((series) => series.dash)) + 1;
  const style = (series) => ({ ...line(series.colour, series.dash + 1, places + 1), mark: MARKS[(series.colour + 3 * series.dash) % MARKS.length] });
  legend(host, () => one.series.map((series) => ({ key: `g${series.name}`, name: series.name + (series.fit ? `: slope ${num(series.fit.slope, 3)} ± ${num(series.fit.error, 2)}` : ""), ...style(series) })));
  chart(host, one.id, () => {
    const shown = one.series.filter((series) => !state.hidden.has(`g${series.name}`));
    return {
      kind: "points", x: { label: one.x, log: true }, y: { label: one.y, log: true },
      series: shown.map((series) => ({ ...series, ...style(series) })),
      fits: shown.filter((series) => series.fit).map((series) => ({ ...style(series), x: series.fit.x, y: series.fit.y })),
    };
  });
}

// -- Staleness -----------------------------------------------------------------------------------

function staleness() {
  if (!DATA.staleness.length) return;
  const host = section("staleness", "Staleness", "Steps between the model a result was computed at and its use.", toggle("log y", state.logtau, (on) => { state.logtau = on; redraw(); }));
  host.querySelector(".top").append(saver(host, "staleness"));
  legend(host, entriesOfSettings("mark"));
  chart(host, "staleness", () => ({
    x: { label: "staleness, steps", log: false }, y: { label: "share of results", log: state.logtau },
    series: shownSettings().filter((one) => !hidden(one)).flatMap((one) =>
      DATA.staleness.filter((h) => DATA.settings[h.s] === one).map((h) => ({ name: `${named(one)} (mean ${num(h.mean, 3)}, most ${num(h.most)})`, ...styled(one), step: true, x: h.x, y: h.y }))),
  }));
}

// -- Who computed when ------------------------------------------------------------------------------

function timelines() {
  if (!DATA.timelines.length) return;
  state.timeline = Math.min(state.timeline, DATA.timelines.length - 1);
  const host = section("timeline", "Who computed when", "", ...(DATA.timelines.length > 1 ? [select("", DATA.timelines.map((one, at) => [String(at), one.name]), String(state.timeline), (value) => { state.timeline = +value; zoom = null; draw(); })] : []));
  host.querySelector(".top").append(saver(host, "timeline"));
  const key = el("p", { class: "note" });
  key.innerHTML = `<svg width="30" height="12"><rect width="15" height="12" fill="var(--c0)"/><rect x="15" width="15" height="12" fill="var(--c0)" fill-opacity=".55"/></svg> computes, job by job &ensp; <svg width="22" height="12"><rect y="3" width="22" height="6" fill="var(--c4)"/></svg> sends &ensp; <svg width="22" height="12"><rect y="8" width="22" height="4" fill="var(--c3)"/></svg> jobs are queued &ensp; <svg width="22" height="12"><rect width="22" height="12" fill="var(--lane)"/></svg> waits`;
  const box = el("div", { class: "chart" }), tip = el("div", { class: "tip" });
  host.append(key, box);
  let zoom = null, x = null, from = null;
  function draw() {
    const one = DATA.timelines[state.timeline], width = Math.max(260, box.clientWidth || 600), lane = clamp(320 / one.workers, 7, 22);
    const pad = { left: 46, right: 14, top: 6, bottom: 42 }, height = pad.top + pad.bottom + lane * one.workers, [from_s, to_s] = zoom || [0, one.until_s];
    x = scale(from_s, to_s, pad.left, width - pad.right, false);
    const out = [`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" role="img" aria-label="workers' timeline" font-family="system-ui, DejaVu Sans, sans-serif" font-size="12"><clipPath id="clip-lanes"><rect x="${pad.left}" y="0" width="${width - pad.left - pad.right}" height="${height}"/></clipPath>`];
    for (let w = 0; w < one.workers; w++) {
      const y = pad.top + lane * w;
      out.push(`<rect x="${pad.left}" y="${y + 1}" width="${width - pad.left - pad.right}" height="${lane - 2}" fill="var(--lane)"/>`);
      if (w % Math.ceil(14 / lane) === 0) out.push(`<text x="${pad.left - 6}" y="${y + lane / 2 + 4}" text-anchor="end" fill="var(--soft)">${w}</text>`);
    }
    out.push(`<g clip-path="url(#clip-lanes)">`);
    for (const [kind, w, s, e, odd] of one.spans) {
      if (e < from_s || s > to_s) continue;
      const y = pad.top + lane * w, a = x(s), b = Math.max(a + 0.4, x(e));
      if (kind === 0) out.push(`<rect x="${a.toFixed(2)}" y="${y + 1}" width="${(b - a).toFixed(2)}" height="${lane - 2}" fill="var(--c0)" fill-opacity="${odd ? 0.55 : 1}"/>`);
      else if (kind === 1) out.push(`<rect x="${a.toFixed(2)}" y="${y + 0.3 * lane}" width="${(b - a).toFixed(2)}" height="${0.4 * lane}" fill="var(--c4)"/>`);
      else out.push(`<rect x="${a.toFixed(2)}" y="${y + 0.68 * lane}" width="${(b - a).toFixed(2)}" height="${0.26 * lane}" fill="var(--c3)"/>`);
    }
    out.push(`</g>`);
    for (const v of ticks(x, width / 90)) out.push(`<line x1="${x(v)}" x2="${x(v)}" y1="${height - pad.bottom}" y2="${height - pad.bottom + 5}" stroke="var(--soft)"/><text x="${x(v)}" y="${height - pad.bottom + 18}" text-anchor="middle" fill="var(--soft)">${num(v)}</text>`);
    out.push(`<text x="${width / 2}" y="${height - 6}" text-anchor="middle" fill="var(--ink)">${esc(one.unit)}</text><text transform="translate(11 ${pad.top + (lane * one.workers) / 2}) rotate(-90)" text-anchor="middle" fill="var(--ink)">worker</text><g class="over"></g></svg>`);
    box.innerHTML = out.join("");
    box.append(tip);
  }
  const px = (event) => event.clientX - box.getBoundingClientRect().left;
  box.addEventListener("pointerdown", (event) => { if (event.pointerType === "mouse") { from = px(event); box.setPointerCapture(event.pointerId); } });
  box.addEventListener("pointerup", (event) => {
    if (from !== null && Math.abs(px(event) - from) > 8) { const ends = [x.invert(from), x.invert(px(event))]; zoom = [Math.max(0, Math.min(...ends)), Math.max(...ends)]; draw(); }
    from = null;
  });
  box.addEventListener("dblclick", () => { zoom = null; draw(); });
  let wide = 0;
  new ResizeObserver(() => requestAnimationFrame(() => { if (box.clientWidth !== wide) { wide = box.clientWidth; draw(); } })).observe(box);
  redraws.push(draw);
  draw();
  const waits = el("div", { class: "scroll" });
  host.append(el("p", { class: "note" }, `Shown: the first jobs${DATA.timelines_of > DATA.timelines.length ? ` of ${DATA.timelines.length} of ${DATA.timelines_of} runs` : ""}. In the table: shares of all workers’ time in the whole run.`), waits);
  waits.append(sheet([["run", 0], ["computes", 1], ["sends", 1], ["waits", 1], ["queued jobs, mean", 1]], DATA.timelines.map((one) => [one.name, ...["compute", "communicate", "wait"].map((k) => `${(100 * one.shares[k]).toFixed(0)}%`), num(one.shares.queue, 3)])));
}

// -- Graphs --------------------------------------------------------------------------------------------

const CIVIDIS = [[0, 34, 78], [53, 69, 108], [102, 105, 112], [148, 142, 119], [200, 184, 102], [254, 232, 56]];
function heat(f) {
  const at = clamp(f, 0, 1) * (CIVIDIS.length - 1), i = Math.min(CIVIDIS.length - 2, Math.floor(at)), d = at - i;
  return `rgb(${CIVIDIS[i].map((c, k) => Math.round(c + d * (CIVIDIS[i + 1][k] - c)))})`;
}
function graphs() {
  if (!DATA.graphs.length) return;
  const host = section("graphs", "Who talks to whom", "");
  host.querySelector(".top").append(saver(host, "graph"));
  const grid = el("div", { class: "graphs" });
  host.append(grid);
  const most = Math.max(...DATA.graphs.map((one) => one.frames.length));
  state.round = Math.min(state.round || 0, most - 1);
  const drawers = DATA.graphs.map((one) => graph(grid, one));
  const show = () => drawers.forEach((draw) => draw(state.round));
  if (most > 1) {
    const slider = el("input", { type: "range", min: 0, max: most - 1, value: state.round, "aria-label": "round", oninput: () => { state.round = +slider.value; show(); } });
    const play = el("button", { type: "button", onclick: () => { state.playing = !state.playing; run(); } });
    const run = () => {
      clearInterval(state.timer);
      play.textContent = state.playing ? "❚❚ pause" : "▶ play";
      if (state.playing) state.timer = setInterval(() => { state.round = (state.round + 1) % most; slider.value = state.round; show(); }, most > 60 ? 120 : 350);
    };
    run();
    host.insertBefore(el("div", { class: "player" }, play, slider), grid);
  }
  redraws.push(show);
  show();
}
function graph(host, one) {
  const figure = el("figure", { style: "margin:0;min-width:0" }), box = el("div"), caption = el("figcaption");
  figure.append(box, caption);
  host.append(figure);
  const losses = one.frames.flatMap((frame) => frame.loss || []).filter((v) => v > 0), low = Math.log(Math.min(...losses)), high = Math.log(Math.max(...losses));
  const size = 300, pad = 16, r = clamp(60 / Math.sqrt(one.n), 3, 10), at = one.at.map(([x, y]) => [pad + x * (size - 2 * pad), pad + y * (size - 2 * pad)]);
  const line = ([i, j]) => {
    if (!one.directed) return `M${at[i]}L${at[j]}`;
    const [dx, dy] = [at[j][0] - at[i][0], at[j][1] - at[i][1]], d = Math.hypot(dx, dy) || 1, [ux, uy] = [dx / d, dy / d];
    const [ex, ey] = [at[j][0] - ux * (r + 1), at[j][1] - uy * (r + 1)], a = 5;
    return `M${at[i]}L${[ex, ey]}M${[ex - a * ux - 0.5 * a * uy, ey - a * uy + 0.5 * a * ux]}L${[ex, ey]}L${[ex - a * ux + 0.5 * a * uy, ey - a * uy - 0.5 * a * ux]}`;
  };
  const every = one.rounds.flat().map(line).join("");
  return (step) => {
    const frame = one.frames[step % one.frames.length], used = one.rounds[frame.edges] || [], busy = new Set(frame.active || []);
    const out = [`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${size} ${size}" width="100%" style="max-width:${size}px" role="img" aria-label="${esc(one.name)}" font-size="11">`];
    if (one.rounds.length > 1 || busy.size) out.push(`<path d="${every}" stroke="var(--line)" fill="none" stroke-width=".7" stroke-opacity=".7"/>`);
    const lit = busy.size ? used.filter(([i, j]) => busy.has(i) || busy.has(j)) : used;
    out.push(`<path d="${lit.map(line).join("")}" stroke="var(--c1)" fill="none" stroke-width="${one.n > 40 ? 0.9 : 1.6}" stroke-opacity=".8"/>`);
    at.forEach(([x, y], i) => {
      const loss = frame.loss ? frame.loss[i] : null, f = loss > 0 && high > low ? (Math.log(loss) - low) / (high - low) : 0;
      out.push(`<circle cx="${x.toFixed(1)}" cy="${y.toFixed(1)}" r="${r}" fill="${loss === null ? "var(--c0)" : heat(f)}" stroke="${busy.has(i) ? "var(--c1)" : "var(--card)"}" stroke-width="${busy.has(i) ? 3 : 1}"><title>node ${esc(one.names[i])}${loss === null ? "" : `: loss ${num(loss)}`}</title></circle>`);
    });
    box.innerHTML = `${out.join("")}</svg>`;
    caption.innerHTML = `<b>${esc(one.name)}</b><br><span class="note">${esc(one.facts)}<br>${esc(frame.said)}${losses.length ? ` <br>${ramp()} loss at the node’s model, ${num(Math.exp(low), 3)} to ${num(Math.exp(high), 3)} (log)` : ""}</span>`;
  };
}
const ramp = () => `<svg width="70" height="9">${[...Array(14).keys()].map((i) => `<rect x="${5 * i}" width="5.2" height="9" fill="${heat(i / 13)}"/>`).join("")}</svg>`;

// -- The table -----------------------------------------------------------------------------------------

function sheet(columns, rows) {
  const made = el("table"), head = el("tr"), body = el("tbody");
  let order = null;
  const fill = () => body.replaceChildren(...rows.map((row) => el("tr", {}, ...row.map((v, i) => el("td", { class: columns[i][1] ? "" : "text" }, typeof v === "number" ? num(v) : v ?? "")))));
  columns.forEach(([name, number], i) => head.append(el("th", { class: number ? "" : "text", onclick: () => {
    order = order === i ? -1 - i : i;
    rows = [...rows].sort((a, b) => ((a[i] === null) - (b[i] === null) || (typeof a[i] === "number" && typeof b[i] === "number" ? a[i] - b[i] : String(a[i] ?? "").localeCompare(String(b[i] ?? ""), "en", { numeric: true }))) * (order < 0 ? -1 : 1));
    fill();
  } }, name)));
  made.append(el("thead", {}, head), body);
  fill();
  return made;
}
function summary() {
  if (!DATA.table.rows.length) return;
  const host = section("table", "Numbers", DATA.table.note);
  const scroll = el("div", { class: "scroll tall" });
  scroll.append(sheet(DATA.table.columns, DATA.table.rows));
  host.append(scroll);
}

// -- The page ------------------------------------------------------------------------------------------

function build() {
  redraws.length = 0;
  main.replaceChildren();
  document.getElementById("about").textContent = DATA.about;
  document.getElementById("made").textContent = DATA.made;
  for (const note of DATA.notes) main.append(el("p", { class: "note" }, note));
  curves();
  targets();
  DATA.against.forEach(against);
  for (const part of [graphs, timelines, staleness, summary]) part();
}
const dark = matchMedia("(prefers-color-scheme: dark)");
let chosenTheme = null;
const theme = () => document.documentElement.classList.toggle("dark", chosenTheme ?? dark.matches);
dark.addEventListener("change", theme);
document.getElementById("theme").addEventListener("click", () => { chosenTheme = !(chosenTheme ?? dark.matches); theme(); });
theme();
build();
if (DATA.live_s) setInterval(async () => {
  try {
    const answer = await fetch("data.json", { cache: "no-store" });
    if (!answer.ok) return;
    const text = await answer.text();
    if (text === build.last) return;
    build.last = text;
    DATA = JSON.parse(text);
    const y = scrollY;
    build();
    scrollTo(0, y);
  } catch (error) {
    document.getElementById("made").textContent = "The server that showed this page has ended; this is what it last said.";
  }
}, 1000 * DATA.live_s);
