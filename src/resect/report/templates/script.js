"use strict";
(() => {
  const root = document.documentElement, button = document.getElementById("theme"), key = "resect-theme";
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const charts = JSON.parse((document.getElementById("charts") || { textContent: "[]" }).textContent);
  const narrow = () => window.innerWidth < 640;
  const stored = () => { try { return localStorage.getItem(key); } catch { return null; } };
  const store = (value) => { try { localStorage.setItem(key, value); } catch { /* a page of its own may keep nothing */ } };
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);

  const paint = (style) => {
    const rgba = (name, alpha) => {
      const text = style.getPropertyValue(name).trim();
      if (!alpha) return text;
      const [r, g, b] = [1, 3, 5].map((start) => parseInt(text.slice(start, start + 2), 16));
      return `rgba(${r},${g},${b},${alpha})`;
    };
    const walk = (value) => {
      if (typeof value === "string") {
        const found = /^var\((--\w+)\)(?:\/([\d.]+))?$/.exec(value);
        return found ? rgba(found[1], found[2]) : value;
      }
      if (Array.isArray(value)) return value.map(walk);
      if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, walk(v)]));
      return value;
    };
    return walk;
  };

  const laidOut = (layout, color, font) => {
    const axis = { gridcolor: color("--line"), linecolor: color("--line"), zerolinecolor: color("--line"), automargin: true, fixedrange: true };
    const found = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: font, size: 12, color: color("--soft") },
      margin: { l: 46, r: 8, t: 34, b: 44 }, hovermode: "closest",
      hoverlabel: { bgcolor: color("--raised"), bordercolor: color("--line"), font: { family: font, size: 13, color: color("--ink") } },
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1, yref: "container", yanchor: "top" }, ...layout,
    };
    for (const name of Object.keys(found)) if (/^[xy]axis\d*$/.test(name)) found[name] = { ...axis, ...found[name] };
    for (const name of ["xaxis", "yaxis"]) found[name] ??= axis;
    found.annotations = (found.annotations || []).map((note) => ({ ...note, font: { ...note.font, color: color("--ink") } }));
    return found;
  };

  const near = new Set();
  const draw = (chart) => {
    if (typeof Plotly === "undefined" || !near.has(chart.name)) return;
    const style = getComputedStyle(root), walk = paint(style), font = getComputedStyle(document.body).fontFamily;
    const layout = laidOut(walk(chart.layout), (name) => style.getPropertyValue(name).trim(), font);
    const named = layout.showlegend === false ? 0 : chart.traces.filter((one) => one.name && one.showlegend !== false).length;
    const rows = narrow() ? named : Math.min(named, 1);
    const sides = narrow() ? { l: 38, r: 4 } : {};
    layout.margin = { ...layout.margin, ...sides, t: 34 + (named > 1 || layout.showlegend ? 6 + 19 * rows : 0) };
    layout.showlegend = named > 1;
    Plotly.react(`chart-${chart.name}`, walk(chart.traces), layout, { displayModeBar: false, responsive: true, scrollZoom: false });
  };
  const drawAll = () => charts.forEach(draw);
  const approaching = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((one) => one.isIntersecting)) {
      approaching.unobserve(entry.target);
      near.add(entry.target.id.slice("chart-".length));
      draw(charts.find((chart) => `chart-${chart.name}` === entry.target.id));
    }
  }, { rootMargin: "600px" });
  // The library is big: it is run once the page can be read.
  const begin = () => {
    const library = Object.assign(document.createElement("script"), { textContent: document.getElementById("plotly").textContent });
    document.body.append(library);
    charts.forEach((chart) => approaching.observe(document.getElementById(`chart-${chart.name}`)));
  };
  if (charts.length) window.addEventListener("load", () => setTimeout(begin, 0));

  const show = () => { button.setAttribute("aria-pressed", String(dark())); drawAll(); };
  const chosen = stored();
  if (chosen === "dark" || chosen === "light") root.dataset.theme = chosen;
  button.hidden = false;
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; store(root.dataset.theme); show(); });
  system.addEventListener("change", show);
  window.addEventListener("beforeprint", () => { charts.forEach((chart) => near.add(chart.name)); drawAll(); });
  show();

  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver((entries) => {
    const entry = entries.find((one) => one.isIntersecting);
    if (!entry) return;
    links.forEach((link) => link.removeAttribute("aria-current"));
    links.get(entry.target.id)?.setAttribute("aria-current", "true");
  }, { rootMargin: "-10% 0px -80% 0px" });
  document.querySelectorAll("main section[id]").forEach((part) => seen.observe(part));
})();
