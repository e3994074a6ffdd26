// Draws each stored Plotly figure, with range inputs and buttons, which take the keyboard, in place of Plotly's own
// sliders.
// Plotly is loaded once: when a figure comes near the view, or when the page is complete and the browser idle.
(() => {
  const here = document.currentScript.src;
  const near = "1000px";
  const holders = document.querySelectorAll("div.slider-figure");

  const make = (name, properties = {}) => Object.assign(document.createElement(name), properties);

  const load = () =>
    new Promise((resolve, reject) => {
      const src = new URL("plotly-basic.min.js", here);
      document.head.append(make("script", { src, onload: resolve, onerror: reject }));
    });

  const wanted = () =>
    new Promise((resolve) => {
      const observer = new IntersectionObserver(
        (entries) => entries.some((entry) => entry.isIntersecting) && resolve(),
        { rootMargin: near },
      );
      holders.forEach((holder) => observer.observe(holder));
      const idle = window.requestIdleCallback ?? setTimeout;
      const typeset = () => window.MathJax?.startup?.promise ?? Promise.resolve();
      const loaded = () => typeset().then(() => idle(resolve));
      document.readyState === "complete" ? loaded() : window.addEventListener("load", loaded);
    });

  // What a position shows: Plotly keeps the objects that it is given.
  const move = (plot, step) => Plotly.update(plot, ...structuredClone(step.args));

  const slide = (plot, slider) => {
    const label = make("label");
    const value = make("span"); // an output would take the label from the slider
    const last = slider.steps.length - 1;
    const input = make("input", { type: "range", min: 0, max: last, step: 1, value: slider.active });
    const show = () => {
      const step = slider.steps[input.value];
      value.textContent = step.label;
      input.setAttribute("aria-valuetext", step.label);
      return step;
    };
    input.addEventListener("input", () => move(plot, show()));
    show();
    label.append(`${slider.currentvalue.prefix} `, value, input);
    return label;
  };

  let groups = 0;
  const choose = (plot, slider) => {
    const set = make("fieldset");
    const name = `slider-choice-${++groups}`;
    const buttons = slider.steps.map((step, k) => {
      const label = make("label");
      const input = make("input", { type: "radio", name, value: k, checked: k === slider.active });
      input.addEventListener("change", () => move(plot, step));
      label.append(input, make("span", { textContent: step.label }));
      return label;
    });
    set.append(make("legend", { textContent: slider.currentvalue.prefix }), ...buttons);
    return set;
  };

  const draw = (holder) => {
    const figure = JSON.parse(holder.querySelector("script").textContent);
    const { sliders, ...layout } = figure.layout;
    const plot = make("div", { className: "slider-plot" });
    const controls = make("div", { className: "slider-controls" });
    controls.append(...sliders.map((slider) => (slider.name === "buttons" ? choose : slide)(plot, slider)));
    holder.append(controls, plot);
    const options = { responsive: true, displayModeBar: false };
    Plotly.newPlot(plot, figure.data, { ...layout, autosize: true, width: undefined }, options);
  };

  wanted()
    .then(load)
    .then(() => holders.forEach(draw));
})();
