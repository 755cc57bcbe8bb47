"use strict";
// The scatter of a comparison: points on a canvas, found under the pointer by a grid, their pictures in sheets of thumbnails.
// Real samples come first, then every generated set in turn. `window.explorer` offers the same to a console.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const array = (kind, text) => new kind(bytes(text).buffer);
  const sets = data.sets;
  const total = sets.reduce((sum, set) => sum + set.count, 0);
  const labels = array(Int32Array, data.labels);
  const numbers = array(Uint32Array, data.numbers);
  const isolation = array(Float32Array, data.isolation);
  const present = array(Uint8Array, data.sheets.present);
  const links = {
    k: data.neighbours.k,
    ofReal: array(Uint32Array, data.neighbours.of_real),
    realDistances: array(Float32Array, data.neighbours.real_distances),
    ofGenerated: array(Uint32Array, data.neighbours.of_generated),
    generatedDistances: array(Float32Array, data.neighbours.generated_distances),
  };
  const setOf = new Uint8Array(total);
  sets.forEach((set, s) => setOf.fill(s, set.first, set.first + set.count));

  const sheets = data.sheets.sources.map((source) => Object.assign(new Image(), { src: source }));
  const ready = Promise.all(sheets.map((sheet) => sheet.decode().catch(() => null)));

  // Colours: few classes get a palette, many the golden angle.
  const palette = ["#4269d0", "#e08a1e", "#d1495b", "#2f9e83", "#3c8d3c", "#e377c2", "#8a5fc7", "#8c564b", "#7f7f7f", "#17a5c4"];
  const classColours = data.classes.map((_, c) =>
    data.classes.length <= 10 ? palette[c] : `hsl(${(c * 137.508) % 360} ${55 + 20 * (c % 3)}% ${38 + 9 * (c % 4)}%)`);
  const UNKNOWN = "#c4c4cc";
  const isolationSteps = ["#2b6f8f", "#5aa0b4", "#b9cdb4", "#e6c46b", "#e08a3c", "#c8402f"];
  const isolationStep = (value) => (value < 0.8 ? 0 : value < 1 ? 1 : value < 1.25 ? 2 : value < 1.6 ? 3 : value < 2.2 ? 4 : 5);
  // By mode: the colours, and which of them a sample has.
  const modes = {
    class: { colours: [...classColours, UNKNOWN], of: (p) => (labels[p] < 0 ? classColours.length : labels[p]) },
    set: { colours: sets.map((set) => set.colour), of: (p) => setOf[p] },
    isolation: { colours: isolationSteps, of: (p) => isolationStep(isolation[p]) },
  };

  const state = { view: 0, colour: data.classes.length ? "class" : "set", shownSets: sets.map(() => true), classes: null, hovered: -1, selected: -1, zoom: 1, x: 0, y: 0 };

  // Pictures

  function drawTile(canvas, p, side) {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = canvas.height = Math.round(side * ratio);
    canvas.style.width = canvas.style.height = `${side}px`;
    canvas.style.setProperty("--edge", sets[setOf[p]].colour);
    const context = canvas.getContext("2d");
    const { tile, columns, rows } = data.sheets;
    context.fillStyle = "#ececf0";
    context.fillRect(0, 0, canvas.width, canvas.height);
    if (!present[p]) {
      context.fillStyle = "#88888f";
      context.font = `${11 * ratio}px system-ui, sans-serif`;
      context.textAlign = "center";
      context.fillText("no picture", canvas.width / 2, canvas.height / 2);
      return;
    }
    const place = p % (columns * rows);
    context.imageSmoothingEnabled = tile > 16;
    context.drawImage(sheets[Math.floor(p / (columns * rows))], (place % columns) * tile, Math.floor(place / columns) * tile, tile, tile, 0, 0, canvas.width, canvas.height);
  }

  const element = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const className = (p) => (labels[p] < 0 ? "class not known" : data.classes[labels[p]].name);
  const short = (value) => (value >= 100 ? value.toFixed(0) : value.toPrecision(3));

  function describe(p) {
    return [
      element("b", { textContent: className(p) }), element("br"),
      `${sets[setOf[p]].title}, sample ${numbers[p].toLocaleString("en")}`, element("br"),
      `isolation ${short(isolation[p])}`, element("br"), element("small", { textContent: data.paths[p] }),
    ];
  }

  function tileButton(p, caption, side = 72) {
    const canvas = element("canvas");
    ready.then(() => drawTile(canvas, p, side));
    const button = element("button", { className: "tile", title: `${className(p)} · ${data.paths[p]}` }, canvas, caption);
    button.addEventListener("click", () => select(p, true));
    return button;
  }

  function neighboursOf(p) {
    const k = links.k, found = [];
    if (setOf[p] === 0) {
      for (let s = 1; s < sets.length; s++) {
        const start = (p * (sets.length - 1) + s - 1) * k;
        found.push({ set: s, points: links.ofReal.slice(start, start + k), distances: links.realDistances.slice(start, start + k) });
      }
    } else {
      const start = (p - sets[0].count) * k;
      found.push({ set: 0, points: links.ofGenerated.slice(start, start + k), distances: links.generatedDistances.slice(start, start + k) });
    }
    return found;
  }

  // The outlier galleries do not need the scatter.
  const gallery = document.getElementById("outliers");
  data.outliers.forEach((places, index) => {
    const set = sets[index + 1];
    const row = element("div", { className: "tiles row" }, ...places.map((place) => tileButton(set.first + place, `${className(set.first + place)} · ${short(isolation[set.first + place])}`)));
    const dot = element("i");
    dot.style.background = set.colour;
    gallery.append(element("h3", {}, dot, set.title), row);
  });
  sortableClasses();
  if (!document.getElementById("explorer")) {
    window.explorer = null;
    return;
  }

  // The scatter

  const stage = document.getElementById("stage");
  const [points, overlay] = ["points", "overlay"].map((id) => document.getElementById(id));
  const tooltip = document.getElementById("tooltip"), status = document.getElementById("status"), detail = document.getElementById("detail");
  const views = data.views.map((view) => {
    const packed = array(Uint16Array, view.points);
    // One unit for both axes: distances in the plane mean something.
    const width = view.high[0] - view.low[0], height = view.high[1] - view.low[1], span = Math.max(width, height) || 1;
    const x = new Float32Array(total), y = new Float32Array(total);
    for (let p = 0; p < total; p++) {
      x[p] = ((packed[2 * p] / 65535 - 0.5) * width) / span;
      y[p] = ((0.5 - packed[2 * p + 1] / 65535) * height) / span;
    }
    return { ...view, x, y };
  });
  let visible = null, grid = null, stamps = new Map(), drawTime = 0;

  const scale = () => state.zoom * 0.94 * Math.min(stage.clientWidth, stage.clientHeight);
  const toScreen = (p) => {
    const view = views[state.view], s = scale();
    return [stage.clientWidth / 2 + (view.x[p] - state.x) * s, stage.clientHeight / 2 + (view.y[p] - state.y) * s];
  };

  const CELLS = 128;
  const cellOf = (value) => Math.min(CELLS - 1, Math.max(0, Math.floor((value + 0.5) * CELLS)));

  function sorted(keys, count) {
    // Places of `keys` in rising order (a counting sort) and where each key's begin.
    const starts = new Uint32Array(count + 1), order = new Uint32Array(keys.length);
    for (const key of keys) starts[key + 1]++;
    for (let key = 0; key < count; key++) starts[key + 1] += starts[key];
    const next = starts.slice();
    keys.forEach((key, place) => { order[next[key]++] = place; });
    return { starts, order };
  }

  function choose() {
    // Visible points in drawing order, the real ones below and each colour together, and the grid over them.
    const { colours, of } = modes[state.colour], shown = [];
    for (let p = 0; p < total; p++) {
      if (state.shownSets[setOf[p]] && (!state.classes || state.classes.has(labels[p]))) shown.push(p);
    }
    const keys = Uint32Array.from(shown, (p) => (setOf[p] === 0 ? 0 : colours.length) + of(p));
    const drawn = sorted(keys, 2 * colours.length);
    visible = { starts: drawn.starts, points: drawn.order.map((place) => shown[place]) };
    const { x, y } = views[state.view];
    const cells = sorted(Uint32Array.from(shown, (p) => cellOf(y[p]) * CELLS + cellOf(x[p])), CELLS * CELLS);
    grid = { starts: cells.starts, members: cells.order.map((place) => shown[place]) };
    draw();
  }

  const probe = element("canvas", { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
  function stamp(colour, isReal, radius) {
    // The pixels of one disc: offsets, opacity (0 to 256) and colour; generated samples have a white rim.
    const name = `${colour} ${isReal} ${radius.toFixed(2)}`;
    if (!stamps.has(name)) {
      probe.fillStyle = colour;
      probe.fillRect(0, 0, 1, 1);
      const rgb = probe.getImageData(0, 0, 1, 1).data, reach = Math.ceil(radius + 1), pixels = [];
      for (let dy = -reach; dy <= reach; dy++) {
        for (let dx = -reach; dx <= reach; dx++) {
          const far = Math.hypot(dx, dy), inside = Math.min(1, Math.max(0, radius + 0.5 - far));
          if (inside <= 0) continue;
          const rim = isReal ? 0 : Math.min(1, Math.max(0, far - radius + 1.1)) * 0.75;
          const mixed = [0, 1, 2].map((c) => Math.round(rgb[c] * (1 - rim) + 255 * rim));
          pixels.push([dx, dy, Math.round(256 * inside * (isReal ? 0.42 : 0.9)), ...mixed]);
        }
      }
      stamps.set(name, { reach, pixels: Int32Array.from(pixels.flat()) });
    }
    return stamps.get(name);
  }

  function fit(canvas) {
    const ratio = window.devicePixelRatio || 1;
    const width = Math.max(1, Math.round(stage.clientWidth * ratio)), height = Math.max(1, Math.round(stage.clientHeight * ratio));
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    return ratio;
  }

  let frame = null;
  function draw() {
    // Straight into pixels: for many small discs several times faster than the canvas's own arcs or copies.
    const begun = performance.now();
    const ratio = fit(points), context = points.getContext("2d"), view = views[state.view], s = scale() * ratio;
    const { width, height } = points;
    if (!frame || frame.width !== width || frame.height !== height) frame = context.createImageData(width, height);
    const out = new Uint32Array(frame.data.buffer).fill(0xffffffff);
    const { colours } = modes[state.colour], count = visible.points.length;
    const radius = ratio * Math.min(7, (count > 8000 ? 2.1 : count > 2000 ? 2.8 : 3.4) * Math.sqrt(Math.sqrt(state.zoom)));
    const x0 = width / 2 - state.x * s, y0 = height / 2 - state.y * s;
    for (let key = 0; key < 2 * colours.length; key++) {
      const first = visible.starts[key], after = visible.starts[key + 1];
      if (first === after) continue;
      const isReal = key < colours.length, { reach, pixels } = stamp(colours[key % colours.length], isReal, isReal ? 0.9 * radius : radius);
      for (let i = first; i < after; i++) {
        const p = visible.points[i], x = Math.round(x0 + view.x[p] * s), y = Math.round(y0 + view.y[p] * s);
        if (x < reach || y < reach || x >= width - reach || y >= height - reach) continue;
        for (let k = 0; k < pixels.length; k += 6) {
          const at = (y + pixels[k + 1]) * width + x + pixels[k], under = out[at], a = pixels[k + 2], b = 256 - a;
          const red = (pixels[k + 3] * a + (under & 255) * b) >> 8;
          const green = (pixels[k + 4] * a + ((under >> 8) & 255) * b) >> 8;
          const blue = (pixels[k + 5] * a + ((under >> 16) & 255) * b) >> 8;
          out[at] = 0xff000000 | (blue << 16) | (green << 8) | red;
        }
      }
    }
    context.putImageData(frame, 0, 0);
    drawTime = performance.now() - begun;
    status.textContent = `${count.toLocaleString("en")} of ${total.toLocaleString("en")} samples · ${view.statement} · ${drawTime.toFixed(0)} ms`;
    mark();
  }

  function mark() {
    const ratio = fit(overlay), context = overlay.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, stage.clientWidth, stage.clientHeight);
    const ring = (p, radius, width, colour) => {
      const [x, y] = toScreen(p);
      for (const [thick, stroke] of [[width + 2, "#fff"], [width, colour]]) {
        context.beginPath();
        context.arc(x, y, radius, 0, 7);
        context.lineWidth = thick;
        context.strokeStyle = stroke;
        context.stroke();
      }
    };
    if (state.selected >= 0) {
      context.fillStyle = "#ffffff66"; // the rest steps back
      context.fillRect(0, 0, stage.clientWidth, stage.clientHeight);
      const [x, y] = toScreen(state.selected);
      for (const near of neighboursOf(state.selected)) {
        if (!state.shownSets[near.set]) continue;
        for (const p of near.points) {
          const [u, v] = toScreen(p);
          context.beginPath();
          context.moveTo(x, y);
          context.lineTo(u, v);
          context.lineWidth = 1.2;
          context.strokeStyle = "#14141a99";
          context.stroke();
          ring(p, 5.5, 2.2, sets[near.set].colour);
        }
      }
      ring(state.selected, 8, 2.4, "#14141a");
    }
    if (state.hovered >= 0) ring(state.hovered, 7, 2, "#14141a");
  }

  function nearest(x, y, reach = 12) {
    const view = views[state.view], s = scale();
    const px = (x - stage.clientWidth / 2) / s + state.x, py = (y - stage.clientHeight / 2) / s + state.y, r = reach / s;
    let best = -1, least = r * r;
    for (let row = cellOf(py - r); row <= cellOf(py + r); row++) {
      for (let column = cellOf(px - r); column <= cellOf(px + r); column++) {
        const cell = row * CELLS + column;
        for (let i = grid.starts[cell]; i < grid.starts[cell + 1]; i++) {
          const p = grid.members[i], d = (view.x[p] - px) ** 2 + (view.y[p] - py) ** 2;
          if (d < least) { least = d; best = p; }
        }
      }
    }
    return best;
  }

  function hover(x, y) {
    const p = nearest(x, y);
    tooltip.hidden = p < 0;
    if (p >= 0) {
      if (p !== state.hovered) {
        const canvas = element("canvas");
        drawTile(canvas, p, 96);
        tooltip.replaceChildren(canvas, element("div", {}, ...describe(p)));
      }
      const left = x + 16 + tooltip.offsetWidth > stage.clientWidth ? x - 16 - tooltip.offsetWidth : x + 16;
      tooltip.style.left = `${Math.max(2, left)}px`;
      tooltip.style.top = `${Math.min(Math.max(2, y - 30), stage.clientHeight - tooltip.offsetHeight - 4)}px`;
    }
    if (p !== state.hovered) { state.hovered = p; mark(); }
  }

  function select(p, show = false) {
    state.selected = p;
    if (p < 0) {
      detail.replaceChildren(element("h4", { textContent: "Sample" }), "Click a point to see its neighbours in the other sets.");
      history.replaceState(null, "", " ");
      mark();
      return;
    }
    history.replaceState(null, "", `#sample=${p}`);
    const canvas = element("canvas");
    ready.then(() => drawTile(canvas, p, 110));
    const parts = [element("div", { className: "head" }, canvas, element("div", {}, ...describe(p)))];
    for (const near of neighboursOf(p)) {
      parts.push(element("h4", { textContent: `Nearest in ${sets[near.set].title}` }));
      parts.push(element("div", { className: "tiles" }, ...[...near.points].map((q, i) => tileButton(q, `${className(q)} · ${short(near.distances[i])}`))));
    }
    detail.replaceChildren(...parts);
    if (show) {
      let hidden = false;
      if (!state.shownSets[setOf[p]]) { state.shownSets[setOf[p]] = true; hidden = true; }
      if (state.classes && !state.classes.has(labels[p])) { state.classes = null; hidden = true; }
      if (hidden) { controls(); choose(); }
      const box = stage.getBoundingClientRect();
      if (box.bottom < 80 || box.top > window.innerHeight - 80) stage.scrollIntoView({ block: "center" });
    }
    mark();
  }

  // Controls

  const pressed = (name, isOn, action) => {
    const button = element("button", { textContent: name });
    button.setAttribute("aria-pressed", isOn);
    button.addEventListener("click", action);
    return button;
  };
  const group = (title, ...content) => element("div", {}, element("h4", { textContent: title }), ...content);

  function swatch(colour) {
    const dot = element("i");
    dot.style.background = colour;
    return dot;
  }

  function filterClasses(chosen) {
    state.classes = chosen;
    controls();
    choose();
  }

  let wanted = "";
  function controls() {
    const change = (field, value) => () => { state[field] = value; controls(); choose(); };
    const setRows = sets.map((set, s) => {
      const box = element("input", { type: "checkbox", checked: state.shownSets[s] });
      box.addEventListener("change", () => { state.shownSets[s] = box.checked; choose(); });
      return element("label", { title: set.title }, box, swatch(set.colour), element("span", { textContent: set.title }), element("small", { textContent: set.count.toLocaleString("en") }));
    });
    const counts = new Uint32Array(data.classes.length);
    for (let p = 0; p < total; p++) if (labels[p] >= 0) counts[labels[p]]++;
    const classRows = data.classes.map((one, c) => {
      const box = element("input", { type: "checkbox", checked: !state.classes || state.classes.has(c) });
      box.dataset.class = one.id;
      box.addEventListener("change", () => {
        const chosen = state.classes || new Set(data.classes.keys());
        if (box.checked) chosen.add(c); else chosen.delete(c);
        state.classes = chosen.size === data.classes.length ? null : chosen;
        choose();
      });
      const row = element("label", { title: `${one.name} (double click: this class alone)` }, box, swatch(classColours[c]), element("span", { textContent: one.name }), element("small", { textContent: counts[c].toLocaleString("en") }));
      row.addEventListener("dblclick", (event) => { event.preventDefault(); filterClasses(new Set([c])); });
      return row;
    });
    const search = element("input", { type: "search", placeholder: "find a class", value: wanted });
    const list = element("div", { className: "list" }, ...classRows);
    const narrow = () => {
      wanted = search.value;
      classRows.forEach((row, c) => { row.style.display = data.classes[c].name.toLowerCase().includes(wanted.toLowerCase()) ? "" : "none"; });
    };
    search.addEventListener("input", narrow);
    narrow();
    const matching = () => new Set([...data.classes.keys()].filter((c) => classRows[c].style.display !== "none"));
    const parts = [];
    if (views.length > 1) parts.push(group("Embedding", element("div", { className: "buttons" }, ...views.map((view, v) => pressed(view.name, v === state.view, () => { Object.assign(state, { view: v, zoom: 1, x: 0, y: 0 }); controls(); choose(); })))));
    const colours = data.classes.length ? ["class", "set", "isolation"] : ["set", "isolation"];
    parts.push(group("Colour", element("div", { className: "buttons" }, ...colours.map((name) => pressed(name, name === state.colour, change("colour", name))))));
    parts.push(group("Sets", ...setRows));
    if (data.classes.length) {
      const all = element("div", { className: "buttons" }, pressed("all", false, () => filterClasses(null)), pressed("found", false, () => filterClasses(matching())), pressed("none", false, () => filterClasses(new Set())));
      const classes = group("Classes", all, search, list);
      classes.className = "classes";
      parts.push(classes);
    }
    document.getElementById("controls").replaceChildren(...parts);
  }

  // Pointer

  const within = (event) => {
    const box = stage.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  let drag = null, waiting = false;
  const redraw = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; draw(); });
  };
  points.addEventListener("pointermove", (event) => {
    const [x, y] = within(event);
    if (drag) {
      const s = scale();
      if (Math.hypot(x - drag.startX, y - drag.startY) > 3) drag.moved = true;
      state.x -= (x - drag.x) / s;
      state.y -= (y - drag.y) / s;
      Object.assign(drag, { x, y });
      tooltip.hidden = true;
      redraw();
    } else hover(x, y);
  });
  points.addEventListener("pointerdown", (event) => {
    const [x, y] = within(event);
    drag = { x, y, startX: x, startY: y, moved: false };
    points.setPointerCapture(event.pointerId);
  });
  points.addEventListener("pointerup", (event) => {
    const [x, y] = within(event);
    if (drag && !drag.moved) select(nearest(x, y));
    drag = null;
  });
  points.addEventListener("pointercancel", () => { drag = null; });
  points.addEventListener("pointerleave", () => { tooltip.hidden = true; state.hovered = -1; mark(); });
  points.addEventListener("wheel", (event) => {
    event.preventDefault();
    const [x, y] = within(event), before = scale();
    state.zoom = Math.min(200, Math.max(0.5, state.zoom * Math.exp(-event.deltaY * 0.0016)));
    const dx = x - stage.clientWidth / 2, dy = y - stage.clientHeight / 2;
    state.x += dx / before - dx / scale();
    state.y += dy / before - dy / scale();
    redraw();
  }, { passive: false });
  points.addEventListener("dblclick", () => { Object.assign(state, { zoom: 1, x: 0, y: 0 }); redraw(); });
  window.addEventListener("keydown", (event) => { if (event.key === "Escape") select(-1); });
  new ResizeObserver(redraw).observe(stage);

  function sortableClasses() {
    const table = document.getElementById("classes");
    if (!table) return;
    const body = table.tBodies[0];
    [...table.tHead.rows[1].cells].forEach((head, column) => {
      let down = false;
      head.addEventListener("click", () => {
        down = !down;
        const value = (row) => {
          const cell = row.cells[column], text = cell.dataset.v;
          return text === undefined ? cell.textContent : text === "" ? NaN : Number(text);
        };
        const rows = [...body.rows].sort((a, b) => {
          const [u, v] = [value(a), value(b)];
          if (typeof u === "string") return (down ? 1 : -1) * u.localeCompare(v, undefined, { numeric: true });
          return Number.isNaN(u) - Number.isNaN(v) || (down ? u - v : v - u);
        });
        body.append(...rows);
      });
    });
    body.addEventListener("click", (event) => {
      const id = event.target.dataset.class;
      if (id === undefined || !document.getElementById("explorer")) return;
      filterClasses(new Set([data.classes.findIndex((one) => one.id === Number(id))]));
      document.getElementById("stage").scrollIntoView({ block: "center" });
    });
  }

  window.explorer = { data, state, toScreen, select, filterClasses, draw, ready, drawTime: () => drawTime, visible: () => grid.members.length };
  controls();
  select(-1);
  choose();
  const asked = /^#sample=(\d+)$/.exec(location.hash);
  if (asked && Number(asked[1]) < total) select(Number(asked[1]));
})();
