// Draws each stored Plotly figure, with range inputs, which the keyboard can move, in place of Plotly's own sliders.
// Plotly is loaded once: when a figure comes near the view, or when the page is complete and the browser idle.
(() => {
  const here = document.currentScript.src;
  const near = "1000px";
  const holders = document.querySelectorAll("div.slider-figure");

  const load = () =>
    new Promise((resolve, reject) => {
      const script = document.createElement("script");
      Object.assign(script, { src: new URL("plotly-basic.min.js", here), onload: resolve, onerror: reject });
      document.head.append(script);
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

  const slide = (holder, plot, slider) => {
    const label = document.createElement("label");
    const value = document.createElement("output");
    const input = document.createElement("input");
    Object.assign(input, { type: "range", min: 0, max: slider.steps.length - 1, step: 1, value: slider.active });
    const show = () => {
      const step = slider.steps[input.value];
      value.textContent = step.label;
      input.setAttribute("aria-valuetext", step.label);
      return step.args[0];
    };
    input.addEventListener("input", () => Plotly.restyle(plot, show()));
    show();
    label.append(`${slider.currentvalue.prefix} `, value, input);
    return label;
  };

  const draw = (holder) => {
    const figure = JSON.parse(holder.querySelector("script").textContent);
    const { sliders, ...layout } = figure.layout;
    const plot = document.createElement("div");
    plot.className = "slider-plot";
    const controls = document.createElement("div");
    controls.className = "slider-controls";
    controls.append(...sliders.map((slider) => slide(holder, plot, slider)));
    holder.append(controls, plot);
    const options = { responsive: true, displayModeBar: false };
    Plotly.newPlot(plot, figure.data, { ...layout, autosize: true, width: undefined }, options);
  };

  wanted()
    .then(load)
    .then(() => holders.forEach(draw));
})();
